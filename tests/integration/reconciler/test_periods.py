"""Ended periods: closed, sealed with what an invoice needs, unsealed when they change after all."""

from __future__ import annotations

import asyncio
from decimal import Decimal
from pathlib import Path

from core.clock import from_datetime, to_datetime
from core.period import DAY_MS, HOUR_MS, billing_period
from reconciler.snapshot import read_state
from tests.integration.reconciler.sealing import (
    ANCHOR_MS,
    CONFIG,
    SEAL_AFTER_MS,
    World,
    run,
    snapshot,
)

FIRST = billing_period(ANCHOR_MS, 1, ANCHOR_MS)
SECOND = billing_period(ANCHOR_MS, 1, FIRST[1])
THIRD = billing_period(ANCHOR_MS, 1, SECOND[1])
DUE = FIRST[1] + SEAL_AFTER_MS


def test_a_period_is_sealed_with_what_an_invoice_needs(valkey: str, database: str) -> None:
    async def check(w: World) -> None:
        s = await w.subscribe()
        await w.spend(s, 3, credits=104, peak=5, seats=7)
        w.at(ANCHOR_MS + 5 * DAY_MS)
        await w.spend(s, 4, credits=104, peak=3, seats=9, requests=2)
        await w.flush()
        w.at(DUE)
        result = await w.seal_all()
        assert (result.closed, result.sealed, result.waiting) == (4, 4, 0)

        paid, later = await w.sealed(s, "credits")
        hours = (FIRST[1] - FIRST[0]) // HOUR_MS
        assert paid["total"] == Decimal("7.28")
        assert paid["overage"] == Decimal("4.28")
        assert paid["overage_charge"] == Decimal("0.000002996")  # exact, 0.0000007 a credit
        assert paid["currency"] == "eur"
        assert paid["limit_quantity"] == 3  # the lowest; a shadow quota limits nothing
        assert paid["limit_exceeded"] is True
        assert paid["peak_hour"] == Decimal("4.16")
        assert abs(paid["average_hour"] - Decimal("7.28") / hours) < Decimal("1e-15")
        assert (paid["seals"], from_datetime(paid["sealed_at"])) == (1, DUE)
        assert (later["start"], later["total"], later["sealed_at"]) == (FIRST[1], 0, None)

        requests, _ = await w.sealed(s)
        assert (requests["total"], requests["overage_charge"]) == (8, 0)  # no price is no charge
        peak, _ = await w.sealed(s, "peak")
        assert (peak["peak_hour"], peak["limit_quantity"], peak["limit_exceeded"]) == (
            5,
            None,
            False,
        )
        assert abs(peak["average_hour"] - Decimal(8) / hours) < Decimal("1e-15")
        seats, _ = await w.sealed(s, "seats")
        assert (seats["total"], seats["peak_hour"]) == (9, 9)

        assert await w.resets(s) == [
            ("hard", Decimal("7.28"), FIRST[1]),
            ("monthly", 8, FIRST[1]),
            ("paid", Decimal("7.28"), FIRST[1]),
        ]

    run(valkey, database, check)


def test_not_before_late_answers_had_their_time(valkey: str, database: str) -> None:
    async def check(w: World) -> None:
        s = await w.subscribe()
        await w.spend(s, 2)
        await w.flush()
        w.at(DUE - 1)
        result = await w.seal_all()
        assert (result.closed, result.sealed, result.waiting) == (0, 0, 0)
        assert await w.periods.lag_ms(w.now_ms, SEAL_AFTER_MS) == 0
        w.at(DUE + 77)
        assert await w.periods.lag_ms(w.now_ms, SEAL_AFTER_MS) == 77
        assert (await w.seal_all()).sealed == 1
        assert await w.periods.lag_ms(w.now_ms, SEAL_AFTER_MS) == 0
        assert (await w.seal_all()).sealed == 0

    run(valkey, database, check)


def test_what_is_not_flushed_is_not_sealed(valkey: str, database: str) -> None:
    async def check(w: World) -> None:
        s = await w.subscribe()
        await w.spend(s, 2)
        await w.flush()
        w.at(FIRST[1] - 1)
        await w.spend(s, 5)
        w.at(DUE)
        for _ in range(2):
            result = await w.seal()
            assert (result.sealed, result.waiting) == (0, 1)
        state = w.scripts.state(s)
        assert state[f"cp:requests:{FIRST[0]}"] == f"{FIRST[1]} 7 2"
        assert state["p:requests"].startswith(f"{FIRST[1]} {SECOND[1]} ")
        await w.flush()
        assert (await w.seal()).sealed == 1
        row, _ = await w.sealed(s)
        assert (row["total"], row["overage"], row["peak_hour"]) == (7, 2, 5)

    run(valkey, database, check)


