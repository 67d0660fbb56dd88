"""Subjects that were idle for long leave Redis, in one step, and come back as they were."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from core.admission.program import Verdict, compile_program
from core.config import Snapshot, load
from core.period import DAY_MS
from core.policy import Concurrency
from reconciler.idle import evict_idle, idle_after_ms
from tests.integration.reconciler.parts import METERS, Parts, parts
from tests.integration.reconciler.test_flush import PLAN, SPAN, START_MS, spend
from tests.support import Process, wait_until_async
from tests.support.scripts import Scripts, plan_of

CONFIG = """
reconciler: {{idle_after: 2h}}
meters:
  credits: {{unit: credit, decimals: 2}}
plans:
  one:
    limits:
      {limit}
      slots: {{concurrency: 3}}
  two: {{limits: {{more: {{concurrency: 1}}, yearly: {{period: year, limit: 10}}}}}}
"""
PROGRAM = compile_program(
    plan_of(*PLAN.limits, Concurrency("slots", 3)), {"requests": 1}, METERS, {}
)


def snapshot_of(tmp_path: Path, limit: str = "fast: {rate: 10/s, burst: 20}") -> Snapshot:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG.format(limit=limit))
    return load(path, {})


@pytest.fixture
def snapshot(tmp_path: Path) -> Snapshot:
    return snapshot_of(tmp_path)


@pytest.fixture
def scripts(valkey: str) -> Scripts:
    scripts = Scripts(valkey)
    scripts.at(START_MS * 1000)
    return scripts


def run(redis_url: str, postgres_url: str, check: Callable[[Parts], Awaitable[None]]) -> None:
    async def main() -> None:
        async with parts(redis_url, postgres_url) as found:
            await check(found)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("limit", "expected_ms"),
    [
        ("fast: {rate: 10/s, burst: 20}", 7_200_000),  # whole in two seconds: the setting decides
        ("slow: {rate: 1/h, burst: 3}", 3 * 3_600_000),
        ("window: {window: 1d, limit: 5}", 2 * DAY_MS),
        ("monthly: {period: billing, limit: 5}", 7_200_000),  # a quota is in the ledger
    ],
)
def test_how_long_is_long(tmp_path: Path, limit: str, expected_ms: int) -> None:
    assert idle_after_ms(snapshot_of(tmp_path, limit)) == expected_ms


def test_who_leaves_and_who_is_kept(
    scripts: Scripts, valkey: str, database: str, snapshot: Snapshot
) -> None:
    async def check(p: Parts) -> None:
        names = ["idle", "changed", "reserved", "taken_back", "recent", "in_use"]
        for name in names:
            spend(scripts, name, 3)
        await p.flusher.flush_all()
        keys = {name: p.keyspace.state(name) for name in names}
        idle, now_ms = p.keyspace.idle(0), await p.store.now_ms()
        since = dict(scripts.redis.zrange(idle, 0, -1, withscores=True))
        assert set(since) == set(keys.values())
        assert all(now_ms - 60_000 <= at <= now_ms for at in since.values())
        assert await evict_idle(p.store, p.keyspace, snapshot) == 0  # two hours are not over
        old_ms = now_ms - idle_after_ms(snapshot) - 60_000
        for name in names[:4] + names[5:]:
            scripts.redis.zadd(idle, {keys[name]: old_ms})
        spend(scripts, "changed")
        scripts.redis.hset(keys["reserved"], "v:1", "0 1")
        scripts.redis.hset(keys["taken_back"], "x:1", "0")
        free, held = p.keyspace.leases("idle", "slots"), p.keyspace.leases("in_use", "slots")
        scripts.redis.zadd(free, {"expired": 1})
        scripts.redis.zadd(held, {"held": now_ms + 600_000, "expired": 1})
        before = await p.ledger("idle")
        assert await evict_idle(p.store, p.keyspace, snapshot) == 2
        kept = {keys[name] for name in names if name not in ("idle", "in_use")}
        assert set(scripts.redis.keys("tg1:{0}:s:*")) == kept
        assert set(scripts.redis.zrange(idle, 0, -1)) == kept
        assert not scripts.redis.exists(free)
        assert scripts.redis.zrange(held, 0, -1) == ["held"]  # a request is under way
        assert await p.ledger("idle") == before
        # once they are flushed, or let go, they are idle anew
        scripts.redis.hdel(keys["reserved"], "v:1")
        assert (await p.flusher.flush_all()).clean == 1
        assert scripts.redis.zscore(idle, keys["changed"]) >= now_ms
        assert await evict_idle(p.store, p.keyspace, snapshot) == 1

    run(valkey, database, check)


def test_many_that_are_kept_do_not_hide_those_behind_them(
    scripts: Scripts, valkey: str, database: str, snapshot: Snapshot
) -> None:
    async def check(p: Parts) -> None:
        idle = p.keyspace.idle(0)
        pipeline = scripts.redis.pipeline()
        for number in range(450):
            key = p.keyspace.state(f"s{number:03d}")
            held = {"v:1": "0"} if number < 250 or number % 2 else {}
            if number != 300:  # one that is gone already
                pipeline.hset(key, mapping={"ver": 1, "epoch": 1} | held)
            pipeline.zadd(idle, {key: 1000 + number})
        pipeline.execute()
        assert await evict_idle(p.store, p.keyspace, snapshot, most=200) == 0
        assert await evict_idle(p.store, p.keyspace, snapshot) == 99
        assert scripts.redis.zcard(idle) == 350
        assert await evict_idle(p.store, p.keyspace, snapshot) == 0

    run(valkey, database, check)


def test_who_left_is_cold_and_in_the_ledger(
    scripts: Scripts, valkey: str, database: str, snapshot: Snapshot
) -> None:
    async def check(p: Parts) -> None:
        spend(scripts, "s", 4, credits=30)
        await p.flusher.flush_all()
        before = await p.live("s")
        assert await evict_idle(p.store, p.keyspace, snapshot, after_ms=-1) == 1
        assert scripts.state("s") == {}
        assert scripts.admit("s", PROGRAM, lease="a").status is Verdict.COLD  # to be seeded
        assert scripts.redis.zcard(p.keyspace.dirty(0)) == 0
        assert await p.ledger("s") == before
        assert before["requests", SPAN[0]] == (4, 0)

    run(valkey, database, check)


def test_evicted_while_several_processes_admit(
    valkey: str, database: str, snapshot: Snapshot
) -> None:
    """Gateways count, two reconcilers flush and throw out at once whoever is clean."""
    with ExitStack() as stack:
        gateways: dict[Process, list[str]] = {}
        for name in "ab":
            subjects = [f"{name}{number}" for number in range(6)]
            given = {"redis": valkey, "postgres": database, "quota": 10**6, "subjects": subjects}
            argument = json.dumps(given | {"times": 40, "rounds": 12})
            module = "tests.integration.reconciler.returner"
            process = stack.enter_context(Process([sys.executable, "-m", module, argument]))
            gateways[process] = subjects

        async def throw_out(p: Parts) -> int:
            evicted = 0
            while any(gateway.popen.poll() is None for gateway in gateways):
                await p.flusher.flush_all()
                evicted += await evict_idle(p.store, p.keyspace, snapshot, after_ms=-1)
            return evicted

        async def check(p: Parts) -> None:
            await p.registry.pin(p.database)
            async with parts(valkey, database) as other:
                await other.registry.pin(other.database)
                evicted = await asyncio.gather(throw_out(p), throw_out(other))
            assert [gateway.wait() for gateway in gateways] == [0, 0]
            assert sum(evicted) > 20, "nobody left while the gateways counted"

            async def clean() -> bool:
                await p.flusher.flush_all()
                return (await p.flusher.lag())[0] == 0

            await wait_until_async(clean, what="the last flush")
            for gateway, subjects in gateways.items():
                assert json.loads(gateway.output.splitlines()[-1]) == dict.fromkeys(
                    subjects, 12 * 40
                )
                for subject in subjects:
                    ledger = await p.ledger(subject)
                    periods = [row[0] for name, row in ledger.items() if len(name) == 2]
                    hours = [row[0] for name, row in ledger.items() if len(name) == 3]
                    assert sum(periods) == sum(hours) == 12 * 40

        run(valkey, database, check)
