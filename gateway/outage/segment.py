"""The records of one file of a spool: written, recovered after a crash, read, marked as replayed.

Layout, little endian; three pages, then the records:

    0      magic, version, id (26 characters), key (8 random bytes), CRC-32
    4096   slot A: sequence and offset up to which everything is replayed, CRC-32
    8192   slot B: the same; the two are written in turn, so that a torn write leaves the other
    12288  records: marker, kind, length, sequence, time in ms, CRC-32 of these and the payload

The marker is the first half of the key, and every CRC starts from the key: a payload, whose content
a client may choose, cannot be made to look like a record when the file is searched for the next
readable one.

Progress is kept in place and not in a file of its own: on a full disk, where a new
file could not be written, the replay must still be able to free space.

What a crash leaves behind
  while a record is written   a torn tail, which recovery cuts off: nobody was told it is there
  before the slot is synced   the records come again with the same id and sequence
  before the file is removed  a file with nothing to replay, which the next adopter removes
"""

from __future__ import annotations

import errno
import os
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from core import failpoints
from core.telemetry import logs

DAMAGED = ".damaged"  # kept for a person: something in it could not be read

PAGE = 4096
DATA_START = 3 * PAGE
MAX_PAYLOAD = 1 << 20  # bytes; a length above it is not one of ours

_SLOT = struct.Struct("<QQ")
_RECORD = struct.Struct("<4sIIQQ")
_CRC = struct.Struct("<I")
OVERHEAD = _RECORD.size + _CRC.size
_DATA, _VOID = 0, 1
_GUESS = 4096  # bytes read at first: most records fit, and need one call
_CHUNK = 1 << 18
_BATCH_BYTES = 4 << 20  # read at once, so that memory does not depend on what was spooled

_log = logs.get_logger()

# Told of what went wrong, for metrics: the event, and bytes or records.
#   tail_cut (bytes), lost (records in an unreadable stretch), damaged (1, a file set aside)
Report = Callable[[str, int], None]
Fsync = Callable[[int], None]


def ignore(_event: str, _amount: int) -> None:
    """A report to nobody."""


class Record(NamedTuple):
    """Where a record is: [offset, next). `payload` is None when it was withdrawn."""

    offset: int
    next: int
    sequence: int
    at_ms: int
    payload: bytes | None


