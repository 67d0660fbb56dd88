"""Opens a connection to a target of an upstream, or else to another one."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Collection

from core.policy import Upstream
from gateway.proxy.connect import connect, reason
from gateway.proxy.connection import UpstreamConnection
from gateway.proxy.endpoints import Endpoints
from gateway.proxy.errors import ConnectError, ConnectTimeout, TlsFailed
from gateway.proxy.target import Endpoint


class Opener:
    """`failures` counts connects that failed. `on_lost` is each connection's."""

    __slots__ = ("_endpoints", "_on_lost", "_upstream", "failures")

    def __init__(
        self,
        upstream: Upstream,
        endpoints: Endpoints,
        on_lost: Callable[[UpstreamConnection], None],
    ) -> None:
        self._upstream = upstream
        self._endpoints = endpoints
        self._on_lost = on_lost
        self.failures = 0

    async def open(
        self, first: Endpoint, avoid: Collection[Endpoint], deadline: float
    ) -> UpstreamConnection:
        """A connection to `first`; where that fails, to another live target, each once.

        Args:
            avoid: targets that are not tried, but for `first`.
            deadline: on the loop's clock, for all of them together.

        Raises:
            ConnectError: each refused or is unreachable (TlsFailed: TLS failed).
            ConnectTimeout: the deadline came first.
        """
        name = self._upstream.name
        endpoint, tried = first, {first, *avoid}
        while True:
            endpoint.opening += 1
            try:
                async with asyncio.timeout_at(deadline):
                    return await connect(endpoint, self._endpoints.context, self._on_lost)
            except TimeoutError:
                self._failed(endpoint, "connect time-out")
                ms = self._upstream.connect_timeout_ms
                raise ConnectTimeout(f"no connection to {name!r} within {ms} ms") from None
            except OSError as error:
                self._failed(endpoint, reason(error))
                following = self._endpoints.other(tried)
                if following is None:
                    kind = TlsFailed if isinstance(error, ssl.SSLError) else ConnectError
                    raise kind(f"cannot connect to {name!r}: {reason(error)}") from error
            finally:
                endpoint.opening -= 1
            endpoint = following
            tried.add(endpoint)

    def _failed(self, endpoint: Endpoint, why: str) -> None:
        self.failures += 1
        if self._endpoints.ejector is not None:
            self._endpoints.ejector.failed(endpoint, f"cannot connect: {why}")
