"""Passive ejection: a target that fails requests is left out, each time twice as long.

One that comes back is on probation: its first failure puts it out again, its first success makes it
a target like the others. The pool never leaves out everything: when no target is usable, all are
tried, and one that answers then is back at once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from core import clock
from core.upstream import Ejection
from gateway.proxy.target import Endpoint


class Timer(Protocol):
    def cancel(self) -> object: ...


class Ejector:
    """Told how requests went; changes `Endpoint.ejected`.

    Args:
        call_later: runs a function after so many seconds.
        ejected: called with an endpoint, the seconds it is out, and the failure that did it.
        returned: called when its time is over, before it has shown that it works.
        recovered: called with its first success.
        panicking: whether no target is usable.
    """

    def __init__(
        self,
        rule: Ejection,
        *,
        call_later: Callable[[float, Callable[[], object]], Timer],
        ejected: Callable[[Endpoint, float, str], object],
        returned: Callable[[Endpoint], object],
        recovered: Callable[[Endpoint], object],
        panicking: Callable[[], bool],
        now: Callable[[], float] = clock.monotonic,
    ) -> None:
        self._rule = rule
        self._call_later = call_later
        self._ejected = ejected
        self._returned = returned
        self._recovered = recovered
        self._panicking = panicking
        self._now = now
        self._timers: dict[Endpoint, Timer] = {}

    def succeeded(self, endpoint: Endpoint) -> None:
        if not endpoint.failures and not endpoint.ejections:
            return
        if endpoint.ejected:
            # The answer to a request from before; unless all are out, and this one works after all.
            if not self._panicking():
                return
            self._back(endpoint)
        endpoint.failures = 0
        if endpoint.probation:
            endpoint.probation = False
            self._recovered(endpoint)
        elif endpoint.ejections and self._now() - endpoint.back_at >= endpoint.out_s:
            endpoint.ejections = 0

    def failed(self, endpoint: Endpoint, why: str) -> None:
        endpoint.failures += 1
        if endpoint.ejected:
            return
        if not endpoint.probation and endpoint.failures < self._rule.failures:
            return
        rule = self._rule
        seconds = min(rule.for_ms << min(endpoint.ejections, 30), rule.max_ms) / 1000
        endpoint.ejected = True
        endpoint.ejections += 1
        endpoint.out_s = seconds
        self._timers[endpoint] = self._call_later(seconds, lambda: self._back(endpoint))
        self._ejected(endpoint, seconds, why)

    def forget(self, endpoint: Endpoint) -> None:
        """The endpoint is gone."""
        timer = self._timers.pop(endpoint, None)
        if timer is not None:
            timer.cancel()

    def close(self) -> None:
        for endpoint in tuple(self._timers):
            self.forget(endpoint)

    def _back(self, endpoint: Endpoint) -> None:
        self.forget(endpoint)
        endpoint.ejected = False
        endpoint.probation = True
        endpoint.failures = 0
        endpoint.back_at = self._now()
        self._returned(endpoint)
