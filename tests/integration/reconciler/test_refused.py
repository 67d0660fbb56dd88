"""States the ledger does not take: they stay listed, and keep nobody else waiting."""

from __future__ import annotations

from typing import Any

import pytest

from core.policy import Meter
from reconciler.flush import FlushResult
from tests.integration.reconciler.parts import Parts, flusher_of, run
from tests.integration.reconciler.test_flush import SPAN, START_MS, spend
from tests.support.scripts import Scripts

EVENT = {
    "key": "tg1:{0}:s:a",
    "limit": "monthly",
    "meter": "requests",
    "kind": "warning",
    "threshold": "80",
    "used": "8",
    "max": "10",
    "start": "0",
    "end": "9000",
    "at": "5000",
}


@pytest.fixture
def scripts(valkey: str) -> Scripts:
    scripts = Scripts(valkey)
    scripts.at(START_MS * 1000)
    return scripts


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("p:requests", f"{SPAN[1]} {SPAN[0]} {START_MS}"),  # ends before it starts
        ("p:requests", "0 999999999999999999 0"),  # beyond any calendar
        ("m:requests", "many"),
        ("epoch", "first"),
    ],
)
def test_a_damaged_state_is_left_and_the_others_are_stored(
    scripts: Scripts, valkey: str, database: str, field: str, text: str
) -> None:
    async def check(p: Parts) -> None:
        for number in range(9):
            spend(scripts, f"s{number}", 2)
        scripts.redis.hset(p.keyspace.state("s4"), field, text)
        damaged = scripts.state("s4")
        result = await p.flusher.flush_all()
        assert result.unreadable == [p.keyspace.state("s4")]
        assert (result.stored, result.clean) == (8, 8)
        assert scripts.redis.zrange(p.keyspace.dirty(0), 0, -1) == [p.keyspace.state("s4")]
        assert scripts.state("s4") == damaged
        assert await p.ledger("s4") == {}
        # it stays at the head of the list, and those behind it are reached all the same
        for number in range(9):
            if number != 4:
                spend(scripts, f"s{number}")
        assert (await p.flusher.flush_all()).stored == 8

    run(valkey, database, check, batch=3)


def test_a_state_of_an_unknown_meter_waits_for_the_meter(
    scripts: Scripts, valkey: str, database: str
) -> None:
    async def without(p: Parts) -> None:
        spend(scripts, "s", credits=5)
        result = await p.flusher.flush_all()
        assert (result.stored, result.unreadable) == (0, [p.keyspace.state("s")])
        assert (await p.flusher.lag())[0] == 1

    async def complete(p: Parts) -> None:
        assert (await p.flusher.flush_all()).clean == 1
        assert await p.ledger("s") == await p.live("s")

    run(valkey, database, without, meters={"requests": Meter("requests")})
    run(valkey, database, complete)


def test_an_overtaken_state_is_told_its_epoch(scripts: Scripts, valkey: str, database: str) -> None:
    async def check(p: Parts) -> None:
        spend(scripts, "s", 3)
        # another process claimed two epochs, as seeders do, and died
        await p.database.fetch("claim_epochs", ["s"])
        await p.database.fetch("claim_epochs", ["s"])
        result = await p.flusher.flush_all()
        assert (result.stored, result.overtaken) == (0, ["s"])
        assert await p.ledger("s") == {}
        assert scripts.state("s")["epoch"] == "2"
        assert (await p.flusher.lag())[0] == 1
        assert (await p.flusher.flush_all()).clean == 1
        assert await p.ledger("s") == await p.live("s")

    run(valkey, database, check)


def test_an_overtaken_state_below_the_ledger_is_not_let_in(
    scripts: Scripts, valkey: str, database: str
) -> None:
    async def check(p: Parts) -> None:
        spend(scripts, "s", 9)
        await p.flusher.flush_all()
        stored = await p.ledger("s")
        scripts.redis.delete(p.keyspace.state("s"))
        await p.database.fetch("claim_epochs", ["s"])
        spend(scripts, "s", 2)  # seeded from nothing, at the old epoch
        result = await p.flusher.flush_all()
        assert result.overtaken == ["s"]
        assert scripts.state("s")["epoch"] == "1"
        assert (await p.flusher.flush_all()).stored == 0
        assert await p.ledger("s") == stored

    run(valkey, database, check)


def test_a_state_seeded_from_an_older_reading_is_behind(
    scripts: Scripts, valkey: str, database: str
) -> None:
    """One process read the ledger; another seeded, counted and left; then the first one seeded."""

    async def check(p: Parts) -> None:
        for epoch, version in ((1, 0), (3, 2)):
            scripts.seed("s", epoch=epoch, version=version)
            spend(scripts, "s", 2)
            await p.flusher.flush_all()
            scripts.redis.delete(p.keyspace.state("s"))
        stored = await p.ledger("s")
        scripts.seed("s", epoch=2, version=2)
        spend(scripts, "s", 9)  # versions and totals are above the ledger's: they do not tell
        result = await p.flusher.flush_all()
        assert (result.overtaken, result.behind, result.stored) == (["s"], ["s"], 0)
        assert scripts.state("s")["epoch"] == "2"
        assert (await p.flusher.flush_all()).behind == ["s"]
        assert await p.ledger("s") == stored

    run(valkey, database, check)


