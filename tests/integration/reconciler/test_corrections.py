"""Totals that fall, by refunds and last values, and what is not written twice."""

from __future__ import annotations

from decimal import Decimal

import asyncpg
import pytest

from core.admission.program import compile_program
from core.keyspace import Keyspace
from core.period import HOUR_MS
from core.policy import Aggregation, Meter
from reconciler.flush import FlushResult
from tests.integration.reconciler.parts import Parts, run
from tests.integration.reconciler.test_flush import SPAN, START_MS, spend
from tests.support.scripts import Scripts, plan_of


@pytest.fixture
def scripts(valkey: str) -> Scripts:
    scripts = Scripts(valkey)
    scripts.at(START_MS * 1000)
    return scripts


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
