"""The way of a count into the ledger: absolute, versioned state, never differences.

Repeating a flush, running two at once, or crashing anywhere in one changes nothing in the result,
because a row is only ever replaced by one of a higher version of the same subject.

Steps of a batch, the failpoint behind each, and what a crash there leaves behind:
  1. list the subjects that changed longest ago     flush.listed        nothing
  2. read their states, each atomic                 flush.read          nothing
     then `ahead` stores the usage events that they hold, so that no count is in the ledger whose
     id is not: an id that a wiped Redis forgets would be counted twice
  3. in one transaction, accept_states locks the    flush.stored        nothing: rolled back
     subjects and sorts out overtaken ones, then
     store_periods and store_hours
  4. commit                                         flush.committed     rows, and the subjects still
                                                                        listed: the next flush
                                                                        stores the same or newer
  5. acknowledge: drop closed fields, unlist what   flush.acknowledged  done
     did not change meanwhile, which is idle now;
     what did change stays listed
Several batches are listed at once; while two of them are in steps 3 to 5 the next is in step 2.

What the ledger does not accept is never acknowledged, so nothing is lost silently:
  overtaken   its epoch is lower than the ledger's, because another process claimed a new epoch to
              seed the same subject and lost the race or died. It is told the epoch, and the next
              flush takes it, provided that nobody counted in a higher one.
  behind      the ledger has a higher version: Redis lost writes. Or it has counts of a higher
              epoch: the state was seeded by a process that had read the ledger before those. It
              stays listed, an error is logged, the lag shows it, and `repair` is asked to
              rebuild it from the ledger.
A subject that is listed and has no state is lost: its last changes are nowhere. That is reported
before it is unlisted; at its next request it is seeded with what the ledger has.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from itertools import takewhile

from core.db import ConstraintError, Database
from core.errors import StoreUnavailableError
from core.failpoints import reach
from core.keyspace import Keyspace, subject_of
from core.meters import MeterRegistry
from core.redis.scripts import load
from core.redis.store import Store
from core.telemetry import logs
from reconciler.rows import columns
from reconciler.snapshot import StateSnapshot, read_state

_log = logs.get_logger()

# Keys and arguments after which a script call takes no further subject: at most twice as many.
_MAX_ARGUMENTS = 45_000
# Batches that are listed together, and how many of them are stored at once: while one waits for the
# disk or is acknowledged, Postgres works on the other.
_WINDOW = 8
_STORING = 2

Repair = Callable[[list[str]], Awaitable[object]]
"""Rebuilds subjects, whose state is older than the ledger, from the ledger."""


@dataclass(slots=True)
class FlushResult:
    """What one call did. `stored`, `clean` (unlisted) and `repaired` (given to `repair`, which
    returned) are counts; `unreadable` and `lost` are state keys, the others subjects."""

    stored: int = 0
    clean: int = 0
    repaired: int = 0
    overtaken: list[str] = field(default_factory=list)
    behind: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)


@dataclass(slots=True)
class FlushRun:
    """What a run remembers: `seen` so that a subject that cannot be stored is tried once in it,
    and how many of those are `stuck` at the head of the list.
    """

    until_ms: int
    seen: set[str] = field(default_factory=set)
    stuck: int = 0


class Flusher:
    """Copies changed subjects of one shard.

    `repair` is called once a run with the subjects that are behind; `on_lost(count)` for listed
    subjects without a state.
    """

    def __init__(
        self,
        store: Store,
        database: Database,
        keyspace: Keyspace,
        registry: MeterRegistry,
        *,
        shard: int = 0,
        batch: int = 1_000,
        repair: Repair | None = None,
        on_lost: Callable[[int], None] | None = None,
        ahead: Callable[[], Awaitable[object]] | None = None,
    ) -> None:
        self._store = store
        self._database = database
        self._keyspace = keyspace
        self._dirty_key = keyspace.dirty(shard)
        self._idle_key = keyspace.idle(shard)
        self._registry = registry
        self._batch = batch
        self._repair = repair
        self._on_lost = on_lost
        self._ahead = ahead
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
        result = FlushResult()
        run = FlushRun(await self._store.now_ms())
        await self._bring_back(run.until_ms)
        while keys := await self._due(run):
            reach("flush.listed")
            run.seen.update(keys)
            await self._flush(keys, run, result)
        if result.behind and self._repair is not None:
            await self._mend(self._repair, result)
        return result

    async def _bring_back(self, now_ms: int) -> None:
        """Subjects that changed in the future: the clock went back. They are due all the same."""
        for _ in range(await self._store.cardinality(self._dirty_key) // self._batch + 1):
            keys = await self._store.above(self._dirty_key, now_ms, self._batch)
            if keys:
                await self._store.rescore(self._dirty_key, keys, now_ms)
            if len(keys) < self._batch:
                return

    async def _due(self, run: FlushRun) -> list[str]:
        """Step 1: the next subjects of a run, several batches; none when it is done.

        What was tried and could not be stored keeps its place at the head of the list; everything
        else was unlisted or has a later time now.
        """
        keys: list[str] = []
        skip = run.stuck
        while len(keys) < _WINDOW * self._batch:
            rows = await self._store.oldest(self._dirty_key, self._batch, skip)
            skip += len(rows)
            due = [key for key, since in rows if since <= run.until_ms]
            if not keys:
                run.stuck += len(list(takewhile(run.seen.__contains__, due)))
            keys += [key for key in due if key not in run.seen]
            if len(due) < self._batch:
                break
        return list(dict.fromkeys(keys))  # it moves while it is listed

    async def _flush(self, keys: list[str], run: FlushRun, result: FlushResult) -> None:
        """Steps 2 to 5 of all batches of a window."""
        storing: deque[asyncio.Task[None]] = deque()
        try:
            for first in range(0, len(keys), self._batch):
                batch = keys[first : first + self._batch]
                read_at_ms = max(await self._store.now_ms(), run.until_ms + 1)
                snapshots = await self._read(batch, result)
                if self._ahead is not None:
                    await self._ahead()
                reach("flush.read")
                if len(storing) == _STORING:
                    await storing.popleft()
                storing.append(
                    asyncio.create_task(self._store_batch(batch, snapshots, read_at_ms, result))
                )
            while storing:
                await storing.popleft()
        finally:
            for task in storing:
                task.cancel()
            await asyncio.gather(*storing, return_exceptions=True)

    async def _store_batch(
        self,
        keys: list[str],
        snapshots: list[StateSnapshot],
        read_at_ms: int,
        result: FlushResult,
    ) -> None:
        """Steps 3 to 5."""
        accepted = await self._commit(snapshots, result)
        reach("flush.committed")
        unreadable = set(result.unreadable)
        readable = [key for key in keys if key not in unreadable]
        # in a name of its own: += would add to what it was before the wait
        clean = await self._confirm(accepted, readable, snapshots, read_at_ms)
        result.clean += clean
        result.stored += len(accepted)
        reach("flush.acknowledged")
        if overtaken := set(result.overtaken):
            await self._pass_epochs_on([s for s in snapshots if s.subject in overtaken], result)

    async def _read(self, keys: list[str], result: FlushResult) -> list[StateSnapshot]:
        """Step 2."""
        states = await self._store.hgetall_many(keys)
        read: list[StateSnapshot] = []
        lost = 0
        for key, state in zip(keys, states, strict=True):
            if not state:
                _log.error("state_lost", subject=subject_of(key))
                result.lost.append(key)
                lost += 1
                continue
            try:
                read.append(read_state(key, state))
            except (ValueError, KeyError) as error:
                _log.error("state_unreadable", subject=subject_of(key), reason=str(error))
                result.unreadable.append(key)
        if lost and self._on_lost is not None:
            self._on_lost(lost)
        names = {row[0] for s in read for row in s.periods} | {r[0] for s in read for r in s.hours}
        unknown = await self._registry.unknown(self._database, names)
        if not unknown:
            return read
        for snapshot in read:
            if missing := unknown & snapshot.meters:
                reason = f"no process declared the meter {', '.join(sorted(missing))}"
                _log.error("state_unreadable", subject=snapshot.subject, reason=reason)
                result.unreadable.append(snapshot.key)
        return [snapshot for snapshot in read if not unknown & snapshot.meters]

    async def _commit(
        self, snapshots: list[StateSnapshot], result: FlushResult
    ) -> list[StateSnapshot]:
        """Steps 3 and 4. A batch with a row that Postgres cannot take is halved until it stands
        alone."""
        if not snapshots:
            return []
        try:
            return await self._store_rows(snapshots, result)
        except (ConstraintError, ValueError, OverflowError) as error:
            if len(snapshots) == 1:
                _log.error("state_refused", subject=snapshots[0].subject, reason=str(error))
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
                " ".join([str(snapshot.epoch) for snapshot in snapshots]),
                " ".join([str(snapshot.version) for snapshot in snapshots]),
            )
            refused: dict[str, int | None] = {row["subject"]: row["version"] for row in rows}
            accepted = [s for s in snapshots if s.subject not in refused] if refused else snapshots
            if accepted:
                periods, hours = columns(accepted, self._registry)
                await transaction.execute("store_periods", *periods)
                await transaction.execute("store_hours", *hours)
            reach("flush.stored")
        for snapshot in snapshots if refused else ():
            version = refused.get(snapshot.subject, -1)
            if version is None:
                result.overtaken.append(snapshot.subject)
            elif version >= 0:
                await self._look_behind(snapshot, version, result)
        return accepted

    async def _look_behind(
        self, snapshot: StateSnapshot, version: int, result: FlushResult
    ) -> None:
        """A higher version in the ledger: another reconciler was faster, or Redis lost writes."""
        state = (await self._store.hgetall_many([snapshot.key]))[0]
        if not state:
            return
        now = read_state(snapshot.key, state)
        if now.epoch == snapshot.epoch and now.version < version:
            self._is_behind(snapshot, version, result)

    def _is_behind(self, snapshot: StateSnapshot, version: int, result: FlushResult) -> None:
        result.behind.append(snapshot.subject)
        log = _log.error if self._repair is None else _log.warning  # it is about to be mended
        log(
            "state_behind_ledger",
            subject=snapshot.subject,
            epoch=snapshot.epoch,
            version=snapshot.version,
            ledger_version=version,
        )

    async def _mend(self, repair: Repair, result: FlushResult) -> None:
        try:
            await repair(result.behind)
        except StoreUnavailableError:
            raise
        except Exception:
            # They stay listed, and the next run asks again.
            _log.exception("repair_failed", subjects=len(result.behind))
        else:
            result.repaired = len(result.behind)
            _log.warning("repaired", subjects=result.repaired)

    async def _confirm(
        self,
        accepted: list[StateSnapshot],
        keys: list[str],
        snapshots: list[StateSnapshot],
        read_at_ms: int,
    ) -> int:
        """Step 5; also unlists subjects whose state was gone in step 2."""
        entries = deque(entry for snapshot in accepted for entry in _entries(snapshot))
        read = {snapshot.key for snapshot in snapshots}
        entries += ((key, ("", "", 0)) for key in keys if key not in read)
        clean = 0
        while entries:
            call_keys: list[str] = [self._dirty_key, self._idle_key]
            arguments: list[str | int] = [read_at_ms]
            while entries and len(call_keys) + len(arguments) < _MAX_ARGUMENTS:
                key, values = entries.popleft()
                call_keys.append(key)
                arguments += values
            clean += int(await self._store.run(self._acknowledge, call_keys, arguments))
        return clean

    async def _pass_epochs_on(self, snapshots: list[StateSnapshot], result: FlushResult) -> None:
        """Tells overtaken subjects their epoch, unless the ledger has counts that they lack.

        That is asked of the states as they are now: a snapshot that waited while another flush
        stored a later one is older than the ledger, and says nothing about its subject.
        """
        if not snapshots:
            return
        rows = await self._database.fetch("read_epochs", [s.subject for s in snapshots])
        ledger = {row["subject"]: row for row in rows}
        states = await self._store.hgetall_many([snapshot.key for snapshot in snapshots])
        for snapshot, state in zip(snapshots, states, strict=True):
            if not state:
                continue  # gone since; whoever rebuilds it claims an epoch
            try:
                now = read_state(snapshot.key, state)
            except (ValueError, KeyError):
                continue  # the next run reads it first, and says so
            row = ledger[now.subject]
            if row["stored"] > now.epoch or row["version"] > now.version:
                self._is_behind(now, row["version"], result)
                continue
            if now.epoch >= row["epoch"]:
                continue  # told, or rebuilt, meanwhile
            keys = [now.key, self._keyspace.claim(now.subject), self._idle_key]
            arguments = [now.version, row["epoch"], 0, "", "", ""]
            await self._store.run(self._seed, keys, arguments)
            _log.warning("epoch_passed_on", subject=now.subject)


def _entries(snapshot: StateSnapshot) -> Iterator[tuple[str, tuple[str | int, ...]]]:
    """What lua/acknowledge.lua is told of one state, in pieces when it has very many closed fields.

    All but the last piece go without the version: they drop fields and leave the state listed.
    """
    closed = snapshot.closed
    size = _MAX_ARGUMENTS // 2 * 2  # a field and its text stay together
    for first in range(0, max(1, len(closed)), size):
        piece = closed[first : first + size]
        last = first + size >= len(closed)
        version = snapshot.version if last else ""
        yield snapshot.key, (snapshot.epoch, version, len(piece), *piece)
