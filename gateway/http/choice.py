"""Which protocol a client speaks: by what TLS agreed on, or by its first bytes."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, cast

from gateway.http.base import Connection, descriptor
from gateway.http.h1 import ClientConnection
from gateway.http.h2 import Http2Connection

if TYPE_CHECKING:
    from gateway.http.server import HttpServer

# What tells HTTP/2 from any request of HTTP/1.1.
_SIGN: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Agreed(asyncio.Protocol):
    """A connection of TLS: its handshake is done when it is made, and names the protocol."""

    __slots__ = ("_server",)

    def __init__(self, server: HttpServer) -> None:
        self._server = server

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)
        agreed = transport.get_extra_info("ssl_object").selected_alpn_protocol()
        protocol = Http2Connection if agreed == "h2" else ClientConnection
        _become(transport, protocol(self._server, "https"))


class FirstBytes(Connection):
    """A connection without TLS, until its first bytes tell HTTP/2 from HTTP/1.1."""

    __slots__ = ("_seen", "_server", "_transport")

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._seen = b""
        self.deadline = 0
        self.unsent = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.deadline = self._server.tick + self._server.limits.keepalive_s
        self._server.opened(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.closed(self)
        self._transport = None

    def data_received(self, data: bytes) -> None:
        transport = self._transport
        if transport is None:
            return
        seen = self._seen = self._seen + data
        if len(seen) < len(_SIGN) and _SIGN.startswith(seen):
            if seen == data:
                self.deadline = self._server.tick + self._server.limits.head_s
            return
        self._server.closed(self)
        self._transport = None
        protocol = Http2Connection if seen.startswith(_SIGN) else ClientConnection
        connection = protocol(self._server, "http")
        _become(transport, connection)
        connection.data_received(seen)

    @property
    def idle(self) -> bool:
        return not self._seen

    @property
    def tasks(self) -> Iterable[asyncio.Task[None]]:
        return ()

    def fileno(self) -> int:
        return descriptor(self._transport)

    def leave(self) -> None:
        """Nothing to do: nothing was asked yet."""

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def expire(self) -> None:
        self.close()


def _become(transport: asyncio.Transport, protocol: asyncio.Protocol) -> None:
    transport.set_protocol(protocol)
    protocol.connection_made(transport)
