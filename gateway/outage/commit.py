"""Group commit: records that wait to be on disk share an fsync, in a thread.

While one group is under way, what arrives forms the next. A failed or overdue fsync fails all that
wait for it, and their records are withdrawn, since their requests are refused. After a failure the
kernel forgets what it could not write, so that a second fsync would lie about it: a file that
failed takes no further records.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from core import failpoints
from core.errors import TallygateError
from core.telemetry import logs
from gateway.outage.segment import Fsync, Record, Segment

_log = logs.get_logger()


class SpoolUnavailable(TallygateError):
    """The record is not in the spool and will not be counted: the request must be refused."""


@dataclass(slots=True, eq=False)
class _Waiter:
    segment: Segment
    record: Record
    future: asyncio.Future[None]


class GroupCommit:
    """Syncs the segments of one spool; all calls come from one event loop.

    `Segment.unsettled` is above 0 while a record of it may still be withdrawn or is not on disk:
    it must not be replayed before.
    """

    def __init__(
        self,
        fsync: Fsync,
        timeout_s: float,
        *,
        failing: Callable[[], bool],
        on_failure: Callable[[Segment, OSError], None],
        on_overdue: Callable[[OSError | None], None],
        on_success: Callable[[], None],
    ) -> None:
        """`failing` tells whether the next group is a probe, whose success `on_success` reports.

        `on_overdue` gets an error when an fsync takes too long, and None when it ended.
        """
        self._fsync = fsync
        self._timeout_s = timeout_s
        self._failing = failing
        self._on_failure = on_failure
        self._on_overdue = on_overdue
        self._on_success = on_success
        self._waiting: list[_Waiter] = []
        self._dirty: set[Segment] = set()
        self._withdrawn: list[tuple[Segment, Record]] = []
        self._task: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "spool-sync")

    def wrote(self, segment: Segment) -> None:
        """The segment has records that are not on disk: they soon are."""
        if segment not in self._dirty:
            self._dirty.add(segment)
            segment.unsettled += 1
        self._start()

    async def on_disk(self, segment: Segment, record: Record) -> None:
        """Returns when the record, announced with `wrote`, is on disk; otherwise withdraws it.

        Raises:
            SpoolUnavailable: it is not.
        """
        waiter = _Waiter(segment, record, asyncio.get_running_loop().create_future())
        self._waiting.append(waiter)
        segment.unsettled += 1
        try:
            await waiter.future
        except BaseException:
            self._withdrawn.append((segment, record))
            segment.unsettled += 1
            self._start()
            raise
        finally:
            self._settle(segment)

    async def settled(self, segment: Segment) -> None:
        """Returns when all that was written to the segment is on disk, or never will be."""
        while segment.unsettled:
            self._settled.clear()
            await self._settled.wait()

    async def close(self) -> None:
        """Returns when everything is on disk, or never will be."""
        while self._task is not None and not self._task.done():
            await asyncio.shield(self._task)
        self._thread.shutdown(wait=False)

    def _settle(self, segment: Segment) -> None:
        segment.unsettled -= 1
        self._settled.set()

    def _start(self) -> None:
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    async def _run(self) -> None:
        while self._dirty or self._withdrawn:
            waiting, self._waiting = self._waiting, []
            withdrawn, self._withdrawn = self._withdrawn, []
            dirty, self._dirty = self._dirty, set()
            try:
                await self._group(waiting, dirty, withdrawn)
            finally:
                _refuse(waiting, "the commit ended early")
                for segment in [*dirty, *(segment for segment, _ in withdrawn)]:
                    self._settle(segment)
            await asyncio.sleep(0)  # whoever was refused withdraws its record now

    async def _group(
        self,
        waiting: list[_Waiter],
        dirty: set[Segment],
        withdrawn: list[tuple[Segment, Record]],
    ) -> None:
        probing = self._failing()
        work = asyncio.get_running_loop().run_in_executor(
            self._thread, self._sync, dirty, withdrawn
        )
        hung = not (await asyncio.wait({work}, timeout=self._timeout_s))[0]
        if hung:
            overdue = OSError(errno.ETIMEDOUT, f"no fsync within {self._timeout_s} s")
            self._on_overdue(overdue)
            _refuse(waiting, str(overdue))
            await asyncio.wait({work})
            self._on_overdue(None)
        errors, gone = work.result()
        for segment in gone:
            segment.withdrew()
        for segment, error in errors.items():
            self._on_failure(segment, error)
            _refuse([waiter for waiter in waiting if waiter.segment is segment], str(error))
        if not errors:
            failpoints.reach("spool.fsynced")
            if hung or (probing and dirty):
                self._on_success()
        for waiter in waiting:
            if not waiter.future.done():
                waiter.future.set_result(None)

    def _sync(
        self, dirty: set[Segment], withdrawn: list[tuple[Segment, Record]]
    ) -> tuple[dict[Segment, OSError], list[Segment]]:
        """In the thread. Returns what failed, and the segment of each record that was withdrawn."""
        errors: dict[Segment, OSError] = {}
        gone: list[Segment] = []
        for segment, record in withdrawn:
            try:
                segment.withdraw(record)
                gone.append(segment)
            except OSError as error:
                _log.error("spool_record_not_withdrawn", spool=segment.id, reason=str(error))
        for segment in dirty.union(gone):
            try:
                segment.sync(self._fsync)
            except OSError as error:
                if segment in dirty:
                    errors[segment] = error
        return errors, gone


def _refuse(waiting: list[_Waiter], reason: str) -> None:
    for waiter in waiting:
        if not waiter.future.done():
            waiter.future.set_exception(SpoolUnavailable(f"the spool is not on disk: {reason}"))
