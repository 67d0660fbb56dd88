"""A request body between the socket, which delivers, and the handler, which reads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from gateway.http.errors import ExchangeError
from gateway.http.message import Header

# Above this many unread bytes the client is told to wait: an upload that nobody reads costs a
# bounded amount of memory. One read under uvloop delivers up to 256,000 bytes on top of it.
HIGH_WATER: Final = 64 * 1024


class Body:
    """Attributes:
    complete: the last byte has arrived.
    unread: bytes that have arrived and were not read.
    trailers: fields that followed it.
    """

    __slots__ = (
        "_chunks",
        "_error",
        "_on_flow",
        "_paused",
        "_waiter",
        "complete",
        "trailers",
        "unread",
    )

    def __init__(self, on_flow: Callable[[bool], object]) -> None:
        """`on_flow` is told True when the client should pause, False when it may go on."""
        self._on_flow = on_flow
        self._chunks: list[bytes] = []
        self._paused = False
        self._error: ExchangeError | None = None
        self._waiter: asyncio.Future[None] | None = None
        self.unread = 0
        self.complete = False
        self.trailers: list[Header] = []

    @property
    def paused(self) -> bool:
        """The client was told to pause."""
        return self._paused

    def feed(self, data: bytes) -> None:
        self._chunks.append(data)
        self.unread += len(data)
        if self.unread > HIGH_WATER and not self._paused:
            self._paused = True
            self._on_flow(True)
        self._wake()

    def finish(self) -> None:
        if self._error is not None:
            return
        self.complete = True
        if self._paused:
            self._paused = False
            self._on_flow(False)
        self._wake()

    def fail(self, error: ExchangeError) -> None:
        """What has arrived is still read; after that `read` raises."""
        if not self.complete and self._error is None:
            self._error = error
            self._wake()

    def discard(self) -> None:
        """Nobody will read: what there is goes, what comes is to be dropped by whoever feeds."""
        self._chunks = []
        self.unread = 0

    async def read(self) -> bytes:
        """All that is there; waits for something, and returns nothing at the end of the body."""
        while not self._chunks:
            if self.complete:
                return b""
            if self._error is not None:
                raise self._error
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        chunks, self._chunks = self._chunks, []
        self.unread = 0
        if self._paused:
            self._paused = False
            self._on_flow(False)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
