"""The list of changed subjects: how old it says it is, and how it is shortened."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from core.period import HOUR_MS
from core.redis.scripts import load
from reconciler.flush import FlushResult
from tests.integration.reconciler.parts import Parts, flusher_of, run
from tests.integration.reconciler.test_flush import SPAN, START_MS, spend
from tests.support.scripts import Scripts


@pytest.fixture
def scripts(valkey: str) -> Scripts:
    scripts = Scripts(valkey)
    scripts.at(START_MS * 1000)
    return scripts


def test_changes_of_the_future_are_flushed(scripts: Scripts, valkey: str, database: str) -> None:
    """The server's clock went back."""

    async def check(p: Parts) -> None:
        names = [f"s{number}" for number in range(8)]
        for name in names:
            spend(scripts, name)
        keys = {p.keyspace.state(name): 2**42 + n for n, name in enumerate(names)}
        scripts.redis.zadd(p.keyspace.dirty(0), keys)
        damaged = p.keyspace.state("s3")
        scripts.redis.hset(damaged, "epoch", "first")
        result = await p.flusher.flush_all()
        assert (result.stored, result.clean, result.unreadable) == (7, 7, [damaged])
        # and its lag is known from now on
        await asyncio.sleep(0.02)
        count, lag_ms = await p.flusher.lag()
        assert count == 1
        assert lag_ms >= 20

    run(valkey, database, check, batch=3)


def test_an_acknowledgement_of_very_many_fields_goes_in_pieces(
    scripts: Scripts, valkey: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reconciler.flush._MAX_ARGUMENTS", 7)

    async def check(p: Parts) -> None:
        hour = SPAN[0] - SPAN[0] % HOUR_MS
        for name in ("s", "t", "u"):
            spend(scripts, name)
            fields = {f"ch:requests:{SPAN[0]}:{hour - n * HOUR_MS}": "1 0" for n in range(1, 20)}
            scripts.redis.hset(p.keyspace.state(name), mapping=fields)
        sent = []
        run_script = p.store.run

        async def counted(script: Any, keys: Any, arguments: Any) -> Any:
            sent.append(len(keys) + len(arguments))
            return await run_script(script, keys, arguments)

        p.store.run = counted  # type: ignore[method-assign]
        result = await p.flusher.flush_all()
        assert (result.stored, result.clean) == (3, 3)
        assert max(sent) <= 2 * 7 + 4
        for name in ("s", "t", "u"):
            assert not [field for field in scripts.state(name) if field.startswith("ch:")]
            assert len(await p.ledger(name)) == 21
        assert await p.flusher.lag() == (0, 0)

    run(valkey, database, check)


def test_a_subject_whose_state_is_gone_is_reported_then_unlisted(
    scripts: Scripts, valkey: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(p: Parts) -> None:
        counted: list[int] = []
        flusher = flusher_of(p, on_lost=counted.append)
        for name in ("s", "t", "u"):
            spend(scripts, name)
        scripts.redis.delete(p.keyspace.state("s"), p.keyspace.state("u"))
        with monkeypatch.context() as patch:  # and a crash in between reports it again
            patch.setattr(flusher, "_confirm", None)
            with pytest.raises(TypeError):
                await flusher.flush_all()
        assert (counted, (await flusher.lag())[0]) == ([2], 3)
        result = await flusher.flush_all()
        assert sorted(result.lost) == [p.keyspace.state("s"), p.keyspace.state("u")]
        assert (result.stored, result.clean, result.unreadable, counted) == (1, 3, [], [2, 2])
        assert await flusher.lag() == (0, 0)
        assert scripts.redis.zrange(p.keyspace.idle(0), 0, -1) == [p.keyspace.state("t")]

    run(valkey, database, check)


def test_the_lag_is_the_age_of_the_oldest_change(
    scripts: Scripts, valkey: str, database: str
) -> None:
    async def check(p: Parts) -> None:
        now_ms = await p.store.now_ms()
        for subject, age in (("young", 2_000), ("old", 90_000)):
            scripts.at((now_ms - age) * 1000)
            spend(scripts, subject, 3)
        count, lag_ms = await p.flusher.lag()
        assert count == 2
        assert 90_000 <= lag_ms <= 90_000 + (await p.store.now_ms() - now_ms)
        # one changes while it is flushed: it is late by the flush, not by ninety seconds
        keys = [p.keyspace.state("old")]
        read_at = await p.store.now_ms()
        snapshots = await p.flusher._read(keys, FlushResult())
        accepted = await p.flusher._commit(snapshots, FlushResult())
        spend(scripts, "old")
        await p.flusher._confirm(accepted, keys, snapshots, read_at)
        assert scripts.redis.zscore(p.keyspace.dirty(0), keys[0]) == read_at
        # changes from the future (another clock) are no negative lag
        scripts.redis.zadd(p.keyspace.dirty(0), {keys[0]: 2**42})
        scripts.redis.zrem(p.keyspace.dirty(0), p.keyspace.state("young"))
        assert await p.flusher.lag() == (1, 0)

    run(valkey, database, check)


def test_the_scripts_of_a_flush_are_loaded_when_the_server_lost_them(
    scripts: Scripts, valkey: str, database: str
) -> None:
    async def check(p: Parts) -> None:
        spend(scripts, "s")
        await p.flusher.flush_all()
        assert scripts.redis.script_exists(load("acknowledge").sha) == [True]
        spend(scripts, "s")
        scripts.redis.script_flush()
        assert (await p.flusher.flush_all()).clean == 1

    run(valkey, database, check)
