"""From the live state into the ledger: what is stored, in which order, and what survives a crash.

The scripts run with a clock that the test sets; stores and flusher are real.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import pytest

from cli.embedded import EmbeddedValkey
from core.admission.program import Program, compile_program
from core.clock import from_datetime
from core.errors import StoreUnavailableError
from core.period import DAY_MS, HOUR_MS, billing_period
from core.policy import Action, PeriodKind, Quota
from reconciler.flush import FlushResult
from reconciler.rows import columns
from tests.integration.reconciler.parts import METERS, Parts, parts
from tests.support import free_port
from tests.support.scripts import Scripts, plan_of

START_MS = from_datetime(datetime(2026, 6, 14, 11, 20, tzinfo=UTC))
SPAN = billing_period(0, 1, START_MS)
PLAN = plan_of(Quota("monthly", "requests", 5, PeriodKind.BILLING, Action.OVERAGE))


def program(**costs: int) -> Program:
    return compile_program(PLAN, {"requests": 1, **costs}, METERS, {})


@pytest.fixture
def scripts(valkey: str) -> Scripts:
    scripts = Scripts(valkey)
    scripts.at(START_MS * 1000)
    return scripts


def spend(scripts: Scripts, subject: str, times: int = 1, **costs: int) -> None:
    if not scripts.state(subject):
        scripts.seed(subject)
    for _ in range(times):
        assert scripts.admit(subject, program(**costs)).admitted


def run(
    redis_url: str, postgres_url: str, check: Callable[[Parts], Awaitable[None]], **options: Any
) -> None:
    async def main() -> None:
        async with parts(redis_url, postgres_url, **options) as found:
            await check(found)

    asyncio.run(main())


def test_the_ledger_gets_what_redis_has(scripts: Scripts, valkey: str, database: str) -> None:
    async def check(p: Parts) -> None:
        for number in range(25):
            spend(scripts, f"s{number}", number % 7 + 1, credits=number * 101)
        result = await p.flusher.flush_all()
        assert (result.stored, result.clean) == (25, 25)
        for number in range(25):
            subject = f"s{number}"
            assert await p.ledger(subject) == await p.live(subject)
        assert scripts.redis.zcard(p.keyspace.dirty(0)) == 0
        ledger = await p.ledger("s6")
        assert ledger["requests", SPAN[0]] == (7, 2)  # two of seven are overage
        assert ledger["credits", SPAN[0]] == (Decimal("42.42"), 0)
        assert await p.flusher.lag() == (0, 0)

    run(valkey, database, check, batch=10)


def test_flushing_again_changes_nothing(scripts: Scripts, valkey: str, database: str) -> None:
    async def check(p: Parts) -> None:
        spend(scripts, "s", 4)
        await p.flusher.flush_all()
        before = await p.ledger("s"), await p.version("s"), scripts.state("s")
        assert (await p.flusher.flush_all()).stored == 0
        scripts.redis.zadd(p.keyspace.dirty(0), {p.keyspace.state("s"): 1})
        result = await p.flusher.flush_all()
        assert (result.stored, result.clean) == (1, 1)
        assert (await p.ledger("s"), await p.version("s"), scripts.state("s")) == before

    run(valkey, database, check)


def test_closed_hours_and_periods_are_stored_then_dropped(
    scripts: Scripts, valkey: str, database: str
) -> None:
    async def check(p: Parts) -> None:
        spend(scripts, "s", 2)
        scripts.at((START_MS + HOUR_MS) * 1000)
        spend(scripts, "s", 3)
        scripts.at((START_MS + 30 * DAY_MS) * 1000)
        spend(scripts, "s", 7)
        live = await p.live("s")
        closed = [name for name in scripts.state("s") if name[:3] in ("ch:", "cp:")]
        assert len(closed) == 3
        await p.flusher.flush_all()
        assert await p.ledger("s") == live
        assert not [name for name in scripts.state("s") if name[:3] in ("ch:", "cp:")]
        july = billing_period(0, 1, START_MS + 30 * DAY_MS)[0]
        ledger = await p.ledger("s")
        assert ledger["requests", SPAN[0]] == (5, 0)
        assert ledger["requests", july] == (7, 2)
        # the next flush leaves the closed ones alone
        spend(scripts, "s")
        await p.flusher.flush_all()
        assert (await p.ledger("s"))["requests", SPAN[0]] == (5, 0)

    run(valkey, database, check)


def test_months_of_closed_hours_fit_through(scripts: Scripts, valkey: str, database: str) -> None:
    async def check(p: Parts) -> None:
        spend(scripts, "s")
        hour = SPAN[0] - SPAN[0] % HOUR_MS
        fields = {f"ch:requests:{SPAN[0]}:{hour - n * HOUR_MS}": "1 0" for n in range(1, 9_001)}
        scripts.redis.hset(p.keyspace.state("s"), mapping=fields)
        result = await p.flusher.flush_all()
        assert (result.stored, result.clean) == (1, 1)
        assert len(await p.ledger("s")) == 9_002
        assert not [name for name in scripts.state("s") if name.startswith("ch:")]

    run(valkey, database, check)


def test_an_older_state_stored_late_changes_nothing(
    scripts: Scripts, valkey: str, database: str
) -> None:
    async def check(p: Parts) -> None:
        spend(scripts, "s", 2)
        old = await p.flusher._read([p.keyspace.state("s")], FlushResult())
        spend(scripts, "s", 3)
        await p.flusher.flush_all()
        newer = await p.ledger("s"), await p.version("s")
        result = FlushResult()
        assert await p.flusher._commit(old, result) == []
        assert (result.behind, result.overtaken) == ([], [])
        assert (await p.ledger("s"), await p.version("s")) == newer

    run(valkey, database, check)


def test_a_change_during_the_flush_stays_listed(
    scripts: Scripts, valkey: str, database: str
) -> None:
    async def check(p: Parts) -> None:
        key = p.keyspace.state("s")
        spend(scripts, "s", 2)
        scripts.at((START_MS + HOUR_MS) * 1000)
        spend(scripts, "s")
        result = FlushResult()
        snapshots = await p.flusher._read([key], result)
        accepted = await p.flusher._commit(snapshots, result)
        spend(scripts, "s")
        assert await p.flusher._confirm(accepted, [key], snapshots, START_MS + 77) == 0
        assert scripts.redis.zscore(p.keyspace.dirty(0), key) == START_MS + 77
        assert not [name for name in scripts.state("s") if name.startswith("ch:")]
        await p.flusher.flush_all()
        assert (await p.ledger("s"))["requests", SPAN[0]] == (4, 0)
        assert await p.ledger("s") == await p.live("s") | {
            ("requests", SPAN[0], START_MS - START_MS % HOUR_MS): (2, 0)
        }

    run(valkey, database, check)


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_crash_after_a_step_loses_and_repeats_nothing(
    scripts: Scripts, valkey: str, database: str, step: int
) -> None:
    async def crash(p: Parts) -> None:
        keys = [key for key, _ in await p.store.oldest(p.keyspace.dirty(0), 10)]
        if step > 1:
            snapshots = await p.flusher._read(keys, FlushResult())
            if step > 2:
                assert len(await p.flusher._commit(snapshots, FlushResult())) == 3

    async def check(p: Parts) -> None:
        assert (await p.flusher.lag())[0] == 3
        await p.flusher.flush_all()
        for subject in "abc":
            assert (await p.ledger(subject))["requests", SPAN[0]][0] == 4
            assert not [name for name in scripts.state(subject) if name.startswith("ch:")]
        assert await p.flusher.lag() == (0, 0)

    for subject in "abc":
        spend(scripts, subject, 2)
    scripts.at((START_MS + HOUR_MS) * 1000)
    for subject in "abc":
        spend(scripts, subject)
    run(valkey, database, crash)
    for subject in "abc":
        spend(scripts, subject)
    run(valkey, database, check)


def _cut_sessions(postgres_url: str) -> None:
    """Ends every other session of the database, in a thread: the caller's loop must not run on."""

    async def cut() -> None:
        connection = await asyncpg.connect(postgres_url)
        await connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        await connection.close()

    thread = threading.Thread(target=lambda: asyncio.run(cut()))
    thread.start()
    thread.join()


