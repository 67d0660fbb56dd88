"""A worker killed at every step of an outage and its replay: what was served is counted once."""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from core.admission.program import calendar_use, compile_program
from core.clock import to_datetime
from core.meters import MeterRegistry
from core.period import DAY_MS, HOUR_MS, Span, billing_period
from core.redis.client import RUN_LENGTH
from gateway.admission.check import Check, Unresolved
from gateway.outage import entries
from gateway.outage.spool import Spool
from reconciler.flush import Flusher
from tests.integration.admission.stack import METERS
from tests.integration.outage.worker import MAX_BYTES, PLAN, QUOTA
from tests.integration.reconciler.parts import Ledger, parts
from tests.support.hands import Hands
from tests.support.ledger import packed
from tests.support.scripts import Scripts
from tests.support.wait import wait_until

SUBJECTS = [f"s{number}" for number in range(5)]
BEFORE = 7
PROGRAM = compile_program(PLAN, {"requests": 1}, METERS, calendar_use([PLAN]))
DEAD = "redis://127.0.0.1:9/0"


@pytest.fixture(scope="module")
def hands() -> Iterator[Hands]:
    with Hands("tests.integration.outage.worker") as found:
        yield found


@pytest.fixture(autouse=True)
def _within_an_hour(valkey: str) -> None:
    """Waits for the next hour when this one ends soon: totals of hours are compared here."""
    redis = Scripts(valkey, controlled=False).redis
    wait_until(lambda: redis.time()[0] % 3600 < 3600 - 15, 16, "the next hour")


def totals(counts: Counter[tuple[Span, int]]) -> Ledger:
    """Requests by (period, hour), as `Parts.ledger` has them."""
    found: Ledger = {}
    for (span, hour), count in counts.items():
        for key in (("requests", span[0]), ("requests", span[0], hour)):
            found[key] = found.get(key, (Decimal(0), Decimal(0)))[0] + count, Decimal(0)
    return found


async def put(postgres: str, valkey: str, subject: str, span: Span, hour: int, total: int) -> None:
    """A total in the ledger, as an earlier flush left it."""
    async with parts(valkey, postgres, meters=METERS) as p:
        amount = [Decimal(total)], [Decimal(0)], [1], [total]
        await p.database.fetch("accept_states", [subject], "1", str(total))
        row = [subject], ["requests"], [to_datetime(span[0])]
        await p.database.execute("store_periods", *packed(*row, [to_datetime(span[1])], *amount))
        await p.database.execute("store_hours", *packed(*row, [to_datetime(hour)], *amount))


async def flushed(postgres: str, valkey: str, subjects: list[str]) -> dict[str, Ledger]:
    """What the ledger has after a flush."""
    async with parts(valkey, postgres, meters=METERS) as p:
        result = await Flusher(p.store, p.database, p.keyspace, MeterRegistry(METERS)).flush_all()
        assert result.behind == result.unreadable == result.lost == []
        # a state that another process seeded meanwhile is told its epoch, and taken the next time
        await Flusher(p.store, p.database, p.keyspace, MeterRegistry(METERS)).flush_all()
        assert (await p.flusher.lag())[0] == 0
        return {subject: await p.ledger(subject) for subject in subjects}