def test_a_busy_subject_is_sealed_although_it_is_never_clean(valkey: str, database: str) -> None:
    async def check(w: World) -> None:
        s = await w.subscribe()
        await w.spend(s, 2)
        w.at(DUE)
        await w.spend(s, 1)  # rolled over by a check: nothing to close here
        await w.flush()
        await w.spend(s, 1)
        result = await w.seal()
        assert (result.closed, result.sealed) == (0, 1)
        assert [row["total"] for row in await w.sealed(s)] == [2, 1]
        await w.flush()
        assert [row["sealed_at"] is not None for row in await w.sealed(s)] == [True, False]
        assert await w.resets(s) == [("monthly", 2, FIRST[1])]

    run(valkey, database, check)


def test_closing_is_what_a_check_would_have_done(valkey: str, database: str) -> None:
    async def check(w: World) -> None:
        by_check, by_roll = await w.subscribe(), await w.subscribe()
        w.periods._batch = 100  # both meters of a subject in one page: one call
        for s in (by_check, by_roll):
            await w.spend(s, 3, credits=250, requests=1)
        await w.flush()
        w.at(DUE + HOUR_MS)
        await w.spend(by_check, 1, credits=1, requests=1)
        await w.seal()
        closed = w.scripts.state(by_roll)
        checked = w.scripts.state(by_check)
        assert {k: v for k, v in checked.items() if k[0] in "cp"} == {
            k: v for k, v in closed.items() if k[0] in "cp"
        }
        assert closed["ver"] == checked["ver"] == "4"
        assert (
            w.scripts.redis.zscore(w.p.keyspace.dirty(0), w.p.keyspace.state(by_roll)) == w.now_ms
        )
        events = w.scripts.events()
        told = [
            {name: text for name, text in event.items() if name != "key"}
            for event in events
            if event["kind"] == "reset"
        ]
        assert sorted(map(str, told[:3])) == sorted(map(str, told[3:]))
        # and the next check finds nothing left to do, its calendars as they were
        await w.spend(by_roll, 1, credits=1, requests=1)
        after = w.scripts.state(by_roll)
        assert {k: v for k, v in after.items() if k not in ("ver", "epoch")} == {
            k: v for k, v in checked.items() if k not in ("ver", "epoch")
        }
        await w.flush()
        assert len(await w.resets(by_roll)) == len(await w.resets(by_check)) == 3

    run(valkey, database, check)


def test_an_idle_subject_is_sealed_and_told_once(valkey: str, database: str) -> None:
    async def check(w: World) -> None:
        s = await w.subscribe()
        await w.spend(s, 4)
        await w.flush()
        w.evict(s)
        w.at(DUE)
        result = await w.seal()
        assert (result.closed, result.sealed, result.resets) == (0, 1, 1)
        assert await w.resets(s) == [("monthly", 4, FIRST[1])]
        # it goes on idling through another period, of which there is nothing to tell
        w.at(SECOND[1] + SEAL_AFTER_MS)
        result = await w.seal()
        assert (result.sealed, result.resets) == (1, 0)
        w.at(THIRD[1] + SEAL_AFTER_MS)
        assert (await w.seal()).sealed == 0
        # and comes back: what was told is not told again, and the year's quota goes on
        outcome = await w.spend(s)
        await w.flush()
        assert await w.resets(s) == [("monthly", 4, FIRST[1])]
        assert [row["total"] for row in await w.sealed(s)] == [4, 0, 1]
        assert outcome.limits[1].remaining == 100_000 - 5

    run(valkey, database, check)


def test_a_state_older_than_the_ledger_does_not_speak(valkey: str, database: str) -> None:
    """Redis came back with an older copy: the ledger is what is sealed."""

    async def check(w: World) -> None:
        s = await w.subscribe()
        await w.spend(s, 2)
        older = w.scripts.state(s)
        await w.spend(s, 2)
        await w.flush()
        key = w.p.keyspace.state(s)
        w.scripts.redis.delete(key)
        w.scripts.redis.hset(key, mapping=older)
        w.at(DUE)
        result = await w.seal_all()
        assert (result.closed, result.sealed, result.resets) == (0, 1, 1)
        assert w.scripts.state(s) == older
        assert (await w.sealed(s))[0]["total"] == 4

    run(valkey, database, check)


def test_a_change_after_the_seal_unseals_and_is_sealed_again(valkey: str, database: str) -> None:
    async def check(w: World) -> None:
        s = await w.subscribe()
        await w.spend(s, 7)
        w.at(DUE)
        await w.seal_all()
        await w.flush()
        assert (await w.seal_all()).sealed == 0
        row, _ = await w.sealed(s)
        assert (row["total"], row["seals"]) == (7, 1)
        # a late answer of the old period
        key = w.p.keyspace.state(s)
        w.scripts.redis.hset(key, f"cp:requests:{FIRST[0]}", f"{FIRST[1]} 9 4")
        w.scripts.redis.hincrby(key, "ver", 1)
        w.scripts.redis.zadd(w.p.keyspace.dirty(0), {key: w.now_ms})
        await w.flush()
        row, _ = await w.sealed(s)
        assert (row["total"], row["sealed_at"]) == (9, None)
        result = await w.seal()
        assert (result.sealed, result.resealed) == (1, 1)
        row, _ = await w.sealed(s)
        assert (row["seals"], row["limit_exceeded"]) == (2, True)
        assert row["sealed_at"] is not None

    run(valkey, database, check)


