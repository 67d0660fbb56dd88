"""A server on an event loop in a thread of its own, for tests that are not asynchronous."""

from __future__ import annotations

import asyncio
import threading
from abc import abstractmethod
from typing import Self


class ThreadedServer:
    """A context manager; listens on `port`. `limit` is the longest line its readers take."""

    def __init__(self, limit: int) -> None:
        self.port = 0
        self._limit = limit
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    @abstractmethod
    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None: ...

    def _run(self) -> None:
        async def listen() -> None:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=self._limit)
            self.port = server.sockets[0].getsockname()[1]
            self._ready.set()

        self._loop.create_task(listen())
        self._loop.run_forever()
