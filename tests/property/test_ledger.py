"""From the script into the ledger and back, on real servers: nothing is lost but what a wiped Redis
took with it, and nothing is counted twice.

A walk admits requests, lets time pass over hours and periods, flushes, loses the state, stores a
snapshot that was read long before, and changes plan, anchor and interval. The model is the log of
what was admitted; what is durable of it is a prefix, to which a loss cuts it back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain

import asyncpg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from core.db import connect_pool
from core.period import DAY_MS, HOUR_MS
from core.policy import Aggregation, Meter, PeriodKind
from tests.property.walk import (
    ANCHORS,
    STARTS,
    SUMS,
    Plan,
    Step,
    meters,
    plans,
    quota,
    steps,
)
from tests.property.world import CLAIM, STORE, ControlledStore, Flush, Lose, Move, Servers
from tests.support.scripts import Scripts

BILLING, DAY, HOUR = PeriodKind.BILLING, PeriodKind.DAY, HOUR_MS
LASTS, PEAKS = (
    {name: replace(meter, aggregation=kind) for name, meter in SUMS.items()}
    for kind in (Aggregation.LAST, Aggregation.MAX)
)
forward = steps.map(
    lambda step: replace(step, after=abs(step.after)) if isinstance(step.after, int) else step
)
losses = st.builds(Lose, st.booleans(), st.sampled_from([0, 0, 1, 2_000]))
# Most of what can go wrong takes two or three of these in a row.
chunks: st.SearchStrategy[list[Move]] = st.one_of(
    forward.map(lambda step: [step]),
    st.tuples(forward, st.builds(Flush), losses).map(list),
    st.tuples(forward, losses).map(list),
    st.tuples(st.just(Flush(store=False)), forward, st.sampled_from([STORE, CLAIM, Flush()])).map(
        list
    ),
    st.sampled_from([Flush(), STORE, CLAIM]).map(lambda move: [move]),
)
walks = st.lists(chunks, min_size=1, max_size=8).map(lambda found: list(chain(*found)))


@pytest.fixture
def servers(valkey: str, database: str) -> Iterator[Servers]:
    scripts = Scripts(valkey)
    with asyncio.Runner() as runner:

        async def connect() -> Servers:
            store = ControlledStore.connect(valkey, 5.0)
            assert isinstance(store, ControlledStore)
            store.scripts = scripts
            pool = await connect_pool(database, size=4, timeout_s=10)
            return Servers(runner, scripts, store, pool, await asyncpg.connect(database))

        async def close(servers: Servers) -> None:
            await servers.store.close()
            await servers.database.close()
            await servers.connection.close()

        servers = runner.run(connect())
        yield servers
        runner.run(close(servers))


@settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    meters=meters,
    pool=st.lists(plans, min_size=1, max_size=3),
    walk=walks,
    start=st.sampled_from(STARTS),
)
@example(  # the clock of the new server is still in the period that was closed
    meters=SUMS,
    pool=[[quota("billing", 3), quota("daily", 2)]],
    walk=[
        Step(costs=((2, 0),)),
        Step(after=(BILLING, 0), costs=((3, 0),)),
        Flush(),
        Lose(behind=1),
        Step(costs=((1, 0),)),
        Step(after=(BILLING, 0), costs=((1, 0),)),
    ],
    start=STARTS[0],
)
@example(  # the same at a day's end: what was counted in the new day goes on in it
    meters=SUMS,
    pool=[[quota("daily", 9), quota("monthly", 9)]],
    walk=[
        Step(costs=((2, 0),)),
        Step(after=(DAY, 0), costs=((3, 0),)),
        Flush(),
        Lose(behind=2_000),
        Step(costs=((1, 0),)),
        Step(after=(DAY, 1), costs=((1, 0),)),
    ],
    start=STARTS[2],
)
@example(  # a longer interval whose period had begun before the closed one
    meters=SUMS,
    pool=[[quota("billing", 3)]],
    walk=[
        Step(costs=((2, 0),)),
        Step(after=(BILLING, 5), costs=((4, 0),), billing=(ANCHORS[0], 12)),
        Flush(),
        Lose(),
        Step(after=(BILLING, 5), costs=((1, 0),), billing=(ANCHORS[0], 1)),
    ],
    start=STARTS[0],
)
@example(  # read, lost, rebuilt, and only then stored: what was rebuilt did not know of it
    meters=SUMS,
    pool=[[quota("billing", 3)]],
    walk=[
        Step(costs=((2, 0),)),
        Flush(),
        Step(costs=((4, 0),)),
        Flush(store=False),
        Lose(),
        Step(costs=((1, 0),)),
        STORE,
        Step(costs=((1, 0),)),
    ],
    start=STARTS[0],
)
@example(  # read, lost, stored, and only then rebuilt: nothing was lost
    meters=SUMS,
    pool=[[quota("billing", 3)]],
    walk=[Step(costs=((2, 0),)), Flush(store=False), Lose(), STORE, Step(costs=((1, 0),))],
    start=STARTS[0],
)
@example(  # a last value may fall, also below what the ledger has, and under a foreign epoch
    meters=LASTS,
    pool=[[quota("billing", 3)]],
    walk=[
        Step(costs=((5, 0),)),
        Flush(),
        Step(costs=((1, 0),)),
        Flush(store=False),
        CLAIM,
        STORE,
        Step(after=HOUR_MS, costs=((2, 0),)),
    ],
    start=STARTS[3],
)
@example(  # read, and stored only after a later flush and a foreign claim: it is older than the
    # ledger, although it cost nothing to become so, and the live state is not
    meters=SUMS,
    pool=[[quota("billing", 0, thresholds=())]],
    walk=[
        Step(costs=((0, 0),)),
        Flush(store=False),
        Step(costs=((0, 0),)),
        Flush(),
        CLAIM,
        Step(costs=((0, 1),)),
    ],
    start=STARTS[0],
)
@example(  # a new configuration counts other calendars, before and after a loss
    meters=PEAKS,
    pool=[[quota("billing", 9)], [quota("monthly", 5), quota("yearly", 9), quota("daily", 4)]],
    walk=[
        Step(costs=((6, 3),)),
        Step(after=2 * DAY_MS, costs=((3, 1),)),
        Flush(),
        Step(after=(HOUR, 0), costs=((2, 2),)),
        Step(costs=((4, 4),), plan=1),
        Flush(),
        Lose(everything=False),
        Step(costs=((5, 1),), plan=0),
        Step(costs=((5, 1),), plan=1),
    ],
    start=STARTS[3],
)
def test_the_ledger_holds_what_was_admitted(
    servers: Servers, meters: Mapping[str, Meter], pool: list[Plan], walk: list[Move], start: int
) -> None:
    servers.walk(meters, pool, walk, start)
