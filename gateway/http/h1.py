"""HTTP/1.1 connections of clients: one request at a time is answered.

Reading them is in h1_reader.py, framing answers in h1_exchange.py; here is what holds a connection
together: whose turn it is, back-pressure, and the ways in which it ends.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, cast

from httptools import HttpRequestParser

from gateway.http.base import LINGER_S, descriptor, still_sends
from gateway.http.h1_exchange import Http1Exchange
from gateway.http.h1_reader import RequestReader
from gateway.http.message import STATUS_LINES

if TYPE_CHECKING:
    from gateway.http.server import HttpServer

# How much is read of a connection that we have closed for writing.
_LINGER_BYTES: Final = 64 * 1024 * 1024

_RESET_ON_CLOSE: Final = struct.pack("ii", 1, 0)


class ClientConnection(RequestReader):
    """One connection, and the requests on it one after the other."""

    __slots__ = ("_drain_waiter", "_paused", "_write_paused")

    def __init__(self, server: HttpServer, scheme: str) -> None:
        super().__init__(server, scheme)
        self._paused = False
        self._write_paused = False
        self._drain_waiter: asyncio.Future[None] | None = None

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.peer = peer[0] if isinstance(peer, tuple) else ""
        self.parser = HttpRequestParser(self)
        # Load balancers open connections ahead of their use: silence is idleness, no slow head.
        self.deadline = self._server.tick + self._server.limits.keepalive_s
        self._server.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.closed(self)
        self._transport = None
        self.parser = None  # it refers to this connection's methods: a cycle
        self._held = b""
        for exchange in (self._active, *(self._queue or ())):
            if exchange is not None:
                exchange.lose()
        self._queue = None
        self._active = None
        self._release_drain()

    def pause_writing(self) -> None:
        self._write_paused = True

    def resume_writing(self) -> None:
        self._write_paused = False
        self._release_drain()
        if self._stalled:
            self._stalled = False
            if self._transport is not None and self._lingering < 0:
                self._pause(self._body is not None and self._body.paused)
                self._go_on()

    # Answers

    def _activate(self, exchange: Http1Exchange) -> None:
        self._active = exchange
        self.deadline = 0
        self._server.begin(exchange)

    def finished(self, exchange: Http1Exchange) -> None:
        """The answer of the active exchange is written."""
        if self._active is not exchange or self._transport is None:
            return
        # While draining, an answer that began before did not say that it is the last one.
        if exchange.last or not exchange.body_complete:
            self.close()
            return
        self._active = None
        if self._write_paused:
            # A client that sends requests ahead and reads no answers: none is begun, and nothing
            # more read, until it has taken what there is.
            self._stalled = True
            self._pause(True)
            self.deadline = self._server.tick + self._server.limits.keepalive_s
            return
        self._go_on()

    def _go_on(self) -> None:
        """The next request, or the wait for one."""
        if self._queue:
            self._activate(self._queue.popleft())
            if self._held and not self._must_hold():  # the rest of its body
                self._server.loop.call_soon(self._feed_held)
            return
        limits = self._server.limits
        self.deadline = self._server.tick + (limits.head_s if self._in_head else limits.keepalive_s)
        if self._refusal is not None:
            self._refuse(*self._refusal)
        elif self._held:
            self._server.loop.call_soon(self._feed_held)

    def _refuse(self, status: int, code: str, detail: str) -> None:
        """Answer what is no request, once all before it are answered, and close."""
        self._refusal = (status, code, detail)
        transport = self._transport
        if self._active is not None or self._queue or transport is None:
            return
        headers, body = self._server.refuse(status, code, detail)
        lines = [STATUS_LINES[status], *(b"%b: %b\r\n" % pair for pair in headers)]
        lines += (self._server.date, b"content-length: %d\r\n" % len(body))
        transport.write(b"%bconnection: close\r\n\r\n%b" % (b"".join(lines), body))
        self.close()

    def close(self) -> None:
        """No more answers: close, but let the client read what was written first."""
        transport = self._transport
        if transport is None or self._lingering >= 0:
            return
        self._held = b""
        self._lingering = _LINGER_BYTES
        self.deadline = self._server.tick + LINGER_S + 1
        if self._body is not None:
            self._body.discard()
            self._body = None
        self._pause(False)
        if transport.can_write_eof():
            transport.write_eof()
        else:
            transport.close()

    def expire(self) -> None:
        """The deadline has passed."""
        if self._transport is None:
            return
        self.deadline = 0
        if self._lingering >= 0:
            idle_s = self._server.limits.keepalive_s
            if still_sends(self, self._transport, self._server.tick, idle_s):
                return
            if self._transport.get_write_buffer_size():
                # The end of the connection must not look like the end of the answer.
                self._reset(self._transport)
            else:
                self._transport.abort()
        elif self._in_head and self._head_bytes and not self._stalled:
            self._in_head = False
            self._refuse(408, "request-timeout", "The request took too long to arrive.")
        else:
            self._close_soon(self._transport)

    @property
    def idle(self) -> bool:
        """No request is being answered or received."""
        transport = self._transport
        return (
            self._active is None
            and not self._in_head
            and (transport is None or not transport.get_write_buffer_size())
        )

    @property
    def tasks(self) -> Sequence[asyncio.Task[None]]:
        task = None if self._active is None else self._active.task
        return () if task is None else (task,)

    def leave(self) -> None:
        """Nothing to do: the next answer says that it is the last."""

    def fileno(self) -> int:
        return descriptor(self._transport)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def detach(self) -> tuple[asyncio.Transport, bytes]:
        """Hand the socket over, with what was read of it already."""
        transport = self._transport
        assert transport is not None
        held, self._held = self._held, b""
        self._pause(False)
        self._transport = self.parser = self._active = None
        self.deadline = 0
        self._server.closed(self)
        return transport, held

    def cut(self, reset: bool) -> None:
        """Close without the end of an answer; `reset` where only that tells it from its end."""
        transport = self._transport
        if transport is None:
            return
        if reset:
            self._reset(transport)
        else:
            self._close_soon(transport)

    @staticmethod
    def _reset(transport: asyncio.Transport) -> None:
        sock = transport.get_extra_info("socket")
        if sock is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
        transport.abort()

    def _close_soon(self, transport: asyncio.Transport) -> None:
        """Close once all is written, or after a while where the client takes nothing of it."""
        self._held = b""
        self._lingering = _LINGER_BYTES
        self.deadline = self._server.tick + LINGER_S + 1
        transport.close()

    def write(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.write(data)

    def writelines(self, pieces: Sequence[bytes]) -> None:
        if self._transport is not None:
            self._transport.writelines(pieces)

    @property
    def must_drain(self) -> bool:
        return self._write_paused and self._transport is not None

    async def drain(self) -> None:
        while self._write_paused and self._transport is not None:
            self._drain_waiter = self._server.loop.create_future()
            await self._drain_waiter

    @property
    def server(self) -> HttpServer:
        return self._server

    def _release_drain(self) -> None:
        waiter, self._drain_waiter = self._drain_waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _pause(self, paused: bool) -> None:
        if paused is self._paused or self._transport is None:
            return
        self._paused = paused
        if paused:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()
