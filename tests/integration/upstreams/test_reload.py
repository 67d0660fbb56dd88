"""Pools over a reload: kept where the upstream did not change, else closed with their tasks."""

from __future__ import annotations

import asyncio

from core.config import loads
from gateway.runtime import Runtime
from tests.integration.proxy.raw import on_loop
from tests.integration.upstreams.support import Switch, ask, serving
from tests.support.wait import wait_until_async


def config(port: int, interval: str, more: str = "") -> str:
    return (
        f"upstreams: {{api: {{urls: [http://127.0.0.1:{port}], dns: {{}}, eject: {{}}, "
        f"health: {{path: /healthz, interval: {interval}, timeout: 1s}}}}}}\n"
        f"routes: [{{match: {{path: /x}}, upstream: api{more}}}]\n"
    )


def checks() -> list[str]:
    return [task.get_name() for task in asyncio.all_tasks() if "health" in task.get_name()]


@on_loop
async def test_pools_outlive_a_reload_unless_their_upstream_changed() -> None:
    async with serving(Switch()) as one:
        first = Runtime(loads(config(one.port, "1s"), env={}), {})
        (pool,) = first.pools.values()
        pool.start()
        pool.start()
        assert len(checks()) == 1
        assert await ask(pool) == (200, b"ok")

        again = Runtime(loads(config(one.port, "1s", ", strip_prefix: /x"), env={}), first.pools)
        assert list(again.pools.values()) == [pool]

        changed = Runtime(loads(config(one.port, "2s"), env={}), again.pools)
        (other,) = changed.pools.values()
        assert other is not pool
        pool.close()
        other.start()
        await wait_until_async(lambda: len(checks()) == 1, what="the old checks have ended")
        assert pool.size == 0
        assert await ask(other) == (200, b"ok")
        assert await ask(pool) == (200, b"ok"), "a request that was matched before"
        assert pool.size == 0, "and keeps no connection"
        other.close()
        await wait_until_async(lambda: checks() == [], what="no checks are left")
