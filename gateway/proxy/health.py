"""Active health checks: every target of an upstream is asked for a path, again and again.

A target starts healthy, so that a gateway serves from its first moment; the first check comes at
once. Each check opens a connection of its own: it tests accepting, too, and takes none from the
pool.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Final

from core.upstream import HealthCheck
from gateway.http.errors import ExchangeError
from gateway.proxy.connect import reason
from gateway.proxy.connection import UpstreamConnection
from gateway.proxy.target import Endpoint

# Workers and gateways must not ask all at once.
_JITTER: Final = 0.1


class HealthChecks:
    """One task an endpoint; changes `Endpoint.healthy`.

    Args:
        open_connection: makes a connection that no pool counts.
        changed: called with an endpoint whose health changed, and why.
        checked: called with every result.
    """

    def __init__(
        self,
        rule: HealthCheck,
        open_connection: Callable[[Endpoint], Awaitable[UpstreamConnection]],
        changed: Callable[[Endpoint, str], object],
        checked: Callable[[bool], object] = lambda ok: None,
    ) -> None:
        self._rule = rule
        self._open = open_connection
        self._changed = changed
        self._checked = checked
        self._tasks: dict[Endpoint, asyncio.Task[None]] = {}

    def watch(self, endpoint: Endpoint) -> None:
        """Check an endpoint until it is forgotten."""
        if endpoint not in self._tasks:
            self._tasks[endpoint] = asyncio.create_task(
                self._run(endpoint), name=f"health {endpoint.target.label}"
            )

    def forget(self, endpoint: Endpoint) -> None:
        task = self._tasks.pop(endpoint, None)
        if task is not None:
            task.cancel()

    def close(self) -> None:
        for endpoint in tuple(self._tasks):
            self.forget(endpoint)

    async def _run(self, endpoint: Endpoint) -> None:
        rule, in_a_row = self._rule, 0
        interval = rule.interval_ms / 1000
        while True:
            fault = await self._check(endpoint)
            self._checked(not fault)
            if (not fault) == endpoint.healthy:
                in_a_row = 0
            else:
                in_a_row += 1
                enough = rule.unhealthy_after if endpoint.healthy else rule.healthy_after
                if in_a_row >= enough:
                    endpoint.healthy = not fault
                    in_a_row = 0
                    self._changed(endpoint, fault)
            await asyncio.sleep(interval * random.uniform(1 - _JITTER, 1 + _JITTER))  # noqa: S311

    async def _check(self, endpoint: Endpoint) -> str:
        """What is wrong, empty if nothing."""
        target, conn = endpoint.target, None
        try:
            async with asyncio.timeout(self._rule.timeout_ms / 1000):
                conn = await self._open(endpoint)
                conn.begin(
                    b"GET %b%b HTTP/1.1\r\nhost: %b\r\nuser-agent: tallygate-health\r\n"
                    b"connection: close\r\n\r\n"
                    % (target.base, self._rule.path.encode(), target.authority),
                    False,
                )
                await conn.wait()
        except TimeoutError:
            return f"no answer within {self._rule.timeout_ms} ms"
        except OSError as error:
            return reason(error)
        except ExchangeError as error:
            return str(error)
        finally:
            if conn is not None:
                conn.close()
        return "" if conn.status in self._rule.statuses else f"answered {conn.status}"
