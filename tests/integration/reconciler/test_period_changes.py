"""What a subscription's changes in mid-period leave of the consumption."""

from __future__ import annotations

from decimal import Decimal

import pytest

from core import directory
from core.clock import from_datetime
from core.period import DAY_MS, billing_period
from tests.integration.reconciler.sealing import ANCHOR_MS, SEAL_AFTER_MS, World, run

FIRST = billing_period(ANCHOR_MS, 1, ANCHOR_MS)
DUE = FIRST[1] + SEAL_AFTER_MS


def test_a_plan_change_keeps_consumption_and_is_sealed_at_the_new_price(
    valkey: str, database: str
) -> None:
    async def check(w: World) -> None:
        s = await w.subscribe("small")
        await w.spend(s, 4)
        w.at(ANCHOR_MS + 9 * DAY_MS)
        await directory.set_plan(w.p.database, s, "large")
        assert (await w.spend(s, 3)).limits[0].remaining == 50 - 7
        w.at(DUE)
        await w.seal_all()
        row, after = await w.sealed(s)
        assert (row["total"], row["limit_quantity"], row["currency"]) == (7, 50, "usd")
        # nothing was over the new limit, and the two over the old one are still counted
        assert (row["overage"], row["limit_exceeded"]) == (0, False)
        assert after["start"] == FIRST[1]

    run(valkey, database, check)


def test_a_longer_interval_begins_when_the_period_has_ended(valkey: str, database: str) -> None:
    async def check(w: World) -> None:
        s = await w.subscribe("small")
        await w.spend(s, 4)
        await directory.set_plan(w.p.database, s, "annual")
        await w.spend(s, 1)
        w.at(DUE)
        await w.seal_all()
        row, after = await w.sealed(s)
        assert (row["total"], row["start"]) == (5, FIRST[0])
        # the anchor's year began with it: the new period must not be the same row
        year = billing_period(ANCHOR_MS, 12, DUE)
        assert (after["start"], from_datetime(after["period_end"])) == (FIRST[1], year[1])
        await w.spend(s, 2)
        await w.flush()
        assert [row["total"] for row in await w.sealed(s)] == [5, 2]

    run(valkey, database, check)


@pytest.mark.parametrize("live", [True, False])
def test_a_longer_interval_of_a_subject_that_idles(valkey: str, database: str, live: bool) -> None:
    async def check(w: World) -> None:
        s = await w.subscribe("small")
        await w.spend(s, 4)
        await w.flush()
        await directory.set_plan(w.p.database, s, "annual")
        if not live:
            w.evict(s)
        w.at(DUE)
        await w.seal_all()
        row, after = await w.sealed(s)
        assert (row["total"], row["sealed_at"] is not None) == (4, True)
        assert (after["start"], after["total"]) == (FIRST[1], 0)
        assert await w.resets(s) == [("monthly", 4, FIRST[1])]

    run(valkey, database, check)


@pytest.mark.parametrize("days", [-6, 6])
def test_a_changed_anchor_keeps_what_was_consumed(valkey: str, database: str, days: int) -> None:
    """The period under way ends with the next check when a later one has begun, else at its end."""

    async def check(w: World) -> None:
        s = await w.subscribe("small")
        await w.spend(s, 4)
        w.at(ANCHOR_MS + 9 * DAY_MS)
        await directory.set_anchor(w.p.database, s, ANCHOR_MS + days * DAY_MS)
        await w.spend(s, 2)
        await w.flush()
        before = await w.sealed(s)
        assert sum(row["total"] for row in before) == 6
        w.at(ANCHOR_MS + 100 * DAY_MS)
        await w.seal_all()
        w.at(ANCHOR_MS + 140 * DAY_MS)
        await w.seal_all()
        rows = await w.sealed(s)
        assert sum(row["total"] for row in rows) == 6
        assert all(row["sealed_at"] for row in rows[:-1])
        starts = [row["start"] for row in rows]
        if days > 0:  # a period that began on the 16th: what was used under the old anchor is apart
            assert starts[:2] == [ANCHOR_MS, ANCHOR_MS + 6 * DAY_MS]
            assert [row["total"] for row in rows[:2]] == [4, 2]
        else:
            assert rows[0]["total"] == 6
        assert len(set(starts)) == len(starts)

    run(valkey, database, check)


def test_a_canceled_subscription_is_billed_for_what_it_used(valkey: str, database: str) -> None:
    async def check(w: World) -> None:
        s = await w.subscribe("small")
        await w.spend(s, 4, credits=200)
        await directory.set_status(w.p.database, s, "canceled")
        w.at(DUE)
        await w.seal_all()
        assert (await w.seal_all()).waiting == 0
        row = (await w.sealed(s, "credits"))[0]
        assert (row["total"], row["overage"], row["overage_charge"]) == (8, 5, Decimal("0.0000035"))
        assert row["sealed_at"] is not None
        assert await w.resets(s) == []  # nothing starts over for it

    run(valkey, database, check)
