"""Accepting connections of TLS.

Each one is accepted here rather than by the event loop, for two reasons: a new certificate is used
from the next handshake on, and a handshake that does not end is known of - there is a bound on how
many there are, and on how long each may take.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from typing import TYPE_CHECKING, Final, Protocol

from gateway.http.choice import Agreed

if TYPE_CHECKING:
    from gateway.http.server import HttpServer

_log = logging.getLogger(__name__)

# Connections taken from the kernel's queue in one turn of the loop.
_BATCH: Final = 64
# How long nothing is accepted when there is no descriptor left.
_PAUSE_S: Final = 0.5
# A client that does not answer our good-bye is not waited for longer.
_SHUTDOWN_S: Final = 5.0


class TlsSource(Protocol):
    """Where the context comes from that the next handshake is made with."""

    @property
    def context(self) -> ssl.SSLContext: ...


class TlsListener:
    """Accepts on one bound socket."""

    def __init__(
        self,
        server: HttpServer,
        sock: socket.socket,
        source: TlsSource,
        timeout_s: float,
        handshakes: int,
    ) -> None:
        self._server = server
        self._loop = server.loop
        self._sock = sock
        self._source = source
        self._timeout_s = timeout_s
        self._most = handshakes
        self._handshakes: dict[asyncio.Task[None], None] = {}  # oldest first
        self._closed = False

    def start(self, backlog: int) -> None:
        self._sock.setblocking(False)
        self._sock.listen(backlog)
        self._loop.add_reader(self._sock, self._accept)

    def close(self) -> None:
        """Accept no more; handshakes that were begun are finished."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._sock)
            self._sock.close()

    async def cancel(self) -> None:
        """Give up the handshakes under way."""
        tasks = tuple(self._handshakes)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def handshakes(self) -> int:
        """Those under way."""
        return len(self._handshakes)

    def _accept(self) -> None:
        for _ in range(_BATCH):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                _log.error("cannot accept: %s", error.strerror or error)
                self._loop.remove_reader(self._sock)
                self._loop.call_later(_PAUSE_S, self._resume)
                return
            sock.setblocking(False)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if len(self._handshakes) >= self._most:
                oldest = next(iter(self._handshakes))
                del self._handshakes[oldest]
                oldest.cancel()
            task = self._loop.create_task(self._handshake(sock))
            self._handshakes[task] = None
            task.add_done_callback(self._done)

    def _resume(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._sock, self._accept)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._handshakes.pop(task, None)

    async def _handshake(self, sock: socket.socket) -> None:
        event = self._server.event
        try:
            await self._loop.connect_accepted_socket(
                lambda: Agreed(self._server),
                sock,
                ssl=self._source.context,
                ssl_handshake_timeout=self._timeout_s,
                ssl_shutdown_timeout=_SHUTDOWN_S,
            )
        except ssl.SSLError:
            event("tls_refused")  # no common version, no certificate that we know, or no TLS
        except ConnectionAbortedError:
            event("tls_timeout")  # what asyncio and uvloop raise for one
        except OSError:
            event("tls_closed")
        except asyncio.CancelledError:
            event("tls_timeout")
            sock.close()
            raise
