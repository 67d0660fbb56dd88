"""Counts what was written down while Redis was away: in order, and each entry once.

Steps for one batch of a spool, and what a crash after each leaves behind:
  1. read the next entries          nothing
  2. settle them in one numbered    all of it is counted, or nothing: the number is the spool's last
     call of lua/settle.lua         sequence in it, and the script takes no number twice
  3. mark them as done              done; before that, step 2 finds its number taken

An unresolved batch can only be judged when Redis' clock has passed its deadline: until then the
lost call may still be executed. It is a numbered call of its own, as its record is read first; and
a record lives a day, so a spool that is replayed later than that leaves such a batch counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import NamedTuple, Protocol

from core.admission.program import Verdict
from core.admission.settlement import Change, Kind, Operation, Settled, Settlement
from core.errors import StoreUnavailableError
from core.failpoints import reach
from core.keyspace import Keyspace
from core.period import HOUR_MS
from core.redis.store import Store
from core.telemetry import logs
from gateway.outage.commit import SpoolUnavailable
from gateway.outage.entries import Lost, read
from gateway.outage.spool import Batch

_log = logs.get_logger()

_BATCH = 500
# How often it is looked whether Redis is back, while something waits for it.
_LOOK_S = 0.2
_RETRY_S = 1.0
# How often spools of dead workers are looked for.
_ADOPT_S = 5.0


class Journal(Protocol):
    """Where entries wait: `Spool`, or `MemoryJournal` where there is no directory for one."""

    durable: bool

    @property
    def pending_records(self) -> int: ...

    async def append(self, payload: bytes) -> int: ...
    def append_written(self, payload: bytes) -> int: ...
    async def adopt(self) -> int: ...
    async def next_batch(self, count: int = 500) -> Batch | None: ...
    async def done(self, batch: Batch, upto: int | None = None) -> None: ...
    async def close(self) -> None: ...


class _Step(NamedTuple):
    """Entries that are counted in one call, up to a sequence."""

    upto: int
    operations: list[Operation]
    lost: Lost | None = None


class Replay:
    """Replays one journal whenever Redis is there.

    `run()` is the run connected to, None while there is none. `on_pending` is told how many entries
    wait, whenever that is looked at.
    """

    def __init__(
        self,
        journal: Journal,
        settlement: Settlement,
        store: Store,
        keyspace: Keyspace,
        run: Callable[[], str | None],
        on_replayed: Callable[[str, int], None] | None = None,
        on_pending: Callable[[int], None] | None = None,
    ) -> None:
        self._journal = journal
        self._settlement = settlement
        self._store = store
        self._keyspace = keyspace
        self._run = run
        self._on_replayed = on_replayed
        self._on_pending = on_pending
        self._task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    def start(self) -> None:
        self._task = asyncio.create_task(self._loop(), name="replay")

    def wake(self) -> None:
        """There is something to replay."""
        self._wake.set()

    async def close(self, within_s: float = 0.0) -> None:
        """Replays what waits, if Redis is there, for so long; the rest is for whoever is next."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task
        try:
            async with asyncio.timeout(within_s):
                while self._journal.pending_records and self._run() is not None:
                    if not await self.once():
                        break
        except (TimeoutError, StoreUnavailableError, SpoolUnavailable):
            pass
        except Exception:
            _log.exception("replay_failed")

    async def _loop(self) -> None:
        loop = asyncio.get_running_loop()
        adopt_at = 0.0
        while True:
            pause = _ADOPT_S
            try:
                if loop.time() >= adopt_at:
                    adopt_at = loop.time() + _ADOPT_S
                    if await self._journal.adopt():
                        _log.warning("spool_adopted")
                while self._run() is not None and await self.once():
                    pass
            except (StoreUnavailableError, SpoolUnavailable) as error:
                _log.warning("replay_postponed", reason=str(error))
                pause = _RETRY_S
            except Exception:
                _log.exception("replay_failed")
                pause = _RETRY_S
            pending = self._journal.pending_records
            if self._on_pending is not None:
                self._on_pending(pending)
            if pending and self._run() is None:
                pause = _LOOK_S
            self._wake.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._wake.wait()

    async def once(self) -> bool:
        """Replays one batch; False when there was none.

        Raises:
            StoreUnavailableError: a store did not answer; what was done stays done.
            SpoolUnavailable: the disk does not give the entries, or take the mark.
        """
        # Step 1
        batch = await self._journal.next_batch(_BATCH)
        if batch is None:
            return False
        reach("replay.read")
        batch = await self._uncounted(batch)
        for step in self._steps(batch):
            # Step 2
            await self._count(batch.spool_id, step)
            reach("replay.counted")
            # Step 3
            await self._journal.done(batch, step.upto)
            reach("replay.done")
        return True

    async def _uncounted(self, batch: Batch) -> Batch:
        """Without what was counted and not marked: it need not come in the same pieces again."""
        if self._run() is None:
            raise StoreUnavailableError("Redis is not connected")
        last = int(await self._store.text(self._keyspace.sender(0, batch.spool_id)) or 0)
        left = [record for record in batch.records if record[0] > last]
        if len(left) < len(batch.records):
            await self._journal.done(batch, min(last, batch.records[-1][0]))
        return batch._replace(records=left)

    @staticmethod
    def _steps(batch: Batch) -> Iterator[_Step]:
        operations: list[Operation] = []
        upto = 0
        for sequence, payload in batch.records:
            try:
                entry = read(payload)
            except ValueError as error:
                _log.error("spool_entry_unreadable", spool=batch.spool_id, sequence=sequence,
                           reason=str(error))  # fmt: skip
                upto = sequence
                continue
            if isinstance(entry, Lost):
                if operations or upto:
                    yield _Step(upto, operations)
                operations, upto = [], 0
                yield _Step(sequence, [], entry)
            else:
                operations.append(entry)
                upto = sequence
        if upto:
            yield _Step(upto, operations)

    async def _count(self, spool: str, step: _Step) -> None:
        run = self._run()
        if run is None:
            raise StoreUnavailableError("Redis is not connected")
        operations = step.operations
        kind = "admitted"
        if step.lost is not None:
            operations = await self._refunds(step.lost)
            kind = "refunded"
        if not operations:
            return
        # Confirmed any number of times it is confirmed once, whatever the order.
        confirmed = [o for o in operations if o.kind is not Kind.ADJUST]
        if confirmed:
            for operation, found in zip(
                confirmed, await self._settlement.settle(confirmed, run), strict=True
            ):
                if found in (Settled.COLD, Settled.UNVERIFIED, Settled.BROKEN):
                    raise StoreUnavailableError(
                        f"the state of {operation.subject} cannot be restored or read"
                    )
        changes = [o for o in operations if o.kind is Kind.ADJUST]
        new = await self._settlement.adjust(merged(changes), run, spool, step.upto)
        if new:
            _log.info("replayed", spool=spool, entries=len(operations), kind=kind)
            if self._on_replayed is not None:
                self._on_replayed(kind, len(operations))

    async def _refunds(self, lost: Lost) -> list[Operation]:
        """What the batch counted; nothing when it was never executed."""
        left_ms = lost.deadline_ms - await self._store.now_ms()
        if left_ms >= 0:
            await asyncio.sleep((left_ms + 1) / 1000)
        if await self._store.now_ms() <= lost.deadline_ms:
            raise StoreUnavailableError("Redis' clock went back; the lost call may still run")
        record = await self._store.text(self._keyspace.sender(0, lost.sender))
        if record is None:
            return []
        number, counted_at, statuses = record.split(" ")
        if int(number) != lost.number:
            return []
        return [
            _counted_at(refund, int(counted_at))
            for refund, status in zip(lost.refunds, statuses, strict=True)
            if refund is not None and int(status) == Verdict.ADMIT
        ]


def _counted_at(refund: Operation, at_ms: int) -> Operation:
    return replace(refund, changes=tuple(replace(change, at_ms=at_ms) for change in refund.changes))


def merged(adjustments: list[Operation]) -> list[Operation]:
    """Changes of one subject, meter and hour as one: an outage has many of each."""
    sums: dict[tuple[object, ...], tuple[str, Change]] = {}
    for operation in adjustments:
        for change in operation.changes:
            hour = change.at_ms - change.at_ms % HOUR_MS
            place = (operation.subject, change.meter, change.start_ms, hour, change.cap)
            known = sums.get((*place, change.units < 0))
            if known is None or change.aggregation != "sum":
                # Of a maximum or a last value each is a change of its own.
                key = (*place, change.units < 0) if known is None else (*place, len(sums))
                sums[key] = (operation.subject, change)
            else:
                units = known[1].units + change.units
                sums[(*place, change.units < 0)] = (operation.subject, replace(change, units=units))
    return [Operation(Kind.ADJUST, subject, changes=(change,)) for subject, change in sums.values()]


__all__ = ["Journal", "Replay", "merged"]
