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
  behind      its version is lower than the ledger's at the same epoch: Redis lost writes. It stays
              listed, an error is logged, and the lag shows it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from core import clock
from core.db import ConstraintError, Database
from core.keyspace import Keyspace
from core.policy import Meter
from core.redis.scripts import load
from core.redis.store import Store
from core.telemetry import logs
from reconciler.snapshot import StateSnapshot, read_state

_log = logs.get_logger()

MetersOf = Callable[[str], Meter | None]


@dataclass(slots=True)
class FlushResult:
    """What one call did. `more` is whether subjects that changed before its start may be left."""

    stored: int = 0
    clean: int = 0
    overtaken: list[str] = field(default_factory=list)
    behind: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    more: bool = False


class Flusher:
    """Copies changed subjects of one shard. `meter_of(name)` gives a meter, None if unknown."""

    def __init__(
        self,
        store: Store,
        database: Database,
        keyspace: Keyspace,
        meter_of: MetersOf,
        *,
        shard: int = 0,
        batch: int = 1_000,
    ) -> None:
        self._store = store
        self._database = database
        self._dirty_key = keyspace.dirty(shard)
        self._meter_of = meter_of
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
        until_ms = await self._store.now_ms()
        seen: set[str] = set()
        more = True
        while more:
            result = await self.flush_once(until_ms, seen)
            more = result.more
            total.stored += result.stored
            total.clean += result.clean
            total.overtaken += result.overtaken
            total.behind += result.behind
            total.unreadable += result.unreadable
        return total

    async def flush_once(self, until_ms: int, seen: set[str]) -> FlushResult:
        """Flushes one batch of subjects that changed up to `until_ms` (Redis time).

        `seen` collects the keys of a run, so that one that cannot be stored is tried once in it.
        """
        result = FlushResult()
        # Step 1. Those that could not be stored stay at the head of the list, so look behind them.
        listed = await self._store.oldest(self._dirty_key, self._batch + len(seen))
        keys = [key for key, since in listed if since <= until_ms and key not in seen]
        keys = keys[: self._batch]
        if not keys:
            return result
        seen.update(keys)
        result.more = len(keys) == self._batch
        # Step 2
        read_at_ms = await self._store.now_ms()
        snapshots = await self._read(keys, result)
        # Step 3
        accepted = await self._commit(snapshots, result)
        # Step 4
        result.clean += await self._confirm(accepted, keys, snapshots, read_at_ms)
        result.stored = len(accepted)
        if result.overtaken:
            await self._pass_epochs_on([s for s in snapshots if s.subject in result.overtaken])
        return result

    async def _read(self, keys: list[str], result: FlushResult) -> list[StateSnapshot]:
        states = await self._store.hgetall_many(keys)
        snapshots: list[StateSnapshot] = []
        for key, state in zip(keys, states, strict=True):
            if not state:
                continue  # flushed by another reconciler and gone, or wiped: step 4 unlists it
            try:
                snapshot = read_state(key, state)
                unknown = {row.meter for row in snapshot.periods if not self._meter_of(row.meter)}
                if unknown:
                    names = ", ".join(sorted(unknown))
                    raise ValueError(f"no meter {names} in the configuration: add it again")
            except (ValueError, KeyError) as error:
                _log.error("state_unreadable", key=key, reason=str(error))
                result.unreadable.append(key)
                continue
            snapshots.append(snapshot)
        return snapshots

    async def _commit(
        self, snapshots: list[StateSnapshot], result: FlushResult
    ) -> list[StateSnapshot]:
        """Step 3. A batch with a row that Postgres cannot take is halved until it stands alone."""
        if not snapshots:
            return []
        try:
            return await self._store_rows(snapshots, result)
        except (ConstraintError, ValueError, OverflowError) as error:
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
            await transaction.execute("store_periods", *self._period_columns(accepted))
            await transaction.execute("store_hours", *self._hour_columns(accepted))
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
            result.behind.append(snapshot.subject)
            _log.error(
                "state_behind_ledger",
                subject=snapshot.subject,
                version=snapshot.version,
                ledger_version=version,
            )

    def _period_columns(self, snapshots: Sequence[StateSnapshot]) -> list[list[object]]:
        columns: list[list[object]] = [[] for _ in range(8)]
        for snapshot in snapshots:
            for row in snapshot.periods:
                meter = self._meter(row.meter)
                values = (
                    snapshot.subject,
                    row.meter,
                    clock.to_datetime(row.start_ms),
                    clock.to_datetime(row.end_ms),
                    meter.from_units(row.total),
                    meter.from_units(row.overage),
                    snapshot.epoch,
                    snapshot.version,
                )
                for column, value in zip(columns, values, strict=True):
                    column.append(value)
        return columns

    def _hour_columns(self, snapshots: Sequence[StateSnapshot]) -> list[list[object]]:
        columns: list[list[object]] = [[] for _ in range(8)]
        for snapshot in snapshots:
            for row in snapshot.hours:
                meter = self._meter(row.meter)
                values = (
                    snapshot.subject,
                    row.meter,
                    clock.to_datetime(row.period_start_ms),
                    clock.to_datetime(row.hour_start_ms),
                    meter.from_units(row.total),
                    meter.from_units(row.overage),
                    snapshot.epoch,
                    snapshot.version,
                )
                for column, value in zip(columns, values, strict=True):
                    column.append(value)
        return columns

    def _meter(self, name: str) -> Meter:
        meter = self._meter_of(name)
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
        gone = [key for key in keys if key not in read]
        call_keys = [self._dirty_key]
        arguments: list[str | int] = [read_at_ms]
        for snapshot in accepted:
            call_keys.append(snapshot.key)
            arguments += (
                snapshot.epoch,
                snapshot.version,
                len(snapshot.closed),
                *snapshot.closed,
            )
        for key in gone:
            call_keys.append(key)
            arguments += ("", "", 0)
        if len(call_keys) == 1:
            return 0
        return int(await self._store.run(self._acknowledge, call_keys, arguments))

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
                if self._meter(row.meter).from_units(row.total)
                < stored.get((row.meter, row.start_ms), 0)
            ]
            if lost:
                _log.error("state_below_ledger", subject=snapshot.subject, meters=lost)
                continue
            await self._store.run(
                self._seed, [snapshot.key], [snapshot.version, epochs[snapshot.subject], 0]
            )
            _log.warning("epoch_passed_on", subject=snapshot.subject)
