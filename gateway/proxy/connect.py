"""Opens one connection to an endpoint: TCP, TLS or a unix socket."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable

from gateway.proxy.connection import UpstreamConnection
from gateway.proxy.target import Endpoint


async def connect(
    endpoint: Endpoint,
    context: ssl.SSLContext | None,
    on_lost: Callable[[UpstreamConnection], None],
) -> UpstreamConnection:
    """A connection that is established, TLS included. The caller bounds the time.

    Raises:
        OSError: it was refused, is unreachable, or (ssl.SSLError) TLS failed.
    """
    loop = asyncio.get_running_loop()
    target = endpoint.target

    def factory() -> UpstreamConnection:
        return UpstreamConnection(endpoint, loop, on_lost)

    if target.socket:
        _, conn = await loop.create_unix_connection(factory, target.socket)
        return conn
    if not target.server_name:
        _, conn = await loop.create_connection(factory, target.host, target.port)
        return conn
    _, conn = await loop.create_connection(
        factory, target.host, target.port, ssl=context, server_hostname=target.server_name
    )
    return conn


def reason(error: OSError) -> str:
    """Why a connection could not be made, for a log line."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"certificate not accepted: {error.verify_message}"
    if isinstance(error, ssl.SSLError):
        return f"TLS failed: {(error.reason or str(error)).lower().replace('_', ' ')}"
    return error.strerror or str(error) or type(error).__name__
