"""A circuit breaker: an upstream that fails is given a rest, and its clients an answer at once.

closed     tries are counted in a window; too large a share of failures opens it
open       everything is refused for a while
half-open  a few probes are let through: all good closes it, one bad opens it again

Of one worker: each sees its own share of the traffic, and its own connections.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import IntEnum
from typing import Final

from core import clock
from core.upstream import Breaker
from gateway.proxy.errors import BreakerOpen

# The window slides in steps of a tenth.
_STEPS: Final = 10
# What a client is told to wait while probes are on their way.
_PROBING_RETRY_S: Final = 1.0


class State(IntEnum):
    """As the metric has it."""

    CLOSED = 0
    HALF_OPEN = 1
    OPEN = 2


class CircuitBreaker:
    """`admit()` before each try, `settle()` with its ticket after it, whatever happened.

    Args:
        now: seconds, never going back.
        on_change: called with each new state.
    """

    __slots__ = (
        "_failed",
        "_generation",
        "_name",
        "_now",
        "_on_change",
        "_open_until",
        "_probing",
        "_rule",
        "_steps",
        "_succeeded",
        "_total",
        "state",
    )

    def __init__(
        self,
        name: str,
        rule: Breaker,
        *,
        now: Callable[[], float] = clock.monotonic,
        on_change: Callable[[State], object] = lambda state: None,
    ) -> None:
        self._name = name
        self._rule = rule
        self._now = now
        self._on_change = on_change
        self.state = State.CLOSED
        self._generation = 0
        self._open_until = 0.0
        self._probing = 0
        self._succeeded = 0
        self._steps: deque[list[float]] = deque()  # [start, tries, failures], oldest first
        self._total = 0.0
        self._failed = 0.0

    def check(self) -> None:
        """Refuse what `admit` would refuse, without taking a probe's place.

        Raises:
            BreakerOpen: with the seconds after which to try again.
        """
        if self.state is State.OPEN:
            wait = self._open_until - self._now()
            if wait > 0:
                raise BreakerOpen(f"upstream {self._name!r} is resting", wait)
        elif self.state is State.HALF_OPEN and not self._probe_free():
            raise BreakerOpen(f"upstream {self._name!r} is being probed", _PROBING_RETRY_S)

    def admit(self) -> int:
        """A ticket for one try.

        Raises:
            BreakerOpen: not now.
        """
        if self.state is not State.CLOSED:
            self.check()
            if self.state is State.OPEN:
                self._become(State.HALF_OPEN)
            self._probing += 1
        return self._generation

    def settle(self, ticket: int, ok: bool | None) -> None:
        """How a try went; None says nothing about the upstream, such as a client that left."""
        if ticket != self._generation:
            return  # begun in an earlier state: old news
        if self.state is State.HALF_OPEN:
            self._probing -= 1
            if ok is False:
                self._open()
            elif ok:
                self._succeeded += 1
                if self._succeeded >= self._rule.probes:
                    self._become(State.CLOSED)
        elif ok is not None:
            self._count(ok)

    def _probe_free(self) -> bool:
        return self._probing + self._succeeded < self._rule.probes

    def _count(self, ok: bool) -> None:
        now, steps = self._now(), self._steps
        span = self._rule.window_ms / 1000
        if not steps or now - steps[-1][0] >= span / _STEPS:
            steps.append([now, 0, 0])
        while steps[0][0] <= now - span:
            _, tries, failures = steps.popleft()
            self._total -= tries
            self._failed -= failures
        steps[-1][1] += 1
        self._total += 1
        if ok:
            return
        steps[-1][2] += 1
        self._failed += 1
        enough = self._total >= self._rule.minimum
        if enough and self._failed * 100 >= self._rule.errors * self._total:
            self._open()

    def _open(self) -> None:
        self._open_until = self._now() + self._rule.open_ms / 1000
        self._become(State.OPEN)

    def _become(self, state: State) -> None:
        self.state = state
        self._generation += 1
        self._probing = self._succeeded = 0
        self._steps.clear()
        self._total = self._failed = 0
        self._on_change(state)
