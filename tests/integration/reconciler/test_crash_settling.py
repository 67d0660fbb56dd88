"""A reconciler killed at every step of expiring reservations and of storing usage events."""

from __future__ import annotations

import asyncio
import json
import signal
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from core import clock
from core.admission.program import Verdict, compile_program
from core.period import DAY_MS, billing_period
from core.policy import Action, PeriodKind, Quota
from core.redis.client import RUN_LENGTH
from tests.integration.reconciler.parts import METERS, Ledger, parts
from tests.integration.reconciler.test_process import CONFIG
from tests.support.hands import Hands
from tests.support.scripts import Scripts, plan_of

PLAN = plan_of(Quota("monthly", "requests", 3, PeriodKind.BILLING, Action.OVERAGE))
PLAIN = compile_program(PLAN, {"requests": 1}, METERS, {})
RESERVED = compile_program(PLAN, {"requests": 2}, METERS, {}, reserve_ms=1)
EVENT = compile_program(PLAN, {"credits": 25}, METERS, {}, event=True)
SUBJECTS = [f"s{number}" for number in range(8)]


@pytest.fixture(scope="module")
def hands() -> Iterator[Hands]:
    with Hands("tests.integration.reconciler.process") as found:
        yield found


async def stored(redis: str, postgres: str) -> tuple[dict[str, Ledger], list[tuple[Any, ...]]]:
    """The ledger by subject, and the usage events."""
    async with parts(redis, postgres) as p:
        ledgers = {subject: await p.ledger(subject) for subject in SUBJECTS}
        rows = [
            (subject, await p.database.fetchrow("usage_event", subject, f"e{n}"))
            for subject in SUBJECTS
            for n in range(3)
        ]
        events = [(subject, *row[:3]) for subject, row in rows if row is not None]
        return ledgers, events


@pytest.mark.parametrize(
    "failpoint",
    [
        "reservations.listed",
        "reservations.expired",
        "ingest.read",
        "ingest.stored",
        "ingest.deleted",
    ],
)
def test_killed_at_a_step(
    hands: Hands, tmp_path: Path, valkey: str, database: str, failpoint: str
) -> None:
    scripts = Scripts(valkey, controlled=False)
    scripts.run = scripts.redis.info("server")["run_id"][:RUN_LENGTH]
    scripts.now_us = clock.now_ms() * 1000
    for subject in SUBJECTS:
        scripts.seed(subject, run=scripts.run)
        for _ in range(2):
            assert scripts.admit(subject, PLAIN).admitted
        for number in range(3):  # never settled, and due at once
            assert scripts.admit(subject, RESERVED, lease=f"{subject}-{number}").admitted
        for number in range(3):
            text = json.dumps({"id": f"e{number}", "occurred_at": 1_000 * number})
            assert scripts.admit(subject, EVENT, lease=text, event=f"e{number}").admitted
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("lease: 1s", "lease: 500ms"))
    environment = {
        "TALLYGATE_REDIS_URL": valkey,
        "TALLYGATE_POSTGRES_URL": database,
        "TALLYGATE_METRICS_DIR": str(tmp_path / "metrics"),
    }
    given = {"config": str(config), "env": environment}

    assert hands.run("reconcile", failpoints=failpoint, **given).status == -signal.SIGKILL
    assert hands.run("reconcile", **given).lines == ["drained"]

    start_ms = billing_period(0, 1, scripts.now_ms)[0]
    ledgers, events = asyncio.run(stored(valkey, database))
    for ledger in ledgers.values():
        # 2 plain requests; 3 reservations of 2 were taken back, and the overage that they were
        assert ledger["requests", start_ms] == (2, 0)
        assert ledger["credits", start_ms] == (Decimal("0.75"), 0)
    assert events == [
        (subject, f"e{number}", "credits", Decimal("0.25"))
        for subject in SUBJECTS
        for number in range(3)
    ]
    keys = scripts.keyspace
    for subject in SUBJECTS:
        for number in range(3):  # known to Redis for a day more, and counted no more
            assert 0 < scripts.redis.pttl(keys.event(subject, f"e{number}")) <= DAY_MS
            text = json.dumps({"id": f"e{number}", "occurred_at": 0})
            answer = scripts.admit(subject, EVENT, lease=text, event=f"e{number}")
            assert answer.status is Verdict.DUPLICATE
        # each was taken back once and is remembered: who served it after all is charged once
        assert sum(name.startswith("x:") for name in scripts.state(subject)) == 3
        served = "confirm", subject, f"{subject}-1"
        assert scripts.settle(served, run=scripts.run) == [1]
        assert scripts.settle(served, run=scripts.run) == [0]
    assert hands.run("reconcile", **given).lines == ["drained"]
    ledgers, _ = asyncio.run(stored(valkey, database))
    assert {ledger["requests", start_ms] for ledger in ledgers.values()} == {(4, 1)}
