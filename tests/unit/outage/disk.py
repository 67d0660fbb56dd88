"""A disk that does as it is told, and what the tests of a spool do with one."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path

from gateway.outage.spool import Spool

NOW = 1_790_000_000_000
BIG = 1 << 20


class Disk:
    """An fsync that counts, and fails or hangs when told to; and the time of its spool."""

    def __init__(self) -> None:
        self.syncs = 0
        self.error: int | None = None
        self.go = threading.Event()
        self.go.set()
        self.seconds = 0.0

    def fsync(self, fd: int) -> None:
        self.go.wait(30)
        self.syncs += 1
        if self.error is not None:
            raise OSError(self.error, os.strerror(self.error))
        os.fdatasync(fd)

    def spool(
        self, directory: Path, max_bytes: int = BIG, *, timeout_s: float = 60.0, **more: object
    ) -> Spool:
        return Spool(
            directory,
            max_bytes,
            now_ms=lambda: NOW + int(self.seconds * 1000),
            monotonic=lambda: self.seconds,
            fsync=self.fsync,
            timeout_s=timeout_s,
            **more,  # type: ignore[arg-type]
        )


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def inner() -> None:
        await main()

    asyncio.run(inner())


async def drain(spool: Spool, count: int = 7) -> list[tuple[str, int, bytes]]:
    found: list[tuple[str, int, bytes]] = []
    while (batch := await spool.next_batch(count)) is not None:
        found += [(batch.spool_id, *record) for record in batch.records]
        await spool.done(batch)
    return found
