"""The journal of a worker without a spool directory: it lives as long as its process.

Enough to take back what a lost answer counted while the worker goes on. A worker that is killed
before Redis is back takes its entries with it: `gateway.outage.spool_dir` is for that.
"""

from __future__ import annotations

from collections import deque
from itertools import islice

from core import ids
from gateway.outage.commit import SpoolUnavailable
from gateway.outage.spool import Batch

# Batches of checks that one worker can have lost before Redis is back: one a reconnection.
_MAX_ENTRIES = 10_000


class MemoryJournal:
    """As `Spool`, without a disk. `durable` is False: nothing is served on its word."""

    durable = False

    def __init__(self, max_entries: int = _MAX_ENTRIES) -> None:
        self._id = ids.ulid()
        self._entries: deque[tuple[int, bytes]] = deque()
        self._max_entries = max_entries
        self._last = 0

    @property
    def pending_records(self) -> int:
        return len(self._entries)

    async def append(self, payload: bytes) -> int:
        """As `append_written`."""
        return self.append_written(payload)

    def append_written(self, payload: bytes) -> int:
        """Adds an entry; its sequence.

        Raises:
            SpoolUnavailable: it is full.
        """
        if len(self._entries) >= self._max_entries:
            raise SpoolUnavailable("the journal in memory is full; set gateway.outage.spool_dir")
        self._last += 1
        self._entries.append((self._last, payload))
        return self._last

    async def adopt(self) -> int:
        """Nothing outlives its process."""
        return 0

    async def next_batch(self, count: int = 500) -> Batch | None:
        """The oldest entries that are not `done`."""
        records = list(islice(self._entries, count))
        return Batch(self._id, records) if records else None

    async def done(self, batch: Batch, upto: int | None = None) -> None:
        """Everything up to a sequence is counted."""
        last = batch.records[-1][0] if upto is None else upto
        while self._entries and self._entries[0][0] <= last:
            self._entries.popleft()

    async def close(self) -> None:
        """Entries that were not replayed are lost."""
