"""Coarse time: never early, and nothing left running."""

from __future__ import annotations

import asyncio

from gateway.http.errors import ClientDisconnected, RequestTimeout
from gateway.http.message import Request
from gateway.proxy import watch
from gateway.proxy.watch import TICK_S, Flight, Limits
from tests.support.exchange import RecordingExchange


def test_ticks_last_at_least_their_time_wherever_they_start() -> None:
    for seconds in (0.001, 0.05, 0.3, 30):
        assert (watch.ticks(seconds) - 1) * TICK_S >= seconds


def test_a_client_that_goes_ends_its_flight_only_while_there_is_one() -> None:
    async def run() -> None:
        watcher = watch.Watch(asyncio.get_running_loop())
        exchange = RecordingExchange(Request("GET", b"/", []))
        flight = Flight(watcher, exchange, Limits(10, 10, 0))
        watcher.add(flight)
        assert exchange.on_gone is not None
        exchange.on_gone()
        assert isinstance(flight.error, ClientDisconnected)
        watcher.close(flight)
        assert exchange.on_gone is None
        assert len(watcher) == 0

    asyncio.run(run())


def test_who_is_waited_for_decides_what_a_time_out_is() -> None:
    async def run() -> None:
        watcher = watch.Watch(asyncio.get_running_loop())
        watcher.body_ticks = 1
        flight = Flight(
            watcher, RecordingExchange(Request("POST", b"/", [])), Limits(1_000, 1_000, 0)
        )
        watcher.add(flight)
        flight.await_client_body()
        async with asyncio.timeout(5):
            while flight.error is None:
                await asyncio.sleep(TICK_S)
        assert isinstance(flight.error, RequestTimeout)
        watcher.close(flight)

    asyncio.run(run())
