"""A TCP door in front of a server, on a thread of its own: what it does can be changed at any time.

open    passes everything on
deaf    passes requests on and drops the answers: the server does what it is asked, and nobody
        learns of it
shut    cuts what is open and takes nothing new
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit, urlunsplit

Mode = Literal["open", "deaf", "shut"]


class Door:
    """A context manager. `url` leads to the server of `target`, which `lead_to` changes."""

    def __init__(self, target: str) -> None:
        self._target = urlsplit(target)
        self._mode: Mode = "open"
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.dropped = 0  # answers that were dropped, in pieces as they came

    def __enter__(self) -> Door:
        self._thread.start()
        starting = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop
        )
        self._server = starting.result(10)
        self._port = self._server.sockets[0].getsockname()[1]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.set("shut")
        self._do(self._server.close)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    @property
    def url(self) -> str:
        """The target's URL, through this door."""
        login, _, _ = self._target.netloc.rpartition("@")
        netloc = f"{login}@127.0.0.1:{self._port}" if login else f"127.0.0.1:{self._port}"
        return urlunsplit(self._target._replace(netloc=netloc))

    def set(self, mode: Mode) -> None:
        """Takes effect at once. Connections that were deaf or are shut out do not come back."""

        def change() -> None:
            if mode == "shut" or self._mode == "deaf":
                for writer in self._open:
                    writer.transport.abort()
            self._mode = mode

        self._do(change)

    def lead_to(self, target: str) -> None:
        """Another server, of the same password; connections to the one before are cut."""

        def change() -> None:
            self._target = urlsplit(target)
            for writer in self._open:
                writer.transport.abort()

        self._do(change)

    def _do(self, change: Callable[[], object]) -> None:
        async def run() -> None:
            change()

        asyncio.run_coroutine_threadsafe(run(), self._loop).result(10)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._mode == "shut":
            writer.transport.abort()
            return
        try:
            far = await asyncio.open_connection(self._target.hostname, self._target.port)
        except OSError:
            writer.transport.abort()
            return
        both = {writer, far[1]}
        self._open |= both
        try:
            await asyncio.gather(
                self._copy(reader, far[1], answers=False),
                self._copy(far[0], writer, answers=True),
                return_exceptions=True,
            )
        finally:
            self._open -= both

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool
    ) -> None:
        try:
            while data := await reader.read(65536):
                if answers and self._mode == "deaf":
                    self.dropped += 1
                else:
                    writer.write(data)
        finally:
            writer.transport.abort()