class Segment:
    """An open, locked file. Not thread-safe; the owner orders its calls.

    Attributes:
        id: names the file for ever; with a sequence it names a record.
        size: bytes that count; where the next record goes.
        last: the sequence written last, 0 at first.
        done: everything up to this sequence is replayed.
        pending: records that are to be replayed.
        oldest_ms: when the oldest of them was written, epoch ms; 0 without any.
        unsettled: writes whose fate is open; the owner's own book-keeping.
        fresh: its name may not be on disk yet.
    """

    def __init__(
        self,
        path: Path,
        fd: int,
        identity: str,
        key: bytes,
        report: Report = ignore,
        *,
        fresh: bool = False,
    ) -> None:
        self.path = path
        self.id = identity
        self.size = DATA_START
        self.last = 0
        self.done = 0
        self.pending = 0
        self.oldest_ms = 0
        self.unsettled = 0
        self.fresh = fresh
        self.damaged = False
        self.fd = fd
        self._marker = key[:4]
        self._crc = zlib.crc32(key)
        self._report = report
        self._done_offset = DATA_START
        self._slot = 0  # the one to be written next
        self._known_gaps = 0  # unreadable stretches before this offset were reported

    def recover(self, size: int) -> None:
        """Reads a file of `size` bytes that another process left: counts, progress, torn tail.

        Raises:
            OSError: the disk does not give it.
        """
        slots = [self._read_slot(0), self._read_slot(1)]
        self.done, offset = max(slots)
        self._slot = 1 - slots.index(max(slots))
        self.size = size
        self._done_offset = min(max(offset, DATA_START), max(size, DATA_START))
        self.last, end = self.done, self._done_offset
        for record in self._scan(self.done + 1, live=False):
            self.last, end = record.sequence, record.next
            if record.payload is not None:
                self.pending += 1
                self.oldest_ms = self.oldest_ms or record.at_ms
        if end < size:
            _log.warning("spool_tail_cut", path=str(self.path), offset=end, bytes=size - end)
            self._report("tail_cut", size - end)
            os.ftruncate(self.fd, end)
        self.size = end

    @property
    def pending_bytes(self) -> int:
        return self.size - self._done_offset if self.pending else 0

    def write(self, payload: bytes, now_ms: int) -> Record:
        """Appends a record: it survives the process from here on, the machine once synced.

        Raises:
            OSError: it is not there.
        """
        offset, sequence = self.size, self.last + 1
        head = _RECORD.pack(self._marker, _DATA, len(payload), sequence, now_ms)
        crc = zlib.crc32(payload, zlib.crc32(head, self._crc))
        try:
            write_all(self.fd, b"".join((head, _CRC.pack(crc), payload)), offset)
        except OSError:
            # Should this fail too, the next record overwrites the torn one, or recovery cuts it.
            with suppress(OSError):
                os.ftruncate(self.fd, offset)
            raise
        self.last = sequence
        self.size = offset + OVERHEAD + len(payload)
        self.pending += 1
        self.oldest_ms = self.oldest_ms or now_ms
        return Record(offset, self.size, sequence, now_ms, None)

    def withdraw(self, record: Record) -> None:
        """Makes a record one that is never replayed: its request was not served.

        Raises:
            OSError: it may still be replayed.
        """
        length = record.next - record.offset - OVERHEAD
        head = _RECORD.pack(self._marker, _VOID, length, record.sequence, record.at_ms)
        block = head + _CRC.pack(zlib.crc32(head, self._crc))
        write_all(self.fd, block, record.offset)

    def withdrew(self) -> None:
        """Counts what `withdraw`, which may run in a thread beside `write`, has done."""
        self.pending -= 1
        if not self.pending:
            self.oldest_ms = 0

    def sync(self, fsync: Fsync) -> None:
        """Returns when everything written is on disk, and its name too.

        Raises:
            OSError: what was written since the last success may or may not be.
        """
        fsync(self.fd)
        if os.fstat(self.fd).st_nlink == 0:
            raise FileNotFoundError(errno.ENOENT, "the file was removed", str(self.path))
        if self.fresh:
            sync_directory(self.path.parent)
            sync_directory(self.path.parent.parent)  # it may be as new
            self.fresh = False

    def read(self, first: int, count: int) -> list[tuple[int, bytes]]:
        """Up to `count` records (sequence, payload), or some 4 MiB, from sequence `first` on.

        Withdrawn and unreadable ones are left out, the latter with a report.

        Raises:
            OSError: the disk does not give them.
        """
        found: list[tuple[int, bytes]] = []
        size = 0
        for record in self._scan(first):
            if record.payload is not None:
                found.append((record.sequence, record.payload))
                size += len(record.payload)
                if len(found) == count or size >= _BATCH_BYTES:
                    break
        return found

    def mark(self, sequence: int, fsync: Fsync) -> None:
        """Everything up to `sequence` is replayed: on disk when this returns.

        Raises:
            OSError: it may come again.
        """
        if sequence <= self.done:
            return
        passed, offset, oldest_ms = self.pending, self.size, 0
        count = 0
        for record in self._scan(self.done + 1):
            if record.payload is None:
                continue
            if record.sequence > sequence:
                passed, offset, oldest_ms = count, record.offset, record.at_ms
                break
            count += 1
        slot = _SLOT.pack(sequence, offset)
        crc = _CRC.pack(zlib.crc32(slot, self._crc))
        write_all(self.fd, slot + crc, PAGE * (1 + self._slot))
        fsync(self.fd)
        self._slot = 1 - self._slot
        self.done, self._done_offset = sequence, offset
        self.pending -= passed
        self.oldest_ms = oldest_ms
        failpoints.reach("spool.done")

    def remove(self) -> None:
        """Frees the space of a file whose records are all replayed, or can never be."""
        with suppress(FileNotFoundError):  # somebody was quicker, perhaps with all of the directory
            if self.damaged:
                self.path.rename(self.path.with_suffix(DAMAGED))
                self._report("damaged", 1)
            else:
                self.path.unlink()
        self.close()
        with suppress(FileNotFoundError):
            sync_directory(self.path.parent)
        failpoints.reach("spool.removed")

    def discard(self) -> None:
        """Removes a file without records; never fails: an empty one is no orphan's loss."""
        with suppress(OSError):
            self.path.unlink()
        self.close()

    def close(self) -> None:
        """Gives the lock back: what is pending belongs to whoever adopts it."""
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def _scan(self, first: int, *, live: bool = True) -> Iterator[Record]:
        """Records from sequence `first` on; what cannot be read is searched for the next one.

        `live`: all up to `last` is there, so that a missing end is a loss and not a torn tail.
        """
        before, offset = 0, DATA_START  # `before` is the sequence read last
        if first > self.done:
            before, offset = self.done, self._done_offset
        while offset < self.size:
            record = self._record_at(offset)
            if record is None or record.sequence <= before:
                record = self._next_readable(offset, before)
                if record is None:
                    if live:
                        self._gap(offset, self.size, self.last - before)
                    return
                self._gap(offset, record.offset, record.sequence - before - 1)
            before, offset = record.sequence, record.next
            if record.sequence >= first:
                yield record

    def _record_at(self, offset: int) -> Record | None:
        block = os.pread(self.fd, _GUESS, offset)
        if len(block) < OVERHEAD:
            return None
        marker, kind, length, sequence, at_ms = _RECORD.unpack_from(block)
        after = offset + OVERHEAD + length
        if marker != self._marker or length > MAX_PAYLOAD or after > self.size:
            return None
        crc = zlib.crc32(block[: _RECORD.size], self._crc)
        payload = None
        if kind == _DATA:
            payload = block[OVERHEAD : OVERHEAD + length]
            if len(payload) < length:
                payload += os.pread(self.fd, length - len(payload), offset + len(block))
            crc = zlib.crc32(payload, crc)
        if block[_RECORD.size : OVERHEAD] != _CRC.pack(crc):
            return None
        return Record(offset, after, sequence, at_ms, payload)

    def _next_readable(self, offset: int, before: int) -> Record | None:
        at = offset + 1
        while at < self.size:
            block = os.pread(self.fd, _CHUNK, at)
            found = block.find(self._marker)
            while found >= 0:
                record = self._record_at(at + found)
                if record is not None and record.sequence > before:
                    return record
                found = block.find(self._marker, found + 1)
            if len(block) < len(self._marker):
                return None
            at += len(block) - len(self._marker) + 1
        return None

    def _gap(self, start: int, end: int, lost: int) -> None:
        self.damaged = True
        if start < self._known_gaps:
            return
        self._known_gaps = end
        _log.error(
            "spool_unreadable", path=str(self.path), start=start, end=end, records=lost,
            fix="what these requests cost is not counted; the file is kept as .damaged",
        )  # fmt: skip
        self._report("lost", lost)

    def _read_slot(self, index: int) -> tuple[int, int]:
        block = os.pread(self.fd, _SLOT.size + _CRC.size, PAGE * (1 + index))
        slot = block[: _SLOT.size]
        if block[_SLOT.size :] != _CRC.pack(zlib.crc32(slot, self._crc)):
            return 0, DATA_START
        sequence, offset = _SLOT.unpack(slot)
        return sequence, offset


def write_all(fd: int, block: bytes, offset: int) -> None:
    """pwrite, until all of it is written.

    Raises:
        OSError: a part of it may be.
    """
    written = os.pwrite(fd, block, offset)
    while written < len(block):
        count = os.pwrite(fd, memoryview(block)[written:], offset + written)
        if count == 0:
            raise OSError(errno.EIO, "nothing was written")
        written += count


def sync_directory(directory: Path) -> None:
    """Makes names that were added, changed or removed in it durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
