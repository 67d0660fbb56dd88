"""What each try says about the upstream: for its circuit breaker, and for the target's ejection."""

from __future__ import annotations

from typing import Final

from gateway.http.errors import ExchangeError
from gateway.proxy.breaker import CircuitBreaker
from gateway.proxy.eject import Ejector
from gateway.proxy.errors import BreakerOpen, PoolExhausted, ProxyError
from gateway.proxy.target import Endpoint

# What gateways say of an upstream that does not work. A 500 is not among them: one customer's
# request could then take the upstream from all the others.
FAILED: Final = frozenset((502, 503, 504))

# Bounds of ours, which say nothing about the upstream; nor does what the client did.
_OURS: Final = (BreakerOpen, PoolExhausted)


class Judge:
    """`admit()` before a try; then one of `answered`, `failed` and `dropped` with its ticket."""

    __slots__ = ("breaker", "ejector")

    def __init__(self, breaker: CircuitBreaker | None, ejector: Ejector | None) -> None:
        self.breaker = breaker
        self.ejector = ejector

    def admit(self) -> int:
        """A ticket for one try.

        Raises:
            BreakerOpen: the upstream is given a rest.
        """
        return self.breaker.admit() if self.breaker is not None else 0

    def answered(self, ticket: int, endpoint: Endpoint, status: int, complete: bool) -> None:
        """The head of an answer is there; unless it is `complete`, `ended` or `broke` follows."""
        ok = status not in FAILED
        if self.breaker is not None:
            self.breaker.settle(ticket, ok)
        if self.ejector is not None:
            if ok and complete:
                self.ejector.succeeded(endpoint)
            elif not ok:
                self.ejector.failed(endpoint, f"answered {status}")

    def failed(self, ticket: int, endpoint: Endpoint | None, error: ExchangeError) -> None:
        """It failed before its answer began; `endpoint` is None if there was no connection."""
        if not isinstance(error, ProxyError) or isinstance(error, _OURS):
            self.dropped(ticket)
            return
        if self.breaker is not None:
            self.breaker.settle(ticket, False)
        if self.ejector is not None and endpoint is not None:
            self.ejector.failed(endpoint, str(error))

    def ended(self, endpoint: Endpoint, status: int) -> None:
        """An answer that took its time is complete."""
        if self.ejector is not None and status not in FAILED:
            self.ejector.succeeded(endpoint)

    def broke(self, endpoint: Endpoint, error: ExchangeError) -> None:
        """Its answer, which `answered` took for a good one, broke off."""
        if self.ejector is not None and isinstance(error, ProxyError):
            self.ejector.failed(endpoint, str(error))

    def dropped(self, ticket: int) -> None:
        """It ended without saying anything about the upstream."""
        if self.breaker is not None:
            self.breaker.settle(ticket, None)