def test_a_deleted_subscription_is_sealed_without_prices(valkey: str, database: str) -> None:
    async def check(w: World) -> None:
        s = await w.subscribe()
        await w.spend(s, 7)
        await w.rows("DELETE FROM subscriptions WHERE id = $1", s)
        w.at(DUE)
        assert (await w.seal()).sealed == 0  # not in the ledger yet
        await w.flush()
        assert (await w.seal()).sealed == 1
        (row,) = await w.sealed(s)
        assert (row["total"], row["overage"], row["peak_hour"]) == (7, 2, 7)
        assert (row["overage_charge"], row["currency"], row["limit_quantity"]) == (None,) * 3
        assert await w.resets(s) == []

    run(valkey, database, check)


def test_without_its_plan_a_period_waits_and_others_do_not(valkey: str, database: str) -> None:
    async def check(w: World) -> None:
        lost, fine = await w.subscribe("large"), [await w.subscribe() for _ in range(7)]
        for s in (lost, *fine):
            await w.spend(s, 2)
        await w.flush()
        w.snapshot = snapshot(CONFIG.replace("  large:", "  renamed:"))
        w.at(DUE)
        assert (await w.seal_all()).sealed == 7
        (row,) = await w.sealed(lost)
        assert row["sealed_at"] is None
        w.snapshot = snapshot()
        assert (await w.seal_all()).sealed == 1

    run(valkey, database, check)


def test_a_state_that_cannot_be_read_waits_and_others_do_not(valkey: str, database: str) -> None:
    async def check(w: World) -> None:
        broken, fine = await w.subscribe(), await w.subscribe()
        for s in (broken, fine):
            await w.spend(s, 2)
        await w.flush()
        w.scripts.redis.hset(w.p.keyspace.state(broken), "p:requests", "soon")
        w.at(DUE)
        result = await w.seal_all()
        assert (result.sealed, result.waiting) == (1, 1)
        assert w.scripts.state(broken)["p:requests"] == "soon"

    run(valkey, database, check)


def test_two_at_once_seal_each_period_once(valkey: str, database: str) -> None:
    async def check(w: World) -> None:
        subjects = [await w.subscribe() for _ in range(20)]
        for s in subjects:
            await w.spend(s, 6)
        await w.flush()
        for s in subjects[::2]:
            w.evict(s)
        w.at(DUE)
        found = await asyncio.gather(w.seal(), w.seal(), w.flush(), w.seal())
        await w.flush()
        last = await w.seal()
        sealed = sum(r.sealed for r in (found[0], found[1], found[3], last))
        assert sealed == 20
        for s in subjects:
            rows = await w.sealed(s)
            assert [(row["total"], row["seals"]) for row in rows] == [(6, 1), (0, 0)]
            assert await w.resets(s) == [("monthly", 6, FIRST[1])]

    run(valkey, database, check)


def test_late_periods_of_many_months_are_caught_up(valkey: str, database: str) -> None:
    async def check(w: World) -> None:
        s = await w.subscribe()
        for month in range(4):
            w.at(ANCHOR_MS + month * 31 * DAY_MS + HOUR_MS)
            await w.spend(s, month + 1)
        await w.flush()
        w.evict(s)
        w.at(ANCHOR_MS + 200 * DAY_MS)
        result = await w.seal()
        assert (result.sealed, result.resets) == (4, 1)
        rows = await w.sealed(s)
        assert [row["total"] for row in rows] == [1, 2, 3, 4, 0]
        now = billing_period(ANCHOR_MS, 1, w.now_ms)
        assert (rows[-1]["start"], from_datetime(rows[-1]["period_end"])) == now
        assert [used for _, used, _ in await w.resets(s)] == [1, 2, 3, 4]

    run(valkey, database, check)


def test_a_script_that_waited_does_not_go_back(valkey: str, database: str, tmp_path: Path) -> None:
    """Bounds of another time than the server's: nothing is closed."""

    async def check(w: World) -> None:
        s = await w.subscribe()
        await w.spend(s, 3)
        await w.flush()
        w.at(DUE)
        before = w.scripts.state(s)
        # the caller's clock is a period ahead of the script's
        ahead = SECOND[1] + SEAL_AFTER_MS
        result = await w.periods.seal_due(ahead, SEAL_AFTER_MS)
        assert (result.closed, result.sealed, result.waiting) == (0, 0, 1)
        assert w.scripts.state(s) == before
        assert not read_state(w.p.keyspace.state(s), before).closed
        assert to_datetime(FIRST[1]) > to_datetime(FIRST[0])

    run(valkey, database, check)
