"""What goes through a WebSocket costs, by message or byte, and is counted before it is passed on.

Each piece of a connection is one check like that of a request: all or nothing over all limits of
the meters it costs, on disk before it is passed on. A worker that is killed leaves counted, and
perhaps not passed on, what it was asking about: one piece an end, of at most one read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final

from core.policy import FrameCost
from gateway.admission.limiter import Admission

# Programs kept. Most pieces are few messages; sizes in bytes are as many as there are.
_KEPT: Final = 512


class Metering:
    """The costs of one plan on one route. `compiled` makes the admission of a set of costs."""

    __slots__ = ("_admissions", "_compiled", "_costs")

    def __init__(
        self, costs: Iterable[FrameCost], compiled: Callable[[Mapping[str, int]], Admission]
    ) -> None:
        costs = tuple(costs)
        self._compiled = compiled
        self._costs = {
            sender: tuple(cost for cost in costs if cost.sender in (sender, "both"))
            for sender in ("client", "upstream")
        }
        self._admissions: dict[tuple[tuple[str, int], ...], Admission] = {}

    def counts(self, sender: str) -> bool:
        """Whether anything of this end costs."""
        return bool(self._costs[sender])

    def admission(self, sender: str, messages: int, payload: int) -> Admission | None:
        """What to ask for a piece; None when it costs nothing."""
        units: dict[str, int] = {}
        for cost in self._costs[sender]:
            number = payload if cost.per_byte else messages
            if number:
                units[cost.meter] = units.get(cost.meter, 0) + number * cost.units
        if not units:
            return None
        key = tuple(units.items())
        found = self._admissions.get(key)
        if found is None:
            if len(self._admissions) >= _KEPT:
                self._admissions.clear()
            found = self._admissions[key] = self._compiled(units)
        return found
