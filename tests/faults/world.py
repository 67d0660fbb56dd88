"""The processes of the rounds: started once, hit by faults, healed at the end of each round."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import asyncpg
import psutil
import redis

from cli.embedded import EmbeddedPostgres
from core import clock
from core.db.migrate import migrate
from core.keyspace import PREFIX, Keyspace
from reconciler.snapshot import read_state
from tests.faults.history import Event, Ledger, Loss, Observation, Total
from tests.faults.rules import RESERVATION_S, Switches, config
from tests.support import free_port, wait_until
from tests.support.load import Load
from tests.support.processes import Process
from tests.support.servers import server_directory
from tests.support.stack import Stack, start_stack

GATEWAYS = 2
WORKERS = 2
RECONCILERS = 2
# Generous: they decide nothing but how long a broken round takes to say so.
DEADLINE_S = 60.0

_KEYS = Keyspace()
# Errors that a fault brings: of asyncpg, when a stalled Postgres ends no transaction; of ours,
# when Redis lost what was not flushed.
_EXPECTED = ("Resetting connection with an active transaction", "state_lost")


class World:
    """Made by `start_world`. Faults act on it from the main thread, which starts all processes."""

    def __init__(
        self, stack: Stack, postgres: EmbeddedPostgres, load: Load, folder: Path, switches: Switches
    ) -> None:
        self.stack = stack
        self.postgres = postgres
        self.load = load
        self.folder = folder
        self.switches = switches
        self.redis: redis.Redis[bytes] = redis.Redis.from_url(
            stack.valkey.url, socket_timeout=5, socket_connect_timeout=5
        )
        self.losses: list[Loss] = []
        self.observations: list[Observation] = []
        self.subjects: list[str] = []
        self._connection: asyncpg.Connection[Any] | None = None
        self._stopped: dict[str, list[psutil.Process]] = {}
        self._orphans: list[psutil.Process] = []
        self._killed: set[int] = set()
        self._log_at: dict[Path, int] = {}
        self._ended_logs: list[tuple[str, str]] = []
        self._journal_at = 0

    # Processes

    def processes(self) -> dict[str, Process]:
        """Everything but the stores, by a name that lasts."""
        named = {f"gateway-{number}": it for number, it in enumerate(self.stack.gateways)}
        named |= {f"reconciler-{number}": it for number, it in enumerate(self.stack.reconcilers)}
        assert self.stack.upstream is not None
        return named | {"upstream": self.stack.upstream}

    def workers(self, gateway: int) -> list[psutil.Process]:
        """Live workers of a gateway."""
        try:
            return psutil.Process(self.stack.gateways[gateway].pid).children()
        except psutil.NoSuchProcess:
            return []

    def family(self, name: str) -> list[psutil.Process]:
        """The processes that are meant by a name: stores, gateways and their workers."""
        if name == "valkey":
            child = self.stack.valkey.process
        elif name == "postgres":
            child = self.postgres.process
        else:
            child = self.processes()[name].popen
        if child is None or child.poll() is not None:
            return []
        try:
            parent = psutil.Process(child.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def running(self, name: str) -> bool:
        return bool(self.family(name)) and name not in self._stopped

    def stop(self, name: str, members: Sequence[psutil.Process] | None = None) -> int:
        """SIGSTOP until `resume`; how many processes."""
        found = self.family(name) if members is None else list(members)
        self._stopped.setdefault(name, []).extend(found)
        for member in found:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.suspend()
        return len(found)

    def resume(self, name: str) -> None:
        """SIGCONT to what `stop` stopped under this name; harmless when that is nothing."""
        for member in self._stopped.pop(name, []):
            with contextlib.suppress(psutil.NoSuchProcess):
                member.resume()

    def kill(self, name: str) -> None:
        """SIGKILL, and wait; Postgres gets what leaves no orphans, and as little behind."""
        self.resume(name)
        if name == "valkey":
            self.stack.valkey.kill()
        elif name == "postgres":
            self.postgres.kill()
        else:
            process = self.processes()[name]
            if name.startswith("gateway"):
                self._orphans += self.workers(int(name.split("-")[1]))
            self._killed.add(process.pid)
            process.kill()

    def start(self, name: str) -> None:
        """Starts what has ended, where it was; harmless when it runs."""
        if self.family(name):
            return
        if name == "valkey":
            self.stack.valkey.restart()
        elif name == "postgres":
            self.postgres.restart()
        elif name == "upstream":
            self._note_log(name)
            self.stack.start_upstream()
        elif name.startswith("gateway"):
            # A port can be taken again once the workers of the old gateway have drained.
            self._reap_orphans()
            self._note_log(name)
            self.stack.start_gateway(WORKERS, int(name.split("-")[1]))
        else:
            self._note_log(name)
            self.stack.start_reconciler(int(name.split("-")[1]))

    def _reap_orphans(self) -> None:
        for orphan in self._orphans:
            with contextlib.suppress(psutil.NoSuchProcess):
                orphan.resume()
        _, alive = psutil.wait_procs(self._orphans, timeout=DEADLINE_S)
        for orphan in alive:
            orphan.kill()
        self._orphans.clear()
        assert not alive, f"workers {alive} outlived their gateway by {DEADLINE_S} s"

    def died(self) -> Iterator[str]:
        """Processes that ended and that no fault ended."""
        for name, process in self.processes().items():
            status = process.popen.poll()
            if status is not None and process.pid not in self._killed:
                self._killed.add(process.pid)
                yield f"{name} ended by itself, status {status}: {process.output[-2000:]}"

    def heal(self) -> None:
        """Everything runs again and both gateways are ready."""
        for name in list(self._stopped):
            self.resume(name)
        for name in ("valkey", "postgres", *self.processes()):
            self.start(name)
        for number, process in enumerate(self.stack.gateways):
            process.wait_for_http(self.stack.url("/-/readyz", number), DEADLINE_S)

    # Logs

    def _note_log(self, name: str) -> None:
        """Keeps the output of a process that is about to be replaced."""
        process = self.processes()[name]
        self._ended_logs.append((name, process.output[self._log_at.get(process.log, 0) :]))

    def logs(self) -> dict[str, str]:
        """The output of each process since the last call of `forget`."""
        found: dict[str, str] = {}
        now = [(n, p.output[self._log_at.get(p.log, 0) :]) for n, p in self.processes().items()]
        for name, text in [*self._ended_logs, *now]:
            found[name] = found.get(name, "") + text
        return found

    def server_logs(self) -> dict[str, str]:
        """The last of what the stores logged."""
        servers = self.stack.valkey, self.postgres
        return {it.title.lower(): it.log.read_text(errors="replace")[-20_000:] for it in servers}

    def errors(self) -> Iterator[str]:
        """What the processes logged as errors, each kind once."""
        seen: set[tuple[str, str]] = set()
        for name, text in self.logs().items():
            for line in text.splitlines():
                entry: dict[str, Any] = {"event": line, "level": "error"}
                with contextlib.suppress(ValueError):
                    entry = json.loads(line)
                if entry.get("level") not in ("error", "critical"):
                    continue
                if entry["event"] == "worker_died" and entry.get("status") == -signal.SIGKILL:
                    continue
                if str(entry["event"]).startswith(_EXPECTED):
                    continue
                if (name, entry["event"]) not in seen:
                    seen.add((name, entry["event"]))
                    yield f"{name} logged: {line[:1500]}"

    def forget(self, subjects: Sequence[str]) -> None:
        """Begins a round of these subscriptions."""
        self._log_at = {p.log: len(p.output) for p in self.processes().values()}
        self._ended_logs.clear()
        self.losses, self.observations, self.subjects = [], [], list(subjects)
        assert self.stack.upstream_journal is not None
        self._journal_at = self.stack.upstream_journal.stat().st_size

    # What was counted

    def journal(self) -> list[tuple[str, int]]:
        """What the upstream served in this round: request id and status."""
        assert self.stack.upstream_journal is not None
        with self.stack.upstream_journal.open("rb") as file:
            file.seek(self._journal_at)
            rows = (line.split() for line in file.read().decode().splitlines())
            return [(name, int(status)) for name, status in rows]

    def sql(self, query: str, *args: Any) -> list[Any]:
        """Rows of a query; a connection that was cut meanwhile is made again."""
        try:
            return list(self.stack.run(self._fetch(query, *args)))
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            return list(self.stack.run(self._fetch(query, *args)))

    async def _fetch(self, query: str, *args: Any) -> list[Any]:
        try:
            if self._connection is None or self._connection.is_closed():
                self._connection = await asyncpg.connect(self.postgres.url, timeout=5)
            return list(await self._connection.fetch(query, *args, timeout=5))
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
            if self._connection is not None:
                self._connection.terminate()
            self._connection = None
            raise

    def observe(self) -> Ledger:
        """The ledger of this round's subjects; the last one observed while Postgres is away."""
        start = time.monotonic()
        if self.running("postgres"):
            with contextlib.suppress(OSError, asyncpg.PostgresError, asyncpg.InterfaceError):
                ledger = self.ledger()
                self.observations.append(Observation(start, time.monotonic(), ledger))
        return self.observations[-1].ledger if self.observations else Ledger()

    def ledger(self) -> Ledger:
        found = Ledger()
        rows = self.sql(_LEDGER, self.subjects)
        for subject, meter, start, hour, total, overage in rows:
            row, at = Total(total, overage), clock.from_datetime(start)
            if hour is None:
                found.periods[subject, meter, at] = row
            else:
                found.hours[subject, meter, at, clock.from_datetime(hour)] = row
        return found

    def live(self) -> Ledger:
        """The rows that the states in Redis stand for; when data were lost, without those that no
        request would take: not compared with the ledger since the server was started."""
        found = Ledger()
        run = str(self.redis.info("server")["run_id"])
        for subject in self.subjects:
            key = _KEYS.state(subject)
            fields = self.redis.hgetall(key)
            if not fields or (self.losses and not run.startswith(fields[b"run"].decode())):
                continue
            state = read_state(key, {n.decode(): text.decode() for n, text in fields.items()})
            for period in state.periods:
                row = Total(*map(Decimal, (period.total, period.overage)))
                found.periods[subject, period.meter, period.start_ms] = row
            for hour in state.hours:
                row = Total(*map(Decimal, (hour.total, hour.overage)))
                name = subject, hour.meter, hour.period_start_ms, hour.hour_start_ms
                found.hours[name] = row
        return found

    def events(self) -> list[Event]:
        rows = self.sql(_EVENTS, self.subjects)
        return [Event(*row[:5], clock.from_datetime(row[5]), row[6]) for row in rows]

    def left(self) -> str:
        """What is not carried over yet, empty when everything is."""
        parts: list[str] = []
        dirty = self.redis.zrange(_KEYS.dirty(0), 0, -1)
        if dirty:
            parts.append(f"changed subjects {[key.decode() for key in dirty[:5]]}")
        parts += [
            f"{length} entries of {key.decode()}"
            for key in self.redis.scan_iter(match=f"{PREFIX}:*", _type="stream")
            if (length := self.redis.xlen(key))
        ]
        soon = (time.time() + 10 * RESERVATION_S) * 1000  # later are those that have expired
        due = self.redis.zcount(_KEYS.due(0), "-inf", soon)
        if self.switches.reservations and due:
            parts.append(f"{due} reservations")
        if self.switches.spool and (spooled := self.spooled()):
            parts.append(f"spools {spooled}")
        return "; ".join(parts)

    def spooled(self) -> list[str]:
        """Spools that hold what is not counted yet: files that are not empty."""
        spool = self.folder / "spool"
        return [str(p.name) for p in spool.rglob("*") if p.is_file() and p.stat().st_size]

    def drain(self) -> str:
        """Waits until everything is carried over, twice in a row; what is left at the deadline."""
        clean = 0

        def carried_over() -> bool:
            nonlocal clean
            clean = 0 if self.left() else clean + 1
            return clean >= 2

        try:
            wait_until(carried_over, DEADLINE_S)
        except AssertionError:
            return self.left()
        return ""

    def close(self) -> None:
        for name in list(self._stopped):
            self.resume(name)
        self.redis.close()
        with contextlib.suppress(Exception):
            self._reap_orphans()
        if self._connection is not None:
            self._connection.terminate()


