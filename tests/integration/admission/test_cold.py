"""Cold subjects under concurrency: several processes, a wiped Redis, no Postgres."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pytest

from core import clock
from core.clock import to_datetime
from core.errors import StoreUnavailableError
from core.meters import MeterRegistry
from core.period import HOUR_MS, billing_period
from core.policy import PeriodKind, Quota
from reconciler.flush import Flusher
from tests.integration.admission.stack import METERS, Stack, admitted, stack
from tests.support.ledger import packed
from tests.support.processes import ROOT
from tests.support.scripts import Scripts, plan_of

QUOTA = 100
PLAN = plan_of(
    Quota("monthly", "requests", QUOTA, PeriodKind.BILLING),
    Quota("daily", "requests", QUOTA * 10, PeriodKind.DAY),
)


async def used(s: Stack, subject: str, total: int) -> None:
    """Puts a total into the ledger, as an earlier flush did."""
    now_ms = await s.store.now_ms()
    start, end = map(to_datetime, billing_period(0, 1, now_ms))
    hour = to_datetime(now_ms - now_ms % HOUR_MS)
    amount = [Decimal(total)], [Decimal(0)], [1], [total]
    await s.database.fetch("accept_states", [subject], "1", str(total))
    row = [subject], ["requests"], [start]
    await s.database.execute("store_periods", *packed(*row, [end], *amount))
    await s.database.execute("store_hours", *packed(*row, [hour], *amount))


@contextmanager
def hitters(number: int, **given: Any) -> Iterator[list[subprocess.Popen[str]]]:
    with ExitStack() as exits:
        found = []
        for _ in range(number):
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.integration.admission.hitter", json.dumps(given)],
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            exits.callback(process.wait)
            exits.callback(process.kill)
            found.append(process)
        for process in found:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        yield found


def results(processes: list[subprocess.Popen[str]]) -> list[dict[str, int]]:
    return [json.loads(process.communicate(timeout=60)[0]) for process in processes]


def test_cold_in_three_processes_at_once(valkey: str, database: str) -> None:
    subjects = {"a": 0, "b": 37, "c": 99, "d": 100, "e": 250}

    async def prepare() -> None:
        async with stack(valkey, database, PLAN) as s:
            for subject, total in subjects.items():
                if total:
                    await used(s, subject, total)

    async def check() -> None:
        async with stack(valkey, database, PLAN) as s:
            await Flusher(s.store, s.database, s.keyspace, MeterRegistry(METERS)).flush_all()
            for subject, before in subjects.items():
                if before < QUOTA:
                    rows = await s.database.fetch("ledger_of_subject", subject, 10)
                    assert [row["total"] for row in rows] == [QUOTA], subject

    asyncio.run(prepare())
    with hitters(
        3, redis=valkey, postgres=database, subjects=list(subjects), times=60, quota=QUOTA
    ) as processes:
        for process in processes:
            assert process.stdin is not None
            process.stdin.write("\n")
            process.stdin.flush()
        found = results(processes)
    for subject, before in subjects.items():
        total = sum(result[subject] for result in found)
        assert total == max(0, QUOTA - before), subject
    asyncio.run(check())


def test_wiped_again_and_again_while_in_use(valkey: str, database: str) -> None:
    """Unflushed counts are lost with the wipe, flushed ones never: the sum stays within both."""
    scripts = Scripts(valkey)

    async def main() -> None:
        async with stack(valkey, database, PLAN) as one, stack(valkey, database, PLAN) as two:
            flusher = Flusher(one.store, one.database, one.keyspace, MeterRegistry(METERS))
            admissions = one.admission(PLAN), two.admission(PLAN)
            total = 0
            for _ in range(12):
                found = await asyncio.gather(
                    one.hit(admissions[0], "s", 4),
                    two.hit(admissions[1], "s", 4),
                    flusher.flush_all(),
                )
                total += admitted(found[0]) + admitted(found[1])
                # a state that lost the race for its epoch is told it, and flushed the next time
                for _ in range(3):
                    result = await flusher.flush_all()
                    assert result.behind == []
                assert (await flusher.lag())[0] == 0
                rows = await one.database.fetch("ledger_of_subject", "s", 10)
                assert [row["total"] for row in rows] == [total]
                scripts.redis.flushdb()
            assert total == 96
            assert admitted(await one.hit(admissions[0], "s", 50)) == QUOTA - 96

    asyncio.run(main())


class Gate:
    """A TCP door in front of a server: closed, it cuts what is open and takes nothing new."""

    def __init__(self, url: str) -> None:
        self._target = urlsplit(url)
        self._open: set[asyncio.StreamWriter] = set()
        self.closed = False

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        login, _, _ = self._target.netloc.rpartition("@")
        netloc = f"{login}@127.0.0.1:{port}" if login else f"127.0.0.1:{port}"
        return urlunsplit(self._target._replace(netloc=netloc))

    def close(self) -> None:
        self.closed = True
        for writer in self._open:
            writer.transport.abort()

    async def stop(self) -> None:
        self.close()
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.closed:
            writer.transport.abort()
            return
        far = await asyncio.open_connection(self._target.hostname, self._target.port)
        self._open |= {writer, far[1]}
        await asyncio.gather(
            self._copy(reader, far[1]), self._copy(far[0], writer), return_exceptions=True
        )

    @staticmethod
    async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
        finally:
            writer.transport.abort()


def test_cold_without_postgres_nothing_is_admitted(valkey: str, database: str) -> None:
    scripts = Scripts(valkey, controlled=False)

    async def main() -> None:
        gate = Gate(database)
        url = await gate.start()
        async with stack(valkey, url, PLAN) as s:
            await used(s, "s", 95)
            admission = s.admission(PLAN)
            assert admitted(await s.hit(admission, "warm", 3)) == 3
            gate.close()
            found = await asyncio.gather(
                *(s.hit(admission, "s", 1) for _ in range(20)), return_exceptions=True
            )
            assert all(isinstance(error, StoreUnavailableError) for error in found)
            assert scripts.state("s") == {}
            # those with a live state do not need Postgres
            assert admitted(await s.hit(admission, "warm", 3)) == 3
            gate.closed = False
            assert admitted(await s.hit(admission, "s", 20)) == 5
            assert s.seeder.stats.failures >= 1
        await gate.stop()

    asyncio.run(main())


def test_one_run_seeds_all_that_wait(valkey: str, database: str) -> None:
    async def main() -> None:
        async with stack(valkey, database, PLAN) as s:
            admission = s.admission(PLAN)
            names = [f"s{number}" for number in range(450)]
            found = await asyncio.gather(*(s.hit(admission, name, 2) for name in names))
            assert sum(map(admitted, found)) == 900
            assert s.seeder.stats.cold == 450
            assert s.seeder.stats.runs <= 8
            rows = await s.database.fetch("read_epochs", names)
            assert {row["epoch"] for row in rows} == {1}

    asyncio.run(main())


def test_a_client_that_leaves_does_not_cancel_the_run(valkey: str, database: str) -> None:
    async def main() -> None:
        async with stack(valkey, database, PLAN) as s:
            key = s.keyspace.state("s")
            waiting = [
                asyncio.create_task(
                    s.seeder.seed("s", key, PLAN.limits, clock.now_ms(), s.batcher.run)
                )
                for _ in range(3)
            ]
            await asyncio.sleep(0)
            waiting[0].cancel()
            done = await asyncio.gather(*waiting, return_exceptions=True)
            assert isinstance(done[0], asyncio.CancelledError)
            assert done[1:] == [None, None]
            assert (await s.store.hgetall_many([key]))[0]["epoch"] == "1"

    asyncio.run(main())


def test_closing_the_seeder_tells_whoever_waits(valkey: str, database: str) -> None:
    async def main() -> None:
        async with stack(valkey, database, PLAN) as s:
            waiting = [
                asyncio.create_task(
                    s.seeder.seed(
                        f"s{n}",
                        s.keyspace.state(f"s{n}"),
                        PLAN.limits,
                        clock.now_ms(),
                        s.batcher.run,
                    )
                )
                for n in range(300)
            ]
            await asyncio.sleep(0)
            await s.seeder.close()
            done = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 5)
            assert all(isinstance(error, StoreUnavailableError) for error in done)

    asyncio.run(main())


pytestmark = pytest.mark.timeout(120)