def test_postgres_lost_inside_the_transaction(
    scripts: Scripts, valkey: str, database: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def check(p: Parts) -> None:
        spend(scripts, "s", 3)

        def cut_then(*given: Any) -> Any:  # after accept_states, before store_periods
            _cut_sessions(database)
            return columns(*given)

        with monkeypatch.context() as patch:
            patch.setattr("reconciler.flush.columns", cut_then)
            with pytest.raises(StoreUnavailableError):
                await p.flusher.flush_all()
        assert await p.database.fetch("read_epochs", ["s"]) == []  # rolled back as a whole
        assert (await p.flusher.lag())[0] == 1
        assert (await p.flusher.flush_all()).clean == 1
        assert await p.ledger("s") == await p.live("s")

    run(valkey, database, check)


def test_redis_killed_before_the_acknowledgement(
    database: str, server_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with EmbeddedValkey(server_dir / "v", port=free_port(), appendfsync="always") as server:
        scripts = Scripts(server.url)
        scripts.at(START_MS * 1000)
        spend(scripts, "s", 3)

        async def check(p: Parts) -> None:
            commit = p.flusher._commit

            async def commit_then_kill(*given: Any) -> Any:
                accepted = await commit(*given)
                server.kill()
                return accepted

            with monkeypatch.context() as patch:
                patch.setattr(p.flusher, "_commit", commit_then_kill)
                with pytest.raises(StoreUnavailableError):
                    await p.flusher.flush_all()
            stored = await p.ledger("s")
            server.start()
            assert await p.live("s") == stored
            assert (await p.flusher.lag())[0] == 1
            assert (await p.flusher.flush_all()).clean == 1
            assert await p.ledger("s") == stored

        run(server.url, database, check)


def test_interleaved_flushers_agree(scripts: Scripts, valkey: str, database: str) -> None:
    """Each step of one between the steps of the other, with changes in between."""

    async def check(p: Parts) -> None:
        key = p.keyspace.state("s")
        spend(scripts, "s")
        first = await p.flusher._read([key], FlushResult())
        spend(scripts, "s")
        async with parts(valkey, database) as other:
            second = await other.flusher._read([key], FlushResult())
            stored_second = await other.flusher._commit(second, FlushResult())
            stored_first = await p.flusher._commit(first, FlushResult())
            assert (len(stored_second), len(stored_first)) == (1, 0)
            await p.flusher._confirm(stored_first, [key], first, START_MS)
            assert scripts.redis.zcard(p.keyspace.dirty(0)) == 1
            assert await other.flusher._confirm(stored_second, [key], second, START_MS) == 1
        assert await p.ledger("s") == await p.live("s")

    run(valkey, database, check)
