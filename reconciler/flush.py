"""The way of a count into the ledger: absolute, versioned state, never differences.

Repeating a flush, running two at once, or crashing anywhere in one changes nothing in the result,
because a row is only ever replaced by one of a higher version of the same subject.

Steps of `flush_once`, and what a crash after each leaves behind:
  1. list the subjects that changed longest ago     nothing
  2. read their states, each atomic                 nothing
  3. one transaction: accept_states locks the       rows stored, subjects still listed as changed:
     subjects and sorts out overtaken ones, then    the next flush stores the same or newer state
     store_periods and store_hours
  4. acknowledge: drop closed fields, unlist what   done; a subject that changed meanwhile stays
     did not change meanwhile                       listed

A state that the ledger does not accept is never acknowledged, so nothing is lost silently:
  overtaken   its epoch is lower than the ledger's, because another process claimed a new epoch to
              seed the same subject and lost the race or died. It is told the epoch, and the next
              flush takes it, provided that its totals are not below the ledger's.
  behind      Redis lost writes: at the same epoch its version is lower than the ledger's, or, as it
              counted on from an older state, one of its totals is. It stays listed, an error is
              logged, and the lag shows it, until the totals have passed the ledger's, or its key
              is deleted, upon which it is rebuilt from the ledger.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from core import clock
from core.db import ConstraintError, Database
from core.keyspace import Keyspace
from core.meters import MeterRegistry
from core.policy import Aggregation, Meter
from core.redis.scripts import load
from core.redis.store import Store
from core.telemetry import logs
from reconciler.snapshot import HourRow, PeriodRow, StateSnapshot, read_state

_log = logs.get_logger()

# Keys and arguments after which a script call takes no further subject: at most twice as many.
_MAX_ARGUMENTS = 45_000

_FIX_BEHIND = "delete the key in Redis: it is rebuilt from the ledger"


@dataclass(slots=True)
class FlushResult:
    """What one call did. `more` is whether subjects that changed before its start may be left."""

    stored: int = 0
    clean: int = 0
    overtaken: list[str] = field(default_factory=list)
    behind: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    more: bool = False


@dataclass(slots=True)
class FlushRun:
    """What a run remembers: `seen` so that a subject that cannot be stored is tried once in it,
    and how many of those are `stuck` at the head of the list.
    """

    until_ms: int
    seen: set[str] = field(default_factory=set)
    stuck: int = 0


class _Lowered(Exception):
    """Rows would lower a total of the ledger."""


class Flusher:
    """Copies changed subjects of one shard."""

    def __init__(
        self,
        store: Store,
        database: Database,
        keyspace: Keyspace,
        registry: MeterRegistry,
        *,
        shard: int = 0,
        batch: int = 1_000,
    ) -> None:
        self._store = store
        self._database = database
        self._dirty_key = keyspace.dirty(shard)
        self._registry = registry
        self._batch = batch
        self._acknowledge = load("acknowledge")
        self._seed = load("seed")

    async def lag(self) -> tuple[int, int]:
        """Changed subjects, and the age in ms of the oldest change that is not in the ledger.

        Raises:
            StoreUnavailableError: Redis did not answer.
        """
        count = await self._store.cardinality(self._dirty_key)
        oldest = await self._store.oldest(self._dirty_key, 1)
        if not oldest:
            return count, 0
        return count, max(0, await self._store.now_ms() - int(oldest[0][1]))

    async def flush_all(self) -> FlushResult:
        """Flushes until everything that had changed at the start is in the ledger.

        Raises:
            StoreUnavailableError: Redis or Postgres did not answer; what was done stays done.
        """
        total = FlushResult()
        run = FlushRun(await self._store.now_ms())
        await self._bring_back(run.until_ms)
        more = True
        while more:
            result = await self.flush_once(run)
            more = result.more
            total.stored += result.stored
            total.clean += result.clean
            total.overtaken += result.overtaken
            total.behind += result.behind
            total.unreadable += result.unreadable
        return total

    async def _bring_back(self, now_ms: int) -> None:
        """Subjects that changed in the future: the clock went back. They are due all the same."""
        for _ in range(await self._store.cardinality(self._dirty_key) // self._batch + 1):
            keys = await self._store.above(self._dirty_key, now_ms, self._batch)
            if keys:
                await self._store.rescore(self._dirty_key, keys, now_ms)
            if len(keys) < self._batch:
                return

    async def _due(self, run: FlushRun) -> tuple[list[str], bool]:
        """The next subjects of a run, and whether there may be more.

        What was tried and could not be stored keeps its place at the head of the list; everything
        else was unlisted or has a later time now.
        """
        while True:
            rows = await self._store.oldest(self._dirty_key, self._batch, run.stuck)
            due = [key for key, since in rows if since <= run.until_ms]
            keys = [key for key in due if key not in run.seen]
            run.stuck += len(list(takewhile(run.seen.__contains__, due)))
            if keys or not due:
                return keys, len(rows) == self._batch

    async def flush_once(self, run: FlushRun) -> FlushResult:
        """Flushes one batch of the subjects that changed up to `run.until_ms` (Redis time)."""
        result = FlushResult()
        # Step 1
        keys, result.more = await self._due(run)
        if not keys:
            result.more = False
            return result
        run.seen.update(keys)
        # Step 2
        read_at_ms = max(await self._store.now_ms(), run.until_ms + 1)
        snapshots = await self._read(keys, result)
        readable = [key for key in keys if key not in result.unreadable]
        # Step 3
        accepted = await self._commit(snapshots, result)
        # Step 4
        result.clean += await self._confirm(accepted, readable, snapshots, read_at_ms)
        result.stored = len(accepted)
        if result.overtaken:
            await self._pass_epochs_on([s for s in snapshots if s.subject in result.overtaken])
        return result

    async def _read(self, keys: list[str], result: FlushResult) -> list[StateSnapshot]:
        states = await self._store.hgetall_many(keys)
        read: list[StateSnapshot] = []
        for key, state in zip(keys, states, strict=True):
            if not state:
                continue  # flushed by another reconciler and gone, or wiped: step 4 unlists it
            try:
                read.append(read_state(key, state))
            except (ValueError, KeyError) as error:
                _log.error("state_unreadable", key=key, reason=str(error))
                result.unreadable.append(key)
        unknown = await self._registry.unknown(
            self._database, {name for snapshot in read for name in snapshot.meters}
        )
        for snapshot in read:
            if names := unknown & snapshot.meters:
                reason = f"no process declared the meter {', '.join(sorted(names))}"
                _log.error("state_unreadable", key=snapshot.key, reason=reason)
                result.unreadable.append(snapshot.key)
        return [snapshot for snapshot in read if not unknown & snapshot.meters]

    async def _commit(
        self, snapshots: list[StateSnapshot], result: FlushResult
    ) -> list[StateSnapshot]:
        """Step 3. A batch with a row that Postgres cannot take is halved until it stands alone."""
        if not snapshots:
            return []
        try:
            return await self._store_rows(snapshots, result)
        except (ConstraintError, ValueError, OverflowError, _Lowered) as error:
            if len(snapshots) == 1 and isinstance(error, _Lowered):
                self._is_behind(snapshots[0], result, reason=str(error))
                return []
            if len(snapshots) == 1:
                _log.error("state_refused", key=snapshots[0].key, reason=str(error))
                result.unreadable.append(snapshots[0].key)
                return []
            half = len(snapshots) // 2
            first = await self._commit(snapshots[:half], result)
            return first + await self._commit(snapshots[half:], result)

    async def _store_rows(
        self, snapshots: list[StateSnapshot], result: FlushResult
    ) -> list[StateSnapshot]:
        async with self._database.transaction() as transaction:
            rows = await transaction.fetch(
                "accept_states",
                [snapshot.subject for snapshot in snapshots],
                [snapshot.epoch for snapshot in snapshots],
                [snapshot.version for snapshot in snapshots],
            )
            versions: dict[str, int] = {row["subject"]: row["version"] for row in rows}
            accepted = [s for s in snapshots if versions.get(s.subject) == s.version]
            for query, columns in (
                ("store_periods", self._columns((s, row) for s in accepted for row in s.periods)),
                ("store_hours", self._columns((s, row) for s in accepted for row in s.hours)),
            ):
                if await transaction.execute(query, *columns) != len(columns[0]):
                    raise _Lowered(f"{query}: a total is below the ledger's")
        for snapshot in snapshots:
            version = versions.get(snapshot.subject)
            if version is None:
                result.overtaken.append(snapshot.subject)
            elif version != snapshot.version:
                await self._look_behind(snapshot, version, result)
        return accepted

    async def _look_behind(
        self, snapshot: StateSnapshot, version: int, result: FlushResult
    ) -> None:
        """A higher version in the ledger: another reconciler was faster, or Redis lost writes."""
        state = (await self._store.hgetall_many([snapshot.key]))[0]
        if state and read_state(snapshot.key, state).version < version:
            self._is_behind(snapshot, result, reason=f"the ledger has version {version}")

    def _is_behind(self, snapshot: StateSnapshot, result: FlushResult, *, reason: str) -> None:
        result.behind.append(snapshot.subject)
        _log.error(
            "state_behind_ledger",
            key=snapshot.key,
            epoch=snapshot.epoch,
            version=snapshot.version,
            reason=reason,
            fix=_FIX_BEHIND,
        )

    def _columns(
        self, rows: Iterable[tuple[StateSnapshot, PeriodRow | HourRow]]
    ) -> list[list[object]]:
        """The rows as `store_periods` and `store_hours` take them: one list a column."""
        columns: list[list[object]] = [[] for _ in range(8)]
        for snapshot, (name, start_ms, second_ms, total, overage) in rows:
            meter = self._meter(name)
            values = (
                snapshot.subject,
                name,
                clock.to_datetime(start_ms),
                clock.to_datetime(second_ms),
                meter.from_units(total),
                meter.from_units(overage),
                snapshot.epoch,
                snapshot.version,
            )
            for column, value in zip(columns, values, strict=True):
                column.append(value)
        return columns

    def _meter(self, name: str) -> Meter:
        meter = self._registry.get(name)
        assert meter is not None, name  # _read left out states with unknown meters
        return meter

    async def _confirm(
        self,
        accepted: list[StateSnapshot],
        keys: list[str],
        snapshots: list[StateSnapshot],
        read_at_ms: int,
    ) -> int:
        """Step 4; also unlists subjects whose state was gone in step 2."""
        read = {snapshot.key for snapshot in snapshots}
        entries = deque(entry for snapshot in accepted for entry in _entries(snapshot))
        entries += ((key, ("", "", 0)) for key in keys if key not in read)
        clean = 0
        while entries:
            call_keys: list[str] = [self._dirty_key]
            arguments: list[str | int] = [read_at_ms]
            while entries and len(call_keys) + len(arguments) < _MAX_ARGUMENTS:
                key, values = entries.popleft()
                call_keys.append(key)
                arguments += values
            clean += int(await self._store.run(self._acknowledge, call_keys, arguments))
        return clean

    async def _pass_epochs_on(self, snapshots: list[StateSnapshot]) -> None:
        """Tells overtaken states their epoch, unless their totals are below the ledger's."""
        epochs = {
            row["subject"]: row["epoch"]
            for row in await self._database.fetch("read_epochs", [s.subject for s in snapshots])
        }
        for snapshot in snapshots:
            rows = await self._database.fetch("ledger_of_subject", snapshot.subject, 1_000)
            stored = {
                (row["meter"], clock.from_datetime(row["period_start"])): row["total"]
                for row in rows
            }
            lost = [
                row.meter
                for row in snapshot.periods
                if (meter := self._meter(row.meter)).aggregation is not Aggregation.LAST
                and meter.from_units(row.total) < stored.get((row.meter, row.start_ms), 0)
            ]
            if lost:
                _log.error("state_below_ledger", subject=snapshot.subject, meters=lost)
                continue
            await self._store.run(
                self._seed, [snapshot.key], [snapshot.version, epochs[snapshot.subject], 0]
            )
            _log.warning("epoch_passed_on", subject=snapshot.subject)


def _entries(snapshot: StateSnapshot) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    """What lua/acknowledge.lua is told of one state, in pieces when it has very many closed fields.

    All but the last piece go without the version: they drop fields and leave the state listed.
    """
    closed = snapshot.closed
    for first in range(0, max(1, len(closed)), _MAX_ARGUMENTS):
        piece = closed[first : first + _MAX_ARGUMENTS]
        last = first + _MAX_ARGUMENTS >= len(closed)
        version = snapshot.version if last else ""
        yield snapshot.key, (snapshot.epoch, version, len(piece), *piece)