def test_an_epoch_is_not_passed_to_a_state_that_is_gone(
    scripts: Scripts, valkey: str, database: str
) -> None:
    """Redis is wiped between the refusal and the answer to it: no empty state may come of it."""

    async def check(p: Parts) -> None:
        spend(scripts, "s", 3)
        await p.flusher.flush_all()
        spend(scripts, "s")
        snapshots = await p.flusher._read([p.keyspace.state("s")], FlushResult())
        await p.database.fetch("claim_epochs", ["s"])
        scripts.redis.delete(p.keyspace.state("s"))
        await p.flusher._pass_epochs_on(snapshots, FlushResult())
        assert scripts.state("s") == {}

    run(valkey, database, check)


def test_a_state_behind_the_ledger_is_never_acknowledged(
    scripts: Scripts, valkey: str, database: str
) -> None:
    """Redis lost writes: it came back with an older copy of its data."""

    async def check(p: Parts) -> None:
        key = p.keyspace.state("s")
        spend(scripts, "s", 3)
        old = scripts.state("s")
        spend(scripts, "s", 4)
        await p.flusher.flush_all()
        stored = await p.ledger("s"), await p.version("s")
        scripts.redis.delete(key)
        scripts.redis.hset(key, mapping=old)
        scripts.redis.zadd(p.keyspace.dirty(0), {key: START_MS})
        for _ in range(2):
            result = await p.flusher.flush_all()
            assert (result.behind, result.stored, result.clean) == (["s"], 0, 0)
            assert (await p.flusher.lag())[0] == 1
        assert (await p.ledger("s"), await p.version("s")) == stored
        assert scripts.state("s") == old

    run(valkey, database, check)


def test_a_state_behind_the_ledger_is_given_to_repair(
    scripts: Scripts, valkey: str, database: str
) -> None:
    async def check(p: Parts) -> None:
        await p.registry.pin(p.database)
        key = p.keyspace.state("s")
        for name in ("s", "t"):
            spend(scripts, name, 3)
        old = scripts.state("s")
        spend(scripts, "s", 4)
        await p.flusher.flush_all()
        asked: list[list[str]] = []

        async def fails(subjects: list[str]) -> None:
            asked.append(subjects)
            raise ValueError("a bug")

        async def rebuild(subjects: list[str]) -> None:
            asked.append(subjects)
            await p.database.fetch("claim_epochs", subjects)
            scripts.redis.delete(key)
            fields = {name: old[name] for name in old if name not in ("ver", "epoch")}
            fields["m:requests"] = "7 2 7 2 7"
            scripts.seed("s", fields, epoch=2, version=7)

        scripts.redis.delete(key)
        scripts.redis.hset(key, mapping=old)
        scripts.redis.zadd(p.keyspace.dirty(0), {key: START_MS})
        spend(scripts, "t")
        flusher = flusher_of(p, repair=fails)
        result = await flusher.flush_all()
        assert (result.behind, result.repaired, result.clean) == (["s"], 0, 1)
        flusher = flusher_of(p, repair=rebuild)
        result = await flusher.flush_all()
        assert (result.behind, result.repaired) == (["s"], 1)
        assert (await flusher.lag())[0] == 1  # listed until what was rebuilt is in the ledger
        result = await flusher.flush_all()
        assert (result.behind, result.clean) == ([], 1)
        assert asked == [["s"], ["s"]]
        assert await p.ledger("s") == await p.live("s")
        assert await p.version("s") == (2, 7)

    run(valkey, database, check)


def test_a_name_that_postgres_cannot_hold_refuses_one_subject(
    scripts: Scripts, valkey: str, database: str
) -> None:
    async def check(p: Parts) -> None:
        for name in ("a", "b\x00b", "c"):
            spend(scripts, name)
        result = await p.flusher.flush_all()
        assert (result.stored, result.unreadable) == (2, [p.keyspace.state("b\x00b")])
        scripts.redis.xadd(p.keyspace.events(0), {**EVENT, "limit": "x\x00"})
        scripts.redis.xadd(p.keyspace.events(0), EVENT)
        assert await p.events.store_all() == 1
        assert scripts.events() == []

    run(valkey, database, check)


def test_subjects_that_cannot_be_stored_are_passed_once(
    scripts: Scripts, valkey: str, database: str
) -> None:
    async def check(p: Parts) -> None:
        dirty = p.keyspace.dirty(0)
        damaged = {f"tg1:{{0}}:s:bad{n:03d}": n for n in range(60)}
        pipeline = scripts.redis.pipeline()
        for key in damaged:
            pipeline.hset(key, mapping={"ver": "1", "epoch": "x"})
        pipeline.zadd(dirty, damaged)
        pipeline.execute()
        for number in range(60):
            spend(scripts, f"good{number}")
        asked = []
        oldest = p.store.oldest

        async def counted(key: str, count: int, skip: int = 0) -> Any:
            rows = await oldest(key, count, skip)
            asked.append(len(rows))
            return rows

        p.store.oldest = counted  # type: ignore[method-assign]
        result = await p.flusher.flush_all()
        assert (result.stored, len(result.unreadable)) == (60, 60)
        assert sum(asked) <= 2 * 120 + 10
        assert max(asked) <= 10

    run(valkey, database, check, batch=10)
