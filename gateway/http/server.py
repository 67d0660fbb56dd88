"""Listens, hands requests to a handler, and looks after connections that do nothing.

One timer a server looks over all connections once a second: an idle or slow client costs no timer
of its own, and a request none at all.
"""

from __future__ import annotations

import asyncio
import select
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from email.utils import formatdate
from functools import partial
from typing import Final

from core import clock
from gateway.http.base import Connection
from gateway.http.choice import FirstBytes
from gateway.http.exchange import Exchange, Handler, Tunnel
from gateway.http.h1 import ClientConnection
from gateway.http.message import Header
from gateway.http.tls import TlsListener, TlsSource

_SWEEP_S: Final = 1.0
_BACKLOG: Final = 2_048
# While draining, how long an idle connection may still bring one more request: a client that sends
# at the moment we close would lose it.
_IDLE_GRACE_S: Final = 1.0
_DRAIN_POLL_S: Final = 0.05
# How long tunnels may take to end once they were told to.
_GOODBYE_S: Final = 1.0

# Handshakes of TLS at once; beyond, the oldest one is given up.
HANDSHAKES: Final = 1_024

Refuse = Callable[[int, str, str], tuple[list[Header], bytes]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a client may cost. Seconds and bytes.

    Attributes:
        head: request line and header fields together.
        target: path and query.
        fields: number of header fields.
        head_s: from the first byte of a head to its last.
        keepalive_s: how long a connection may be idle; longer than load balancers keep theirs, or
            they would use one that we are just closing.
        connections: open at once; beyond, an idle one is closed for a new one.
        streams: requests at once on one connection of HTTP/2.
        stream_window, connection_window: of request bodies, what a client of HTTP/2 may send ahead
            of their being read; this is memory.
    """

    head: int = 64 * 1024
    target: int = 16 * 1024
    fields: int = 128
    head_s: int = 15
    keepalive_s: int = 75
    connections: int = 65_536
    streams: int = 128
    stream_window: int = 256 * 1024
    connection_window: int = 1024 * 1024


class HttpServer:
    """Serves any number of listening sockets with one handler, on the running event loop.

    Attributes:
        tick: seconds since some start, whole; deadlines are in it.
        date: the Date field of this second; `date_field` is the same as a pair.
        h2c: HTTP/2 is spoken without TLS too, with those who begin with its preface.
        draining: answers are the last on their connections.
    """

    def __init__(
        self,
        handler: Handler,
        *,
        limits: Limits | None = None,
        refuse: Refuse,
        event: Callable[[str], object] | None = None,
        h2c: bool = False,
        handshake_timeout_s: float = 10.0,
    ) -> None:
        """`refuse` makes the answer to what is no request: of status, code and a sentence.

        `event` is told what connections were ended for, other than HTTP/1.1's own reasons:
        tls_timeout, tls_refused, tls_closed, h2_protocol, h2_resets, h2_flood, h2_headers,
        h2_continuations; and grpc, a call that was answered as unimplemented.
        """
        self.loop = asyncio.get_running_loop()
        self.limits = limits or Limits()
        self.refuse = refuse
        self.event = event or _unheard
        self.h2c = h2c
        self.draining = False
        self._handler = handler
        self._handshake_timeout_s = handshake_timeout_s
        self._servers: list[asyncio.Server | TlsListener] = []
        self._listeners: list[TlsListener] = []  # also those that are closed: of their handshakes
        self._connections: set[Connection] = set()
        self._tunnels: set[Tunnel] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._sweep()

    async def listen(
        self, sock: socket.socket, tls: TlsSource | None = None, backlog: int = _BACKLOG
    ) -> None:
        """Accept connections on a bound socket; with TLS, under whatever `tls.context` is then."""
        if tls is not None:
            listener = TlsListener(self, sock, tls, self._handshake_timeout_s, HANDSHAKES)
            listener.start(backlog)
            self._servers.append(listener)
            self._listeners.append(listener)
            return
        if self.h2c:
            server = await self.loop.create_server(
                lambda: FirstBytes(self), sock=sock, backlog=backlog
            )
        else:
            server = await self.loop.create_server(
                lambda: ClientConnection(self, "http"), sock=sock, backlog=backlog
            )
        self._servers.append(server)

    @property
    def connections(self) -> int:
        """Connections that are open."""
        return len(self._connections)

    def stop_accepting(self) -> None:
        """Close the listening sockets; what is connected stays."""
        for server in self._servers:
            server.close()
        self._servers.clear()

    async def drain(self, seconds: float) -> None:
        """Stop accepting, answer what is under way for so long, then close everything."""
        self.stop_accepting()
        self.draining = True
        for connection in tuple(self._connections):
            connection.leave()
        now = began = clock.monotonic()
        end, grace = now + seconds, min(_IDLE_GRACE_S, seconds / 2)
        # Tunnels do not end by themselves, and their clients can connect elsewhere: they are told
        # within half of the time, one after another, so that not all come back at once.
        tunnels = list(self._tunnels)
        pace = len(tunnels) / max(seconds / 2, _DRAIN_POLL_S)
        told = 0
        idle_since: dict[Connection, float] = {}
        while self._left and now < end:
            idle = [connection for connection in self._connections if connection.idle]
            idle_since = {connection: idle_since.get(connection, now) for connection in idle}
            for connection in _silent(c for c, since in idle_since.items() if since + grace <= now):
                connection.close()
            while told < len(tunnels) and told <= pace * (now - began):
                tunnels[told].going_away()
                told += 1
            await asyncio.sleep(_DRAIN_POLL_S)
            now = clock.monotonic()
        await self._end_tunnels()
        await self.close()

    @property
    def _left(self) -> bool:
        """There is somebody to be served, or about to be there: in the middle of a handshake."""
        handshakes = any(listener.handshakes for listener in self._listeners)
        return bool(self._connections or self._tunnels or handshakes)

    async def _end_tunnels(self) -> None:
        """Each says goodbye in its own protocol, and has a moment to be heard."""
        for tunnel in tuple(self._tunnels):
            tunnel.going_away()
        end = clock.monotonic() + _GOODBYE_S
        while self._tunnels and clock.monotonic() < end:  # noqa: ASYNC110 - rare
            await asyncio.sleep(_DRAIN_POLL_S)

    async def close(self) -> None:
        """Close everything at once."""
        self.stop_accepting()
        for listener in self._listeners:
            await listener.cancel()
        tasks = [task for connection in self._connections for task in connection.tasks]
        tasks += [tunnel.task for tunnel in self._tunnels if tunnel.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for connection in tuple(self._connections):
            connection.abort()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # For connections

    def begin(self, exchange: Exchange) -> None:
        """Run the handler on a request."""
        exchange.task = self.loop.create_task(self._handler(exchange))

    def opened(self, connection: Connection) -> None:
        if len(self._connections) >= self.limits.connections:
            for other in self._connections:
                if other.idle:
                    other.abort()
                    break
            else:
                connection.abort()
        self._connections.add(connection)

    def closed(self, connection: Connection) -> None:
        self._connections.discard(connection)

    def took_over(self, tunnel: Tunnel) -> None:
        """A connection goes on as something else than HTTP."""
        self._tunnels.add(tunnel)
        tunnel.on_closed = partial(self._tunnels.discard, tunnel)
        if self.draining:
            self.loop.call_soon(tunnel.going_away)

    def _sweep(self) -> None:
        self._timer = self.loop.call_later(_SWEEP_S, self._sweep)
        tick = self.tick = int(self.loop.time())
        date = formatdate(clock.now_ms() / 1000, usegmt=True).encode()
        self.date = b"date: %b\r\n" % date
        self.date_field: Header = (b"date", date)
        for connection in tuple(self._connections):
            if 0 < connection.deadline <= tick:
                connection.expire()


def _unheard(_: str) -> None: ...


def _silent(connections: Iterable[Connection]) -> list[Connection]:
    """Those of which nothing waits to be read: closed now, a request would be lost."""
    found = {connection.fileno(): connection for connection in connections}
    poll = select.poll()
    for fd in found:
        if fd >= 0:
            poll.register(fd, select.POLLIN)
    unread = {fd for fd, _ in poll.poll(0)}
    return [connection for fd, connection in found.items() if fd not in unread]
