"""Coarse time: never early, and nothing left running."""

from __future__ import annotations

import asyncio

from gateway.proxy import watch
from gateway.proxy.watch import TICK_S, Message


def test_ticks_last_at_least_their_time_wherever_they_start() -> None:
    for seconds in (0.001, 0.05, 0.3, 30):
        assert (watch.ticks(seconds) - 1) * TICK_S >= seconds


def test_only_lasting_exchanges_are_followed_and_nothing_stays() -> None:
    asked = 0

    async def receive() -> Message:
        nonlocal asked
        asked += 1
        await asyncio.Event().wait()
        return {}

    async def run() -> None:
        watcher = watch.Watch(asyncio.get_running_loop())
        for _ in range(3):
            watcher.close(watcher.open(receive, 10))
        assert not asked

        exchange = watcher.open(receive, 10)
        async with asyncio.timeout(5):
            while not asked:
                await asyncio.sleep(0)
        watcher.close(exchange)
        await asyncio.sleep(0)
        assert asked == 1
        assert len(watcher) == 0
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