@pytest.mark.parametrize(
    "failpoint",
    [
        "replay.read",
        "replay.counted",
        "replay.counted:2",
        "replay.done",
        "spool.done:2",
        "spool.removed",
        "seed.read",
        "seed.claimed",
        "seed.ledger_read",
        "seed.written",
    ],
)
def test_killed_in_a_replay(
    hands: Hands, valkey: str, database: str, tmp_path: Path, failpoint: str
) -> None:
    """Served in this hour, in the last one and in the last period; and a batch to be taken back."""
    scripts = Scripts(valkey, controlled=False)
    scripts.run = scripts.redis.info("server")["run_id"][:RUN_LENGTH]
    seconds, _ = scripts.redis.time()
    now_ms = seconds * 1000
    scripts.now_us = now_ms * 1000
    span = billing_period(0, 1, now_ms)
    last = billing_period(0, 1, span[0] - 1)
    hour = now_ms - now_ms % HOUR_MS
    # an hour in the ledger that is not live; of this period, or else of the last
    earlier = (span, hour - HOUR_MS) if hour > span[0] else (last, hour - HOUR_MS)
    expected = {subject: Counter({(span, hour): BEFORE}) for subject in SUBJECTS}
    today = f"{now_ms - now_ms % DAY_MS} 0 0"
    scripts.seed("lost", {"q:requests:day": today}, run=scripts.run)
    counted = scripts.batch([("lost", PROGRAM)] * 2)
    counted += scripts.batch([("lost", PROGRAM)] * 3)  # counted, and nobody got the answer
    assert all(outcome.admitted for outcome in counted)
    deadline_ms = now_ms

    async def prepare() -> None:
        for subject in SUBJECTS:
            await put(database, valkey, subject, span, hour, BEFORE)
        spool = Spool(tmp_path, MAX_BYTES)
        future = asyncio.get_running_loop().create_future()

        def served(subject: str, at: tuple[Span, int]) -> bytes:
            expected[subject][at] += 1
            return entries.admitted(subject, PROGRAM, METERS, {}, at[0], at[1] + 1)

        places = ((last, last[0]), earlier, (span, hour), (last, last[1] - HOUR_MS))
        for part in range(2):
            for number in range(30):
                at = places[number % 4]
                await spool.append(served(SUBJECTS[number % len(SUBJECTS)], at))
            if part == 0:
                check = Check(PROGRAM, ("key",), *span, "", future, "lost")
                lost = Unresolved("test", scripts._batch, deadline_ms, (check,) * 3)
                await spool.append(entries.unresolved(lost, METERS))
        await spool.close()

    asyncio.run(prepare())
    given = {"redis": valkey, "postgres": database, "directory": str(tmp_path)}
    assert hands.run("replay", failpoints=failpoint, **given).status == -signal.SIGKILL
    assert hands.run("replay", **given).status == 0
    assert list(tmp_path.iterdir()) == []
    found = asyncio.run(flushed(database, valkey, [*SUBJECTS, "lost"]))
    assert found.pop("lost") == totals(Counter({(span, hour): 2}))
    assert found == {subject: totals(counts) for subject, counts in expected.items()}


@pytest.mark.parametrize("failpoint", ["spool.appended:9", "spool.fsynced:5", "spool.fsynced"])
def test_killed_while_it_serves(
    hands: Hands, valkey: str, database: str, tmp_path: Path, failpoint: str
) -> None:
    """What was served is counted. One that each writer had not been told of may be as well."""
    given = {"redis": valkey, "postgres": database, "directory": str(tmp_path)}
    outage = given | {"redis": DEAD, "subject": "s", "times": 60, "writers": 3}
    killed = hands.run("serve", failpoints=failpoint, **outage)
    assert killed.status == -signal.SIGKILL
    rest = hands.run("serve", **outage)
    assert (rest.status, len(rest.lines)) == (0, 60)
    assert hands.run("replay", **given).status == 0
    (found,) = asyncio.run(flushed(database, valkey, ["s"])).values()
    period, hour = sorted(found, key=len)
    assert found[period] == found[hour]
    assert len(killed.lines) + 60 <= found[period][0] <= len(killed.lines) + 60 + 3
    again = hands.run("replay", **given)
    assert (again.status, again.lines) == (0, [])


@pytest.mark.parametrize(
    "failpoint", ["seed.read", "seed.claimed", "seed.ledger_read", "seed.written"]
)
def test_killed_while_it_seeds(hands: Hands, valkey: str, database: str, failpoint: str) -> None:
    """The quota goes on from the ledger, whoever seeds in the end, and several do at once."""
    now_ms = Scripts(valkey, controlled=False).redis.time()[0] * 1000
    span, hour = billing_period(0, 1, now_ms), now_ms - now_ms % HOUR_MS
    asyncio.run(put(database, valkey, "s", span, hour, QUOTA - 10))
    given = {"redis": valkey, "postgres": database, "subject": "s", "times": 8}
    killed = hands.run("admit", failpoints=failpoint, **given)
    assert (killed.status, killed.lines) == (-signal.SIGKILL, [])
    ended = hands.together([("admit", given)] * 3)
    assert [it.status for it in ended] == [0, 0, 0]
    assert sum(len(it.lines) for it in ended) == 10
    (found,) = asyncio.run(flushed(database, valkey, ["s"])).values()
    assert {total for total, _ in found.values()} == {QUOTA}
