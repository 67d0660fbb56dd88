"""The files of a spool directory: made, locked, and adopted when their process has died.

A file is locked (flock) before it gets the name by which others look for it, and for as long as its
process lives. The kernel drops the lock with the process, whatever ended it, so a lock that can be
had means an orphan, and only one process can have it. Whoever gets the lock of a file that is no
longer at its name came too late: it was replayed and removed.

A lock belongs to an open file, and a fork shares it: a process that forks without exec must not
outlive the worker.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from core import ids
from core.telemetry import logs
from gateway.outage.segment import DAMAGED, DATA_START, Report, Segment, ignore, write_all

SUFFIX = ".spool"
NEW = ".new"  # not complete, perhaps not locked yet: holds nothing that anybody was told about

MAGIC = b"TGSPOOL\0"
VERSION = 1
_TRIES = 3
_HEADER = struct.Struct("<8sH26s8s")  # magic, version, id, key
_CRC = struct.Struct("<I")

_log = logs.get_logger()


def create(directory: Path, at_ms: int, report: Report = ignore) -> Segment:
    """A new file, named by the time and locked; its name is on disk after `Segment.sync`.

    Raises:
        OSError: it could not be made; nothing is left of it.
    """
    for _ in range(_TRIES - 1):
        # An adopter may take it for a leftover before it is locked.
        with suppress(BlockingIOError, FileNotFoundError):
            return _create(directory, at_ms, report)
    return _create(directory, at_ms, report)


def _create(directory: Path, at_ms: int, report: Report) -> Segment:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    identity, key = ids.ulid(at_ms), os.urandom(8)
    new, path = directory / (identity + NEW), directory / (identity + SUFFIX)
    fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        header = _HEADER.pack(MAGIC, VERSION, identity.encode(), key)
        block = header + _CRC.pack(zlib.crc32(header))
        # written in full: the slots must have their space when the disk has none left
        write_all(fd, block.ljust(DATA_START, b"\0"), 0)
        new.rename(path)
    except BaseException:
        with suppress(OSError):
            new.unlink()
        os.close(fd)
        raise
    return Segment(path, fd, identity, key, report, fresh=True)


def orphans(
    directory: Path, report: Report = ignore, *, room: int | None = None
) -> Iterator[Segment]:
    """Adopts what dead processes left, oldest first: each is open, locked and recovered.

    A file larger than what is left of `room` bytes is not touched; None is no bound. Files without
    anything to replay are removed, unreadable ones set aside or left, with a log line.
    """
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return
    for name in names:
        path = directory / name
        try:
            if name.endswith(NEW):
                _remove_leftover(path)
            if not name.endswith(SUFFIX):
                continue
            if room is not None and path.stat(follow_symlinks=False).st_size > room:
                continue
            segment = adopt(path, report)
        except FileNotFoundError:
            continue
        except OSError as error:
            _log.error("spool_not_adopted", path=str(path), reason=str(error))
            continue
        if segment is None:
            continue
        if room is not None:
            room -= segment.size
        yield segment


def adopt(path: Path, report: Report = ignore) -> Segment | None:
    """The file of a dead process, recovered; None when it has an owner or nothing to replay.

    Raises:
        OSError: it could not be opened, read or removed.
    """
    fd = _locked(path)
    if fd is None:
        return None
    segment = None
    try:
        info = os.fstat(fd)
        if not stat.S_ISREG(info.st_mode) or info.st_uid != os.geteuid():
            _log.error("spool_not_ours", path=str(path), fix="remove it, or change its owner")
            return None
        segment = _open(path, fd, info.st_size, report)
        if segment is None:
            return None
        segment.recover(info.st_size)
        if not segment.pending:
            segment.remove()
            return None
        fd = -1
        return segment
    finally:
        if segment is None:
            os.close(fd)
        elif fd >= 0:
            segment.close()


def _open(path: Path, fd: int, size: int, report: Report) -> Segment | None:
    block = os.pread(fd, _HEADER.size + _CRC.size, 0)
    header = block[: _HEADER.size]
    if block[_HEADER.size :] != _CRC.pack(zlib.crc32(header)) or header[: len(MAGIC)] != MAGIC:
        if size <= DATA_START:  # records are acknowledged after the header is on disk
            _log.warning("spool_without_header_removed", path=str(path))
            path.unlink()
        else:
            aside = path.with_suffix(DAMAGED)
            path.rename(aside)
            _log.error("spool_header_unreadable", path=str(aside), fix="its records are not read")
            report("damaged", 1)
        return None
    _, version, identity, key = _HEADER.unpack(header)
    if version != VERSION:
        _log.error(
            "spool_version_unknown", path=str(path), version=version, fix="start its release"
        )
        return None
    return Segment(path, fd, identity.decode(), key, report)


def _locked(path: Path) -> int | None:
    """The file, open and locked; None when another has the lock, or it is no longer at `path`."""
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        there, ours = path.stat(follow_symlinks=False), os.fstat(fd)
        if (there.st_ino, there.st_dev) == (ours.st_ino, ours.st_dev):
            return fd
    except (BlockingIOError, FileNotFoundError):
        pass
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _remove_leftover(path: Path) -> None:
    fd = _locked(path)
    if fd is not None:
        path.unlink()
        os.close(fd)
