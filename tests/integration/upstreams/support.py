"""A pool on the test's own loop, real sockets behind it, and an exchange in front."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from core.upstream import Upstream
from gateway.http.errors import ExchangeError
from gateway.http.message import Request
from gateway.proxy.pool import UpstreamPool
from gateway.proxy.relay import Outcome, relay
from gateway.proxy.request import RequestRules
from tests.integration.proxy.raw import Peer, RawUpstream, Script, ok
from tests.support.exchange import RecordingExchange

_RULES = RequestRules()


class Body(RecordingExchange):
    """An exchange whose client sends a body."""

    def __init__(self, request: Request, body: bytes) -> None:
        super().__init__(request)
        self._body = body

    async def read(self) -> bytes:
        body, self._body = self._body, b""
        return body


async def ask(
    pool: UpstreamPool,
    method: str = "GET",
    path: str = "/x",
    *,
    body: bytes = b"",
    key: bytes = b"",
    before_start: Callable[[int], Awaitable[None]] | None = None,
) -> tuple[int | str, bytes]:
    """One request: status and body, or the code of what went wrong and nothing."""
    headers = [(b"host", b"api.example")]
    if body:
        headers.append((b"content-length", b"%d" % len(body)))
    request = Request(method, path.encode(), headers, peer="192.0.2.1")
    if body:
        request.body_length = len(body)
    exchange = Body(request, body)
    try:
        result = await relay(
            exchange,
            pool=pool,
            head=_RULES.head(request),
            balance_key=key,
            before_start=before_start,
        )
    except ExchangeError as error:
        return error.code, b""
    if result.outcome is not Outcome.COMPLETE:
        assert exchange.aborted
        return result.error.code if result.error else str(result.outcome), b""
    status, _, answer = exchange.answers[-1]
    return status, answer


@contextlib.asynccontextmanager
async def pool_of(*urls: str, **settings: Any) -> AsyncIterator[UpstreamPool]:
    """A started pool; nothing may be left in use at its end."""
    more = {name: settings.pop(name) for name in ("resolver", "now") if name in settings}
    pool = UpstreamPool(Upstream("api", urls, **settings), **more)
    pool.start()
    try:
        yield pool
    finally:
        pool.close()
        assert (pool.in_use, pool.waiting, pool.size) == (0, 0, 0)


@contextlib.asynccontextmanager
async def serving(
    script: Script, *, tls: ssl.SSLContext | None = None, host: str = "127.0.0.1", port: int = 0,
    path: str = "",
) -> AsyncIterator[RawUpstream]:  # fmt: skip
    """An upstream that runs `script` for each connection."""
    upstream = RawUpstream(script, port)
    server: asyncio.Server
    if path:
        server = await asyncio.start_unix_server(upstream._serve, path)
    else:
        server = await asyncio.start_server(upstream._serve, host, port, ssl=tls)
        upstream.port = server.sockets[0].getsockname()[1]
    upstream._server = server
    try:
        yield upstream
    finally:
        await upstream.stop()


class Switch:
    """A script whose behaviour a test changes while it runs. `served` counts requests by path."""

    def __init__(self, name: str = "ok") -> None:
        self.name = name.encode()
        self.mode = "ok"
        self.served: list[str] = []

    async def __call__(self, peer: Peer) -> None:
        while True:
            request = await peer.request()
            self.served.append(request.path)
            if self.mode == "reset":
                peer.writer.transport.abort()
                return
            if self.mode == "silent":
                await peer.gone(30)
                return
            if self.mode.isdigit():
                await peer.send(
                    b"HTTP/1.1 %b No\r\ncontent-length: 2\r\n\r\nno" % self.mode.encode()
                )
            else:
                await peer.send(ok(self.name))

    def count(self, path: str = "/x") -> int:
        return self.served.count(path)


def dead_port() -> int:
    """A port on which connections are refused."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
