"""An exchange over one stream of HTTP/2."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from gateway.http.errors import ClientDisconnected
from gateway.http.exchange import Exchange
from gateway.http.h2_request import CONNECTION_FIELDS
from gateway.http.message import NO_BODY, Header, Request

if TYPE_CHECKING:
    from gateway.http.h2 import Http2Connection

# Of an answer, what waits in memory for a client that makes no room; writers go on below the other.
_HIGH_WATER: Final = 64 * 1024
_LOW_WATER: Final = 16 * 1024


class Http2Exchange(Exchange):
    """Attributes:
    unsent: bytes of the answer's body that wait for room.
    moved: the second in which the answer was begun, or some of it was last sent.
    trailers_out: trailer fields that end the answer.
    """

    __slots__ = (
        "_conn",
        "_left",
        "_pieces",
        "_waiter",
        "moved",
        "stream",
        "trailers_out",
        "unsent",
    )

    def __init__(self, request: Request, conn: Http2Connection, stream: int) -> None:
        super().__init__(request)
        self.stream = stream
        self.unsent = 0
        self.moved = conn.server.tick
        self.trailers_out: Sequence[Header] = ()
        self._conn = conn
        self._pieces: deque[bytes | memoryview] = deque()
        self._left = -1  # bytes of a declared length still to be written; -1 when none was
        self._waiter: asyncio.Future[None] | None = None

    def _head(self, status: int, headers: Sequence[Header], length: int) -> list[Header]:
        fields = [pair for pair in headers if pair[0] not in CONNECTION_FIELDS]
        joined = b"".join([piece for pair in fields for piece in pair])
        if b"\n" in joined or b"\r" in joined or b"\0" in joined:
            raise ValueError("a header field contains a line break")
        head = [(b":status", b"%d" % status), *fields]
        if all(pair[0] != b"date" for pair in fields):
            head.append(self._conn.server.date_field)
        if length >= 0 and status != 204:
            head.append((b"content-length", b"%d" % length))
        return head

    def respond(
        self, status: int, headers: Sequence[Header], body: bytes = b"", length: int = -1
    ) -> None:
        if self.started or self.ended:
            raise RuntimeError("answered twice")
        if self.request.method == "HEAD" or status in NO_BODY:
            if length < 0:
                length = len(body) or -1
            body = b""
        else:
            length = len(body)
        head = self._head(status, headers, length)
        self.started = self.ended = True
        if self.gone:
            return
        self.moved = self._conn.server.tick
        if body:
            self._conn.send_head(self.stream, head)
            self._queue(body)
        else:
            self._conn.send_head(self.stream, head, last=True)
            self._conn.finished(self)

    def start(self, status: int, headers: Sequence[Header], length: int = -1) -> None:
        if self.started or self.ended:
            raise RuntimeError("answered twice")
        head = self._head(status, headers, length)
        bodiless = self.request.method == "HEAD" or status in NO_BODY
        self._left = 0 if bodiless else length
        self.started = True
        if not self.gone:
            self._conn.send_head(self.stream, head)

    def write(self, data: bytes) -> None:
        if self.ended or self.gone or not data:
            return
        if self._left >= 0:
            data = data[: self._left]
            self._left -= len(data)
        if data:
            self._queue(data)

    def end(self, trailers: Sequence[Header] = ()) -> None:
        if self.ended:
            return
        if self._left > 0:
            self.abort()
            return
        self.ended = True
        joined = b"".join([piece for pair in trailers for piece in pair])
        if b"\n" not in joined and b"\r" not in joined:
            self.trailers_out = trailers
        if not self.gone:
            self.moved = self._conn.server.tick
            self._conn.send_body(self)

    def inform(self, status: int, headers: Sequence[Header]) -> None:
        if not self.started and not self.gone:
            self._conn.send_head(self.stream, [(b":status", b"%d" % status), *headers])

    def abort(self) -> None:
        if not self.ended:
            self.ended = True
            if not self.gone:
                self._forget()
                self._conn.cancel(self)

    @property
    def must_drain(self) -> bool:
        return self.unsent > _HIGH_WATER and not self.gone

    async def drain(self) -> None:
        while self.unsent > _LOW_WATER and not self.gone:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self.gone:
            raise ClientDisconnected("the client closed the connection")

    async def read(self) -> bytes:
        body = self.body
        if body is None:
            return b""
        if self.expects:
            self.expects = False
            if not body.unread and not body.complete:
                self.inform(100, ())
        data = await body.read()
        if data:
            self._conn.acknowledge(self.stream, len(data))
        return data

    # For the connection

    def take(self, size: int) -> bytes | memoryview:
        """The next `size` bytes of the answer's body, or fewer, for sending."""
        piece = self._pieces.popleft()
        if len(piece) > size:
            piece = memoryview(piece)
            self._pieces.appendleft(piece[size:])
            piece = piece[:size]
        self.unsent -= len(piece)
        if self.unsent <= _LOW_WATER:
            self._release()
        return piece

    def lose(self) -> None:
        """The stream or its connection is closed."""
        self._forget()
        super().lose()

    def _queue(self, data: bytes) -> None:
        if not self.unsent:
            self.moved = self._conn.server.tick
        self._pieces.append(data)
        self.unsent += len(data)
        self._conn.send_body(self)

    def _forget(self) -> None:
        self._pieces.clear()
        self.unsent = 0
        self._release()

    def _release(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)
