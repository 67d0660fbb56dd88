"""A reconciler killed at every step, and the one after it: the ledger is Redis, to the unit."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from core import clock
from core.admission.program import compile_program
from core.period import DAY_MS, HOUR_MS, billing_period
from core.policy import Action, PeriodKind, Quota
from tests.integration.reconciler.parts import METERS, Ledger, Parts, parts
from tests.integration.reconciler.test_process import CONFIG
from tests.support import run_module, wait_until
from tests.support.scripts import Scripts, plan_of

PLAN = plan_of(Quota("monthly", "requests", 10, PeriodKind.BILLING, Action.OVERAGE))
PROGRAM = compile_program(PLAN, {"requests": 1, "credits": 25}, METERS, {})
SUBJECTS = [f"s{number}" for number in range(25)]
# Batches of 4: the third of something is in the middle of a run.
FAILPOINTS = [
    "flush.listed",
    "flush.read",
    "flush.stored",
    "flush.stored:3",
    "flush.committed",
    "flush.acknowledged",
    "events.read",
    "events.stored",
    "events.deleted",
]


def count(scripts: Scripts, before_ms: int) -> None:
    """Hours and a period that are closed, and some that are not; overage and thresholds."""
    for after in (0, HOUR_MS, 31 * DAY_MS):
        scripts.at((before_ms + after) * 1000)
        for number, subject in enumerate(SUBJECTS):
            for _ in range(number % 3 + 4):
                assert scripts.admit(subject, PROGRAM).admitted


def both(redis_url: str, postgres_url: str) -> list[tuple[Ledger, Ledger]]:
    """Of each subject what is live and what the ledger has."""

    async def read(p: Parts) -> list[tuple[Ledger, Ledger]]:
        return [(await p.live(subject), await p.ledger(subject)) for subject in SUBJECTS]

    async def main() -> list[tuple[Ledger, Ledger]]:
        async with parts(redis_url, postgres_url) as p:
            return await read(p)

    return asyncio.run(main())


def events(postgres_url: str, redis_url: str) -> list[tuple[str, str, int, int, int]]:
    async def main() -> list[tuple[str, str, int, int, int]]:
        async with parts(redis_url, postgres_url) as p:
            return [
                (
                    *(subject, row["kind"], row["threshold"]),
                    *(clock.from_datetime(row["period_start"]), int(row["usage"])),
                )
                for subject in SUBJECTS
                for row in await p.database.fetch(
                    "events_of_subject", subject, clock.to_datetime(0)
                )
            ]

    return asyncio.run(main())


@pytest.mark.parametrize("failpoint", FAILPOINTS)
def test_killed_at_a_step(tmp_path: Path, valkey: str, database: str, failpoint: str) -> None:
    scripts = Scripts(valkey)
    start_ms = billing_period(0, 1, clock.now_ms())[0] - 20 * DAY_MS
    scripts.at(start_ms * 1000)
    for subject in SUBJECTS:
        scripts.seed(subject)
    count(scripts, start_ms)
    keyspace = scripts.keyspace
    live = [row[0] for row in both(valkey, database)]
    told = sorted(
        (
            event["key"].rpartition(":")[2],
            event["kind"],
            min(100, int(event["threshold"])),
            int(event["start"]),
            int(event["used"]),
        )
        for event in scripts.events()
    )
    assert len(set(told)) == len(told) > 40

    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("10ms", "10ms, batch: 4"))
    environment = {
        "TALLYGATE_REDIS_URL": valkey,
        "TALLYGATE_POSTGRES_URL": database,
        "TALLYGATE_METRICS_DIR": str(tmp_path / "metrics"),
    }
    arguments = ("reconciler", "--config", str(config))
    with run_module(*arguments, env=environment | {"TALLYGATE_FAILPOINTS": failpoint}) as process:
        assert process.wait() == -signal.SIGKILL
    left = scripts.redis.zcard(keyspace.dirty(0)) + scripts.redis.xlen(keyspace.events(0))
    assert left > 0 or failpoint == "events.deleted"  # the crash did come in between
    with run_module(*arguments, env=environment) as process:
        process.wait_for_output("started")
        wait_until(
            lambda: (
                scripts.redis.zcard(keyspace.dirty(0))
                == scripts.redis.xlen(keyspace.events(0))
                == 0
            ),
            20,
            "all that was left",
        )
        assert process.terminate() == 0
    assert "_failed" not in process.output
    # closed hours and periods are in the ledger alone by now: compared with what was live before
    assert [row[1] for row in both(valkey, database)] == live
    assert sorted(events(database, valkey)) == told
