"""A worker's spool: what it admitted while Redis was away, on disk until Redis has counted it.

`append` returns when the record is on disk; all that wait share an fsync (`commit.py`).
`append_written` returns when the kernel has the record, which survives the process but not the
machine, and is on disk soon after.

The files (`files.py`, `segment.py`) are replayed oldest first. A file that the replay begins takes
no further records; new ones go to a new file with a new id, so that a replayed file can be removed,
and its space be used again, however busy the worker is. `(id, sequence)` names a record for ever:
whoever counts it in Redis remembers, for each id, the sequence counted last.

Steps of a replay, and what a crash after each leaves behind:
  1. `next_batch`          nothing
  2. count it in Redis     the batch comes again, with the same id and sequences: Redis knows them
  3. `done`                nothing comes again; a file without further records is removed, or is by
                           whoever adopts it

When the disk does not take a record it is cut off again, and appends are refused at once for a
second; then one is let through to find out. So do not ask `state` before an append: appending is
what notices that the disk is well again. A record that was refused after it was written is
withdrawn, so that none is counted whose request was not served; only a kill before that is done, or
a disk that does not take this either, leaves one behind.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

from core import clock, failpoints
from core.clock import Clock
from core.telemetry import logs
from gateway.outage.commit import GroupCommit, SpoolUnavailable
from gateway.outage.files import create, orphans
from gateway.outage.segment import DATA_START, MAX_PAYLOAD, OVERHEAD, Fsync, Report, Segment, ignore
from gateway.outage.segment import Record as _Record

_log = logs.get_logger()

State = Literal["idle", "active", "full", "broken"]
T = TypeVar("T")

# Errors that mean "no space": here, for us, or in this file.
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PROBE_S = 1.0
# A spool is a few files, so that space comes back in parts; but not a file for every few records.
_FILES = 8
_MIN_FILE = 64 * 1024


class SpoolFull(SpoolUnavailable):
    """It would pass `gateway.outage.spool_max`."""


class Batch(NamedTuple):
    """Records to be counted: (sequence, payload), ascending; sequences may be missing."""

    spool_id: str
    records: list[tuple[int, bytes]]


@dataclass(slots=True)
class _Failure:
    state: Literal["full", "broken"]
    reason: str
    retry_at: float


class Spool:
    """The spool of one process; to be used on one event loop."""

    durable = True

    def __init__(
        self,
        directory: str | Path,
        max_bytes: int,
        *,
        now_ms: Clock = clock.now_ms,
        monotonic: Callable[[], float] = clock.monotonic,
        fsync: Fsync = os.fdatasync,
        timeout_s: float = 2.0,
        report: Report = ignore,
    ) -> None:
        """`max_bytes` bounds the files on disk, headers included; `timeout_s` each fsync.

        `report(event, amount)` is called, in any thread, when something went wrong: `tail_cut`
        (bytes), `lost` (records), `damaged` (files), `unavailable` (1, when it begins).
        """
        self._directory = Path(directory)
        self._max_bytes = max_bytes
        self._file_bytes = max(max_bytes // _FILES, _MIN_FILE)
        self._now_ms = now_ms
        self._monotonic = monotonic
        self._fsync = fsync
        self._timeout_s = timeout_s
        self._report = report
        self._active: Segment | None = None
        self._sealed: list[Segment] = []  # oldest first
        self._adopted: list[Segment] = []  # by the thread, to become sealed
        self._failure: _Failure | None = None
        self._made_ms = 0  # time in the id of the file made last
        self._over = False
        self._closed = False
        self._replay = asyncio.Lock()
        self._commits = GroupCommit(
            fsync,
            timeout_s,
            failing=lambda: self._failure is not None,
            on_failure=self._sync_failed,
            on_overdue=self._sync_overdue,
            on_success=self._recovered,
        )
        # Not the thread of the fsyncs: one that hangs must not keep the replay from reading. And
        # one thread, so that no two operations meet on one file.
        self._reader = ThreadPoolExecutor(1, "spool-read")

    # Reading these costs a walk over a few files.

    @property
    def state(self) -> State:
        """idle: nothing pending; active; full: no space; broken: the disk fails."""
        if self._failure is not None:
            return self._failure.state
        if self._over:
            return "full"
        return "active" if self.pending_records else "idle"

    @property
    def pending_records(self) -> int:
        return sum(segment.pending for segment in self._segments())

    @property
    def pending_bytes(self) -> int:
        """Bytes of what is to be replayed."""
        return sum(segment.pending_bytes for segment in self._segments())

    @property
    def used_bytes(self) -> int:
        """Bytes on disk, which `max_bytes` bounds."""
        return sum(segment.size for segment in self._segments())

    @property
    def oldest_ms(self) -> int:
        """When the oldest pending record was written, epoch ms; 0 without any."""
        return min((s.oldest_ms for s in self._segments() if s.oldest_ms), default=0)

    async def append(self, payload: bytes) -> int:
        """Adds a record (1 MiB at most); it is on disk when this returns its sequence.

        Cancelled, the record is withdrawn.

        Raises:
            SpoolFull: it would pass `max_bytes`; nothing was written.
            SpoolUnavailable: the disk did not take it; it will not be replayed.
        """
        segment, record = self._write(payload)
        await self._commits.on_disk(segment, record)
        return record.sequence

    def append_written(self, payload: bytes) -> int:
        """Adds a record that survives this process at once, the machine soon; never waits.

        Raises:
            SpoolFull: it would pass `max_bytes`; nothing was written.
            SpoolUnavailable: the disk did not take it.
        """
        return self._write(payload)[1].sequence

    async def adopt(self) -> int:
        """Takes over what dead processes left, as far as `max_bytes` allows; returns the files.

        To be called at the start, and again after a replay, which makes room for more.
        """
        async with self._replay:
            before, held = len(self._live()), self.used_bytes
            await self._in_reader(lambda: self._adopt(held))
            return len(self._live()) - before

    async def next_batch(self, count: int = 500) -> Batch | None:
        """The oldest records that are not `done`, `count` at most; None when there are none.

        Raises:
            SpoolUnavailable: the disk does not give them.
        """
        async with self._replay:
            error: SpoolUnavailable | None = None
            tried: set[Segment] = set()
            while True:
                segment = next((each for each in self._live() if each not in tried), None)
                if segment is None:
                    if self._active is None:
                        break
                    self._seal(self._active)
                    continue
                tried.add(segment)
                await self._commits.settled(segment)
                try:
                    records = await self._in_reader(partial(segment.read, segment.done + 1, count))
                    if records:
                        return Batch(segment.id, records)
                    # withdrawn or unreadable to the end
                    await self._in_reader(segment.remove)
                except SpoolUnavailable as caught:
                    error = caught  # the other files must not wait for this one
                self._freed()
            if error is not None:
                raise error
            return None

    async def done(self, batch: Batch, upto: int | None = None) -> None:
        """The batch, or its part up to a sequence, is counted: it never comes again.

        Raises:
            SpoolUnavailable: it may come again.
        """
        sequence = batch.records[-1][0] if upto is None else upto
        async with self._replay:
            for segment in self._live():
                if segment.id == batch.spool_id:
                    await self._in_reader(partial(segment.mark, sequence, self._fsync))
                    if not segment.pending:
                        await self._in_reader(segment.remove)
                    self._freed()
                    return

    async def close(self) -> None:
        """Waits until everything is on disk and lets go of the files: others may adopt them."""
        self._closed = True
        try:
            await asyncio.wait_for(self._commits.close(), self._timeout_s)
        except TimeoutError:  # a disk that hangs; what it has not got ends with the process
            _log.error("spool_not_synced", records=self.pending_records)
            return
        async with self._replay:
            for segment in self._segments():
                await self._in_reader(segment.close)
            self._active = None
        self._reader.shutdown(wait=False)

    def _segments(self) -> list[Segment]:
        live = self._live()
        return live if self._active is None else [*live, self._active]

    def _live(self) -> list[Segment]:
        # Also what a removal or adoption did whose awaiter was cancelled.
        if self._adopted:
            count = len(self._adopted)
            self._sealed += self._adopted[:count]
            del self._adopted[:count]
            self._sealed.sort(key=lambda segment: segment.id)
        if any(segment.fd < 0 for segment in self._sealed):
            self._sealed = [segment for segment in self._sealed if segment.fd >= 0]
        return self._sealed

    def _adopt(self, held: int) -> None:
        """In the thread. A first file may be larger than the bound: it was lowered since."""
        for room in [None, self._max_bytes] if not held else [self._max_bytes]:
            for segment in orphans(self._directory, self._report, room=room and room - held):
                self._adopted.append(segment)
                held += segment.size
                if room is None:
                    break

    def _write(self, payload: bytes) -> tuple[Segment, _Record]:
        size = OVERHEAD + len(payload)
        if len(payload) > MAX_PAYLOAD:
            raise ValueError(f"a record of {len(payload)} bytes: {MAX_PAYLOAD} at most")
        if self._closed:
            raise SpoolUnavailable("the spool is closed: this worker is shutting down")
        failure = self._failure
        if failure is not None and self._monotonic() < failure.retry_at:
            raise SpoolUnavailable(failure.reason)
        active = self._active
        if active is not None and active.size + size > self._file_bytes:
            self._seal(active)
            active = None
        needed = size if active is not None else size + DATA_START
        if self.used_bytes + needed > self._max_bytes:
            self._over = True
            raise SpoolFull(
                f"the spool holds {self.used_bytes} bytes; gateway.outage.spool_max allows "
                f"{self._max_bytes}: it drains when Redis is back"
            )
        if failure is not None:
            failure.retry_at = self._monotonic() + _PROBE_S  # this one finds out, others wait
        try:
            if active is None:
                # Their order is that of their names, also when the clock goes back.
                self._made_ms = max(self._made_ms + 1, self._now_ms())
                active = self._active = create(self._directory, self._made_ms, self._report)
            record = active.write(payload, self._now_ms())
        except OSError as error:
            self._failed(error)
            raise SpoolUnavailable(f"the spool cannot be written: {error}") from error
        failpoints.reach("spool.appended")
        self._over = False
        self._commits.wrote(active)
        return active, record

    def _failed(self, error: OSError) -> None:
        state: Literal["full", "broken"] = "full" if error.errno in _NO_SPACE else "broken"
        if self._failure is None:
            _log.error("spool_unavailable", state=state, reason=str(error))
            self._report("unavailable", 1)
        retry_at = self._monotonic() + _PROBE_S
        self._failure = _Failure(state, f"the spool cannot be written: {error}", retry_at)
        active = self._active
        if active is None:
            return
        if active.last == 0:
            self._active = None
            active.discard()
        elif error.errno not in (errno.ENOSPC, errno.EDQUOT):
            self._seal(active)  # another file may be a way out

    def _recovered(self) -> None:
        if self._failure is not None:
            self._failure = None
            _log.warning("spool_available_again")

    def _seal(self, segment: Segment) -> None:
        self._active = None
        self._sealed.append(segment)

    def _freed(self) -> None:
        self._over = False
        if self._failure is not None and self._failure.state == "full":
            self._failure.retry_at = min(self._failure.retry_at, self._monotonic())

    def _sync_failed(self, segment: Segment, error: OSError) -> None:
        self._failed(error)
        if segment is self._active:
            self._seal(segment)

    def _sync_overdue(self, error: OSError | None) -> None:
        if error is not None:
            self._failed(error)
        if self._failure is not None:  # no probe before it returns
            self._failure.retry_at = self._monotonic() if error is None else float("inf")

    async def _in_reader(self, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._reader, work)
        except OSError as error:
            raise SpoolUnavailable(f"the spool cannot be read: {error}") from error
