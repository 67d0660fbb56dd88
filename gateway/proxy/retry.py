"""When a request is tried again: what may be, how often, and after how long.

Only what is safe: an idempotent method, or a request of which the upstream saw no byte. And only
within a budget, so that retries do not multiply the load of an upstream that is down already.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Final

from core import clock
from core.upstream import Retries
from gateway.http.errors import ExchangeError
from gateway.proxy.errors import (
    BreakerOpen,
    ConnectError,
    ConnectTimeout,
    PoolExhausted,
    ResponseTimeout,
    TlsFailed,
    UpstreamClosed,
)

# RFC 9110 section 9.2.2: sending one of these twice is as good as once.
IDEMPOTENT: Final = frozenset((b"GET", b"HEAD", b"OPTIONS", b"PUT", b"DELETE", b"TRACE"))

# What a quiet time may save up: this many seconds of the floor, and as much of the share.
_SAVED_S: Final = 10
_SAVED_SHARE: Final = 100

# However many attempts: a client must not wait for a back-off longer than this.
_MAX_BACKOFF_S: Final = 2.0


class RetryBudget:
    """Tokens: a request brings `percent` of one, and each second `floor`; a retry takes one.

    Counted in hundredths, so that nothing is lost to rounding.
    """

    __slots__ = ("_floor", "_limit", "_now", "_percent", "_since", "_tokens")

    def __init__(
        self, percent: int, floor: int, *, now: Callable[[], float] = clock.monotonic
    ) -> None:
        self._percent = percent
        self._floor = floor
        self._now = now
        self._since = now()
        self._limit = floor * 100 * _SAVED_S + percent * _SAVED_SHARE
        self._tokens = floor * 100  # a second's worth: the first request may fail, too

    def request(self) -> None:
        """A request has come."""
        self._tokens = min(self._limit, self._tokens + self._percent)

    def take(self) -> bool:
        """Pay for one retry; False when there is nothing left."""
        now = self._now()
        earned = int((now - self._since) * self._floor * 100)
        if earned > 0:
            self._since = now
            self._tokens = min(self._limit, self._tokens + earned)
        if self._tokens < 100:
            return False
        self._tokens -= 100
        return True


class RetryPolicy:
    """The retries of one upstream. `on_retry` is told the cause of each, or `budget` if refused."""

    __slots__ = ("_budget", "_random", "_rule", "on_retry", "per_try_s", "statuses")

    def __init__(
        self,
        rule: Retries,
        *,
        on_retry: Callable[[str], object] = lambda cause: None,
        now: Callable[[], float] = clock.monotonic,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._rule = rule
        self._budget = RetryBudget(rule.percent, rule.floor, now=now)
        self._random = uniform
        self.on_retry = on_retry
        self.statuses = rule.statuses
        self.per_try_s = rule.per_try_ms / 1000

    def request(self) -> None:
        """A request begins: its part of the budget."""
        self._budget.request()

    def after_error(self, error: ExchangeError, attempt: int, *, safe: bool, sent: bool) -> float:
        """Seconds to wait before the next try; negative: there is none.

        Args:
            attempt: how many tries there were, from 1 on.
            safe: the method is idempotent, and the whole request is still at hand.
            sent: the upstream may have seen some of it.
        """
        cause = _cause(error, per_try=self.per_try_s > 0)
        if cause not in self._rule.causes or (sent and not safe):
            return -1.0
        return self._next(cause, attempt)

    def after_status(self, status: int, attempt: int, *, safe: bool) -> float:
        """The same for an answer, none of which was passed on; for one of `statuses`."""
        if status not in self.statuses or not safe:
            return -1.0
        return self._next("status", attempt)

    def _next(self, cause: str, attempt: int) -> float:
        if attempt >= self._rule.attempts:
            return -1.0
        if not self._budget.take():
            self.on_retry("budget")
            return -1.0
        self.on_retry(cause)
        top = min(self._rule.backoff_ms / 1000 * 2 ** (attempt - 1), _MAX_BACKOFF_S)
        return self._random(0.0, top)


def _cause(error: ExchangeError, per_try: bool) -> str:
    if isinstance(error, PoolExhausted | BreakerOpen):
        return ""  # more of the same would make it worse
    if isinstance(error, ConnectError | ConnectTimeout | TlsFailed):
        return "connect"
    if isinstance(error, UpstreamClosed):
        return "reset"
    if isinstance(error, ResponseTimeout):
        # Without a time-out of its own, a try has used up all the time there was.
        return "timeout" if per_try else ""
    return ""
