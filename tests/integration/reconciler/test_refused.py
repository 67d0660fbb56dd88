"""States the ledger does not take: they stay listed, and keep nobody else waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any

import asyncpg
import pytest

from core.admission.program import compile_program
from core.keyspace import Keyspace
from core.period import HOUR_MS
from core.policy import Aggregation, Meter
from core.redis.scripts import load
from reconciler.flush import Flusher, FlushResult
from tests.integration.reconciler.parts import Parts, parts
from tests.integration.reconciler.test_flush import SPAN, START_MS, spend
from tests.support.scripts import Scripts, plan_of

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


def flusher_of(p: Parts, **options: Any) -> Flusher:
    return Flusher(p.store, p.database, p.keyspace, p.registry, **options)


@pytest.fixture
def scripts(valkey: str) -> Scripts:
    scripts = Scripts(valkey)
    scripts.at(START_MS * 1000)
    return scripts


def run(
    redis_url: str, postgres_url: str, check: Callable[[Parts], Awaitable[None]], **options: Any
) -> None:
    async def main() -> None:
        async with parts(redis_url, postgres_url, **options) as found:
            await check(found)

    asyncio.run(main())


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


def test_an_unchanged_meter_is_not_written_again(
    scripts: Scripts, valkey: str, database: str
) -> None:
    """And so a sealed period stays sealed, until it does change."""

    async def sealed(p: Parts) -> dict[str, bool]:
        connection = await asyncpg.connect(database)
        rows = await connection.fetch("SELECT meter, sealed_at, version FROM ledger_periods")
        await connection.execute("UPDATE ledger_periods SET sealed_at = now()")
        await connection.close()
        return {row["meter"]: row["sealed_at"] is not None for row in rows}

    async def check(p: Parts) -> None:
        spend(scripts, "s", credits=5)
        await p.flusher.flush_all()
        assert await sealed(p) == {"requests": False, "credits": False}
        spend(scripts, "s")
        await p.flusher.flush_all()
        assert await sealed(p) == {"requests": False, "credits": True}
        assert await p.version("s") == (1, 2)
        scripts.redis.hset(p.keyspace.state("s"), "epoch", 2)
        scripts.redis.zadd(p.keyspace.dirty(0), {p.keyspace.state("s"): START_MS})
        await p.flusher.flush_all()
        assert await sealed(p) == {"requests": True, "credits": True}

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


def refund(scripts: Scripts, subject: str, **units: int) -> None:
    """What a refund leaves behind: lower totals, also of the hour, at a higher version."""
    key = Keyspace().state(subject)
    state = scripts.state(subject)
    for meter, cost in units.items():
        total, over, hour, hour_over, count = map(int, state[f"m:{meter}"].split())
        text = f"{total - cost} {over} {hour - cost} {hour_over} {count + 1}"
        scripts.redis.hset(key, f"m:{meter}", text)
    scripts.redis.hincrby(key, "ver", 1)
    scripts.redis.zadd(Keyspace().dirty(0), {key: scripts.now_ms}, nx=True)


def test_a_total_falls_at_a_higher_version(scripts: Scripts, valkey: str, database: str) -> None:
    async def check(p: Parts) -> None:
        spend(scripts, "s", 3, credits=100)
        await p.flusher.flush_all()
        refund(scripts, "s", requests=1, credits=250)
        assert (await p.flusher.flush_all()).clean == 1
        ledger = await p.ledger("s")
        assert ledger == await p.live("s")
        assert ledger["credits", SPAN[0]] == (Decimal("0.50"), 0)
        assert await p.version("s") == (1, 4)

    run(valkey, database, check)


def test_totals_below_zero(scripts: Scripts, valkey: str, database: str) -> None:
    """A refund that lands in the hour, or the period, after that of what it takes back."""

    async def check(p: Parts) -> None:
        spend(scripts, "s", 1, credits=700)
        await p.flusher.flush_all()
        refund(scripts, "s", credits=951)
        key, hour = p.keyspace.state("s"), START_MS - START_MS % HOUR_MS
        closed = {f"ch:requests:{SPAN[0]}:{hour - HOUR_MS}": "-3 -1"}
        before = f"cp:requests:{SPAN[0] - 1000}"
        scripts.redis.hset(key, mapping=closed | {before: f"{SPAN[0]} -7 0"})
        assert (await p.flusher.flush_all()).clean == 1
        ledger = await p.ledger("s")
        assert ledger["credits", SPAN[0]] == ledger["credits", SPAN[0], hour]
        assert ledger["credits", SPAN[0]] == (Decimal("-2.51"), 0)
        assert ledger["requests", SPAN[0], hour - HOUR_MS] == (-3, -1)
        assert ledger["requests", SPAN[0] - 1000] == (-7, 0)
        assert [field for field in scripts.state("s") if field[0] == "c"] == []

    run(valkey, database, check)


def test_a_lower_version_never_replaces_a_higher_one(
    scripts: Scripts, valkey: str, database: str
) -> None:
    """Whatever its totals say: higher ones at a lower version do not count either."""

    async def check(p: Parts) -> None:
        spend(scripts, "s", 2)
        old = await p.flusher._read([p.keyspace.state("s")], FlushResult())
        refund(scripts, "s", requests=1)
        await p.flusher.flush_all()
        assert await p.flusher._commit(old, FlushResult()) == []
        assert (await p.ledger("s"))["requests", SPAN[0]] == (1, 0)

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


def test_a_last_value_may_fall_also_in_an_overtaken_state(
    scripts: Scripts, valkey: str, database: str
) -> None:
    meters = {"requests": Meter("requests"), "seats": Meter("seats", aggregation=Aggregation.LAST)}

    def admit(seats: int) -> None:
        program = compile_program(plan_of(), {"requests": 1, "seats": seats}, meters, {})
        assert scripts.admit("s", program).admitted

    async def check(p: Parts) -> None:
        await p.registry.pin(p.database)
        scripts.seed("s")
        for seats in (9, 4):
            admit(seats)
            assert (await p.flusher.flush_all()).clean == 1
            assert (await p.ledger("s"))["seats", SPAN[0]] == (seats, 0)
        admit(3)
        await p.database.fetch("claim_epochs", ["s"])
        assert (await p.flusher.flush_all()).overtaken == ["s"]
        assert (await p.flusher.flush_all()).clean == 1
        assert (await p.ledger("s"))["seats", SPAN[0]] == (3, 0)

    run(valkey, database, check, meters=meters)


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
