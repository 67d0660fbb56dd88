"""Usage events: each id is counted once, whoever reports it, how often, and whatever is lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from decimal import Decimal
from typing import Any

import pytest

from core.clock import now_ms
from core.errors import InvalidValueError
from core.meters import MeterRegistry
from core.policy import Action, PeriodKind, Quota
from reconciler.flush import Flusher
from reconciler.ingested import IngestStore
from tests.integration.admission.ingester import (
    LIMIT,
    METERS,
    PLAN,
    Ingest,
    Reporter,
    ingestor,
)
from tests.support.hands import Hands
from tests.support.scripts import Scripts, plan_of

COUNTED, DUPLICATE, REFUSED = Ingest.COUNTED, Ingest.DUPLICATE, Ingest.REFUSED


@pytest.fixture(scope="module")
def hands() -> Iterator[Hands]:
    with Hands("tests.integration.admission.ingester") as found:
        yield found


async def stored(r: Reporter) -> None:
    """As the reconciler does: events into Postgres, and counts into the ledger."""
    parts, registry = r.parts, MeterRegistry(METERS)
    await registry.pin(parts.database)
    await IngestStore(parts.store, parts.database, parts.keyspace, registry, batch=100).store_all()
    await Flusher(parts.store, parts.database, parts.keyspace, registry).flush_all()
    assert await parts.store.length(parts.keyspace.ingested(0)) == 0


async def ledger(r: Reporter, subject: str) -> dict[str, Decimal]:
    rows = await r.parts.database.fetch("ledger_of_subject", subject, 10)
    return {row["meter"]: row["total"] for row in rows}


async def live(r: Reporter, subject: str, meter: str = "requests") -> int:
    state = (await r.parts.store.hgetall_many([r.parts.keyspace.state(subject)]))[0]
    return int(state.get(f"m:{meter}", "0").split(" ")[0])


def run(
    redis: str, postgres: str, check: Callable[[Reporter], Awaitable[None]], **more: Any
) -> None:
    async def main() -> None:
        async with ingestor(redis, postgres, **more) as r:
            await check(r)

    asyncio.run(main())


def test_the_same_and_other_ids_from_several_processes(
    hands: Hands, valkey: str, database: str
) -> None:
    """Every process reports all ids, twice; the reconciler stores what is there meanwhile."""
    events = [(f"s{n % 3}", f"e{n}", str(n % 7 + 1), "requests") for n in range(60)]
    given = {"redis": valkey, "postgres": database, "events": [*events, *events]}
    ended = hands.together([("ingest", given)] * 4)
    assert [it.status for it in ended] == [0] * 4
    said = [tuple(line) for it in ended for line in it.lines]
    assert len(said) == 4 * 120
    counted = Counter((subject, name) for subject, name, outcome in said if outcome == "counted")
    assert counted == {(subject, name): 1 for subject, name, _, _ in events}
    assert {outcome for _, _, outcome in said} == {"counted", "duplicate"}

    async def check(r: Reporter) -> None:
        await stored(r)
        for subject in ("s0", "s1", "s2"):
            total = sum(int(quantity) for of, _, quantity, _ in events if of == subject)
            assert await ledger(r, subject) == {"requests": total}
            found = [
                await r.parts.database.fetchrow("usage_event", subject, name)
                for of, name, _, _ in events
                if of == subject
            ]
            assert sum(row["quantity"] for row in found if row is not None) == total
        # an id is a subject's own
        assert (await r.report("s1", "e0", 2)).outcome is COUNTED

    run(valkey, database, check)


def test_two_at_once_of_which_one_fits(hands: Hands, valkey: str, database: str) -> None:
    async def prepare(r: Reporter) -> None:
        assert (await r.report("s", "before", LIMIT - 9_000)).outcome is COUNTED

    run(valkey, database, prepare)
    outcomes: list[str] = []
    calls = [
        (
            "ingest",
            {"redis": valkey, "postgres": database, "events": [("s", name, "5000", "requests")]},
        )
        for name in ("one", "two")
    ]
    for ended in hands.together(calls):
        assert ended.status == 0
        outcomes += [outcome for _, _, outcome in ended.lines]
    assert sorted(outcomes) == ["counted", "refused"]

    async def check(r: Reporter) -> None:
        await stored(r)
        assert await ledger(r, "s") == {"requests": 6_000}

    run(valkey, database, check)


def test_a_blocking_quota_refuses_and_nothing_is_counted_or_remembered(
    valkey: str, database: str
) -> None:
    async def check(r: Reporter) -> None:
        first = await r.report("s", "a", LIMIT - 1)
        assert (first.outcome, first.limits[0].remaining) == (COUNTED, 1)
        refused = await r.report("s", "b", 2)
        assert (refused.outcome, refused.limits[0].remaining) == (REFUSED, 1)
        assert await live(r, "s") == LIMIT - 1
        await stored(r)
        assert await r.parts.database.fetchrow("usage_event", "s", "b") is None
        assert await r.parts.store.text(r.parts.keyspace.event("s", "b")) is None
        # its id may be reported again when there is room: refused now, not for ever
        assert (await r.report("s", "b", 1)).outcome is COUNTED
        assert (await r.report("s", "b", 1)).outcome is DUPLICATE
        assert await live(r, "s") == LIMIT

    run(valkey, database, check)


def test_overage_is_counted_and_billed(valkey: str, database: str) -> None:
    plan = plan_of(Quota("monthly", "requests", 10, PeriodKind.BILLING, Action.OVERAGE))

    async def check(r: Reporter) -> None:
        assert (await r.report("s", "a", 8)).outcome is COUNTED
        assert (await r.report("s", "b", 8)).outcome is COUNTED
        await stored(r)
        rows = await r.parts.database.fetch("ledger_of_subject", "s", 10)
        assert [(row["total"], row["overage"]) for row in rows] == [(16, 6)]

    run(valkey, database, check, plan=plan)


def test_six_decimals_are_exact_from_end_to_end(valkey: str, database: str) -> None:
    quantities = [Decimal(n) * Decimal("0.000001") for n in range(1, 301)]
    quantities += [Decimal("1234.567891"), Decimal("0.1"), Decimal("1E+2"), Decimal("0.300000")]

    async def check(r: Reporter) -> None:
        found = await asyncio.gather(
            *(r.report("s", f"e{n}", q, "tokens") for n, q in enumerate(quantities))
        )
        assert {it.outcome for it in found} == {COUNTED}
        await stored(r)
        assert await ledger(r, "s") == {"tokens": sum(quantities)}
        rows = [
            await r.parts.database.fetchrow("usage_event", "s", f"e{n}")
            for n in range(len(quantities))
        ]
        assert [row["quantity"] for row in rows if row is not None] == quantities

    run(valkey, database, check)


def test_a_retry_finds_its_event_wherever_it_is(valkey: str, database: str) -> None:
    """In Redis alone; in both; in Postgres alone, as its memo has expired or Redis was wiped."""
    scripts = Scripts(valkey, controlled=False)

    async def check(r: Reporter) -> None:
        memo = r.parts.keyspace.event("s", "a")

        async def again() -> Ingest:
            return (await r.report("s", "a", 5)).outcome

        assert await again() is COUNTED
        assert await again() is DUPLICATE
        assert scripts.redis.pttl(memo) == -1  # for as long as it is nowhere else
        await stored(r)
        assert await again() is DUPLICATE
        assert 0 < scripts.redis.pttl(memo) <= 86_400_000
        scripts.redis.delete(memo)  # as a day later
        assert await again() is DUPLICATE
        scripts.redis.flushall()
        assert await again() is DUPLICATE
        assert (await r.report("s", "b", 2)).outcome is COUNTED
        await stored(r)
        assert await ledger(r, "s") == {"requests": 7}

    run(valkey, database, check)


def test_wiped_before_anything_was_stored_an_event_is_counted_anew(
    valkey: str, database: str
) -> None:
    """Its count and its id are lost together: the retry brings both back."""
    scripts = Scripts(valkey, controlled=False)

    async def check(r: Reporter) -> None:
        assert (await r.report("s", "a", 5)).outcome is COUNTED
        scripts.redis.flushall()
        assert (await r.report("s", "a", 5)).outcome is COUNTED
        await stored(r)
        assert await ledger(r, "s") == {"requests": 5}

    run(valkey, database, check)


def test_wiped_after_the_count_was_stored_an_event_is_not_counted_anew(
    valkey: str, database: str
) -> None:
    """A flush takes the ids with it: none is in the totals of the ledger and unknown to it."""
    scripts = Scripts(valkey, controlled=False)

    async def check(r: Reporter) -> None:
        parts, registry = r.parts, MeterRegistry(METERS)
        await registry.pin(parts.database)
        ingest = IngestStore(parts.store, parts.database, parts.keyspace, registry)
        flusher = Flusher(
            parts.store, parts.database, parts.keyspace, registry, ahead=ingest.store_all
        )
        assert (await r.report("s", "a", 5)).outcome is COUNTED
        await flusher.flush_all()
        scripts.redis.flushall()
        assert (await r.report("s", "a", 5)).outcome is DUPLICATE
        assert (await r.report("s", "b", 1)).outcome is COUNTED
        await flusher.flush_all()
        assert await ledger(r, "s") == {"requests": 6}

    run(valkey, database, check)


@pytest.mark.parametrize(
    ("field", "given"),
    [
        ("meter", {"meter": "unknown"}),
        ("quantity", {"quantity": "0.5"}),
        ("quantity", {"quantity": "0.0000001", "meter": "tokens"}),
        ("quantity", {"quantity": "1.0000000000000000000000000000000001", "meter": "tokens"}),
        ("quantity", {"quantity": "NaN"}),
        ("quantity", {"quantity": "sNaN"}),
        ("quantity", {"quantity": "Infinity"}),
        ("quantity", {"quantity": "0"}),
        ("quantity", {"quantity": "-1"}),
        ("quantity", {"quantity": "1E+30"}),
        ("quantity", {"quantity": "1E+999999"}),
        ("quantity", {"quantity": "1E-999999"}),
        ("quantity", {"quantity": "9007199254740993"}),
        ("quantity", {"quantity": True}),
        ("quantity", {"quantity": 0.5}),
        ("quantity", {"quantity": None}),
        ("occurred_at", {"occurred_at_ms": True}),
        ("occurred_at", {"occurred_at_ms": 10**30}),
        ("occurred_at", {"occurred_at_ms": 10**15}),
        ("occurred_at", {"occurred_at_ms": -(10**15)}),
        ("occurred_at", {"occurred_at_ms": "now"}),
        ("id", {"name": ""}),
        ("id", {"name": "x" * 256}),
        ("id", {"name": "a\x00b"}),
        ("id", {"name": 5}),
        ("id", {"name": True}),
        ("metadata", {"metadata": {"a": object()}}),
        ("metadata", {"metadata": {"a": "\x00"}}),
        ("metadata", {"metadata": {"a": "x" * 70_000}}),
        ("metadata", {"metadata": {"a": 10**30}}),
        ("metadata", {"metadata": [1]}),
        ("metadata", {"metadata": {1: 2}}),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else None,
)
def test_what_is_wrong_is_named_and_nothing_is_counted(
    ingest_once: Callable[[dict[str, Any]], int], field: str, given: dict[str, Any]
) -> None:
    with pytest.raises(InvalidValueError, match=f"^{field}: "):
        ingest_once(given)


@pytest.fixture(scope="module")
def ingest_once() -> Callable[[dict[str, Any]], int]:
    """Reports to stores that are not there: what is wrong is found before they are asked."""
    from core.admission.ingest import Ingestor, UsageEvent

    nobody: Any = None
    wrong = Ingestor(nobody, nobody, nobody, nobody, METERS, {})

    def report(given: dict[str, Any]) -> int:
        quantity = given.get("quantity", "1")
        event = UsageEvent(
            given.get("name", "e"),
            given.get("meter", "requests"),
            Decimal(quantity) if isinstance(quantity, str) else quantity,
            given.get("occurred_at_ms", now_ms()),
            given.get("metadata"),
        )
        asyncio.run(wrong.count("s", PLAN, 0, event))
        raise AssertionError("it was taken")

    return report


def test_what_is_unusual_and_right_arrives_as_it_was(valkey: str, database: str) -> None:
    metadata = {"text": 'ü "quoted" \\u0000 \U0001f600', "list": [1, 2.5, None, {"a": True}]}

    async def check(r: Reporter) -> None:
        import orjson

        for name, at_ms in (("ü id: 1%", 0), ("x" * 255, now_ms())):
            found = await r.report("s", name, "3", occurred_at_ms=at_ms, metadata=metadata)
            assert found.outcome is COUNTED
        await stored(r)
        for name in ("ü id: 1%", "x" * 255):
            row = await r.parts.database.fetchrow("usage_event", "s", name)
            assert row is not None
            assert orjson.loads(row["metadata"]) == metadata
        assert await ledger(r, "s") == {"requests": 6}

    run(valkey, database, check)
