"""One pipelined Redis connection for the hot path, on hiredis.

redis-py costs about 6 µs more per request at 64 connections and far more at few (see
`benchmarks/`), which is why the gateway's checks take this way. It does what the hot path needs and
nothing else: commands go out in order, replies come back in order, a time-out or a protocol error
drops the connection, and every waiter is told.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, cast
from urllib.parse import parse_qs, unquote, urlsplit

import hiredis

from core.errors import StoreUnavailableError

Arg = str | bytes | int


class RedisReplyError(Exception):
    """An error reply of the server to one command; the connection is still good."""


class Address:
    """Where a Redis URL points: `redis://`, `rediss://` (TLS) or `unix://`."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("redis", "rediss", "unix", "valkey", "valkeys"):
            raise ValueError("redis.url: use redis://, rediss:// or unix://")
        self.path = unquote(parts.path) if parts.scheme == "unix" else ""
        self.host = parts.hostname or "127.0.0.1"
        self.port = parts.port or 6379
        self.tls = parts.scheme in ("rediss", "valkeys")
        self.username = unquote(parts.username or "")
        self.password = unquote(parts.password or "")
        database = parse_qs(parts.query).get("db", ["0"])[0]
        if parts.scheme != "unix" and parts.path.strip("/"):
            database = parts.path.strip("/")
        self.database = int(database)


class _Replies:
    """Waits for many replies as a future does for one, and gives them to its future together."""

    def __init__(self, future: asyncio.Future[list[Any]], count: int) -> None:
        self.future = future
        self._count = count
        self._replies: list[Any] = []
        self._error: RedisReplyError | None = None

    def done(self) -> bool:
        return False  # replies are counted also when nobody waits any more

    def set_result(self, reply: Any) -> None:
        self._replies.append(reply)
        if len(self._replies) == self._count and not self.future.done():
            if self._error is None:
                self.future.set_result(self._replies)
            else:
                self.future.set_exception(self._error)

    def set_exception(self, error: RedisReplyError | StoreUnavailableError) -> None:
        if isinstance(error, RedisReplyError):
            self._error = self._error or error
            self.set_result(None)
        elif not self.future.done():
            self.future.set_exception(error)


class Connection(asyncio.Protocol):
    """A connected, authenticated connection. Make one with `Connection.open`."""

    def __init__(self) -> None:
        self._reader: Any = hiredis.Reader(notEnoughData=_INCOMPLETE)
        self._waiting: deque[asyncio.Future[Any] | _Replies] = deque()
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self.closed = False
        self.on_close: Callable[[], None] | None = None  # called once, whoever closed it

    @classmethod
    async def open(cls, url: str, timeout_s: float) -> Connection:
        """Connects, authenticates and selects the database.

        Raises:
            StoreUnavailableError: refused, timed out, or the server said no.
        """
        address = Address(url)
        loop = asyncio.get_running_loop()
        connection: Connection | None = None
        try:
            async with asyncio.timeout(timeout_s):
                if address.path:
                    _, connection = await loop.create_unix_connection(cls, address.path)
                else:
                    context = ssl.create_default_context() if address.tls else None
                    _, connection = await loop.create_connection(
                        cls, address.host, address.port, ssl=context
                    )
                if address.password:
                    user = (address.username,) if address.username else ()
                    await connection.execute("AUTH", *user, address.password)
                if address.database:
                    await connection.execute("SELECT", address.database)
        except BaseException as error:
            if connection is not None:
                connection.close()  # not merely dropped: the loop would keep its socket open
            if isinstance(error, OSError | TimeoutError | RedisReplyError):
                raise StoreUnavailableError(f"Redis: {error or 'timed out'}") from error
            raise
        return connection

    def execute(self, *args: Arg) -> asyncio.Future[Any]:
        """Sends one command. The future gives its reply, or raises `RedisReplyError` or
        `StoreUnavailableError`."""
        future: asyncio.Future[Any] = self._loop.create_future()
        if self.closed or self._transport is None:
            future.set_exception(StoreUnavailableError("Redis: connection is closed"))
            return future
        self._waiting.append(future)
        self._transport.write(_pack(args))
        return future

    def execute_many(self, commands: Sequence[tuple[Arg, ...]]) -> asyncio.Future[list[Any]]:
        """Sends commands, one at least. The future gives all replies in order, or raises as
        `execute`: of several errors the first, once every reply is there."""
        replies = _Replies(self._loop.create_future(), len(commands))
        if self.closed or self._transport is None:
            replies.future.set_exception(StoreUnavailableError("Redis: connection is closed"))
            return replies.future
        self._waiting.extend([replies] * len(commands))
        self._transport.write(b"".join(map(_pack, commands)))
        return replies.future

    def close(self, reason: str = "connection closed") -> None:
        """Drops the connection at once; whoever waits is told `reason`."""
        if self.closed:
            return
        self.closed = True
        if self._transport is not None:
            self._transport.abort()
        waiting, self._waiting = self._waiting, deque()
        for future in waiting:
            if not future.done():
                future.set_exception(StoreUnavailableError(f"Redis: {reason}"))
        if self.on_close is not None:
            self.on_close()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass of asyncio.Transport, only alike
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        reader = self._reader
        try:
            reader.feed(data)
            while (reply := reader.gets()) is not _INCOMPLETE:
                future = self._waiting.popleft()
                if future.done():
                    continue
                if isinstance(reply, hiredis.ReplyError):
                    future.set_exception(RedisReplyError(str(reply)))
                else:
                    future.set_result(reply)
        except (hiredis.ProtocolError, IndexError) as error:
            self.close(f"protocol error: {error}")

    def connection_lost(self, exc: Exception | None) -> None:
        self.close(str(exc) if exc else "closed by the server")


_INCOMPLETE = object()
_pack: Callable[[tuple[Arg, ...]], bytes] = cast(Any, hiredis).pack_command  # its stub says one