_LEDGER = """
SELECT subject, meter, period_start, NULL::timestamptz AS hour, total, overage
FROM ledger_periods WHERE subject = ANY ($1::text[])
UNION ALL
SELECT subject, meter, period_start, hour_start, total, overage
FROM ledger_hours WHERE subject = ANY ($1::text[])
"""
_EVENTS = """
SELECT subject, limit_name, meter, kind, threshold, period_start, usage
FROM limit_events WHERE subject = ANY ($1::text[]) ORDER BY id
"""


@contextmanager
def start_world(switches: Switches) -> Iterator[World]:
    """Stores, upstream, two gateways of two workers, two reconcilers, two client processes."""
    with ExitStack() as stop:
        folder = stop.enter_context(server_directory())
        # Processes are killed here, not the machine: what the kernel was given is as good as on
        # disk, and commits that were answered must be with the kernel.
        durable = {"synchronous_commit": "on", "full_page_writes": "on", "max_connections": "200"}
        postgres = EmbeddedPostgres(
            folder / "postgres", port=free_port(), fast=True, config=durable
        )
        stop.enter_context(postgres)
        asyncio.run(migrate(postgres.url))
        spool = folder / "spool"
        spool.mkdir()
        stack = stop.enter_context(
            start_stack(
                folder,
                config(switches).replace("${SPOOL_DIR}", str(spool)),
                postgres.url,
                gateways=(WORKERS,) * GATEWAYS,
                reconcilers=RECONCILERS,
                journal=True,
            )
        )
        wait_until(lambda: stack.upstream_journal and stack.upstream_journal.exists())
        load = stop.enter_context(Load(2))
        world = World(stack, postgres, load, folder, switches)
        stop.callback(world.close)
        yield world
