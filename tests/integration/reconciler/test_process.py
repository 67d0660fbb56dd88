"""Real reconciler processes: killed, doubled, and without their stores for a while."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path

import pytest

from cli.embedded import EmbeddedPostgres
from core.admission.program import compile_program
from core.db.migrate import migrate
from core.period import billing_period
from core.policy import Action, PeriodKind, Quota
from tests.integration.reconciler.parts import METERS, parts
from tests.support import Process, free_port, run_module, wait_until
from tests.support.scripts import Scripts, plan_of

PLAN = plan_of(Quota("monthly", "requests", 300, PeriodKind.BILLING, Action.OVERAGE))
PROGRAM = compile_program(PLAN, {"requests": 1, "credits": 25}, METERS, {})

CONFIG = """
redis: {url: "${TALLYGATE_REDIS_URL}"}
postgres: {url: "${TALLYGATE_POSTGRES_URL}", timeout: 1s}
reconciler: {flush_interval: 10ms, lease: 1s}
log: {format: json}
meters:
  credits: {unit: credit, decimals: 2}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def start(config: Path, redis_url: str, postgres_url: str) -> Process:
    process = run_module(
        "reconciler",
        "--config",
        str(config),
        env={
            "TALLYGATE_REDIS_URL": redis_url,
            "TALLYGATE_POSTGRES_URL": postgres_url,
            "TALLYGATE_METRICS_DIR": str(config.parent / "metrics"),
        },
    )
    process.wait_for_output("started")
    return process


class Load(threading.Thread):
    """Counts on some subjects until told to stop; `counted` by subject."""

    def __init__(self, url: str, subjects: int) -> None:
        super().__init__()
        self.scripts = Scripts(url, controlled=False)
        self.counted = {f"s{number}": 0 for number in range(subjects)}
        for subject in self.counted:
            self.scripts.seed(subject)
        now = self.scripts.redis.time()
        self.scripts.now_us = now[0] * 1_000_000 + now[1]
        self.span = billing_period(0, 1, self.scripts.now_ms)
        self.stop = threading.Event()

    def run(self) -> None:
        while not self.stop.is_set():
            for subject in self.counted:
                if self.scripts.admit(subject, PROGRAM, span=self.span).admitted:
                    self.counted[subject] += 1


@contextmanager
def load(url: str, subjects: int = 12) -> Iterator[Load]:
    thread = Load(url, subjects)
    thread.start()
    try:
        yield thread
    finally:
        thread.stop.set()
        thread.join()


def dirty(thread: Load) -> int:
    return int(thread.scripts.redis.zcard(thread.scripts.keyspace.dirty(0)))


def clean(thread: Load) -> bool:
    return dirty(thread) == 0


def total(thread: Load) -> int:
    return sum(thread.counted.values())


def assert_exact(thread: Load, redis_url: str, postgres_url: str) -> None:
    async def check() -> None:
        async with parts(redis_url, postgres_url) as p:
            for subject, count in thread.counted.items():
                ledger = await p.ledger(subject)
                assert ledger == await p.live(subject)
                start_ms = thread.span[0]
                assert ledger["requests", start_ms] == (count, max(0, count - 300))
                assert ledger["credits", start_ms] == (Decimal(count * 25) / 100, 0)

    asyncio.run(check())


def test_killed_under_load_again_and_again(config: Path, valkey: str, database: str) -> None:
    with load(valkey) as thread:
        for _ in range(3):
            with start(config, valkey, database) as process:
                before = total(thread)
                wait_until(lambda at=before: total(thread) > at + 150, what="some load")
                process.kill()
    with start(config, valkey, database) as process:
        wait_until(lambda: clean(thread), what="the last flush")
        assert process.terminate() == 0
    assert_exact(thread, valkey, database)


def test_two_processes_at_once(config: Path, valkey: str, database: str) -> None:
    with start(config, valkey, database) as one, start(config, valkey, database) as other:
        with load(valkey) as thread:
            wait_until(lambda: total(thread) > 600, what="some load")
        wait_until(lambda: clean(thread), what="the last flush")
        assert one.terminate() == 0
        assert other.terminate() == 0
    assert "flush_failed" not in one.output + other.output
    assert_exact(thread, valkey, database)


def test_a_clean_stop_flushes_what_is_left(config: Path, valkey: str, database: str) -> None:
    config.write_text(CONFIG.replace("10ms", "1m"))
    with start(config, valkey, database) as process:
        with load(valkey, 3) as thread:
            wait_until(lambda: total(thread) > 10, what="some load")
        assert process.terminate() == 0
    assert clean(thread)
    assert_exact(thread, valkey, database)


def test_postgres_away_and_back(config: Path, valkey: str, server_dir: Path) -> None:
    with EmbeddedPostgres(server_dir / "p", port=free_port(), fast=True) as postgres:
        asyncio.run(migrate(postgres.url))
        with start(config, valkey, postgres.url) as process:
            with load(valkey) as thread:
                wait_until(lambda: total(thread) > 100, what="some load")
                postgres.kill()
                process.wait_for_output("flush_postponed")
                before = total(thread)
                wait_until(lambda: total(thread) > before + 100, what="counting goes on")
                postgres.start()
            wait_until(lambda: clean(thread), 20, what="the catch-up")
            assert process.terminate() == 0
        assert_exact(thread, valkey, postgres.url)
