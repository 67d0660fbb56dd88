"""The charge of a request whose answer decides the cost: an estimate, corrected at the end.

What is charged at each moment, should this process be killed then:
  admitted, not answered   what the route charges on admission, and of the meters that the answer
                           decides the estimate where they are `on_abort: estimate`; nothing at all
                           where the route charges for answers
  answered, streaming      the same as if the answer were cut, as of a second ago at most
  at its end               what it cost
The first two are in the text of the reservation, which is what it leaves behind when it expires.

Without Redis the request was written down with the estimate, and what it cost more or less is
written down at the end, to be added: exactly once, as both are.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

from core.admission.settlement import Change, Kind, Operation
from core.errors import StoreUnavailableError
from core.period import Span, calendar_bounds
from core.policy import Route
from gateway.admission.charge import Charge
from gateway.admission.settler import Reservation, ReservationLost, Settler
from gateway.cost.report import CostReport
from gateway.cost.tap import Cost, CostRules, Tap
from gateway.outage import entries
from gateway.outage.decide import Outage


class Place(NamedTuple):
    """Where a request that was admitted without Redis is counted."""

    span: Span
    at_ms: int
    caps: Mapping[str, int]


class CostOnRoute:
    """A route's costs under one plan. `waits` is whether nothing is charged before an answer."""

    __slots__ = ("calendar", "kept", "route", "rules", "waits", "watch")

    def __init__(self, route: Route, watch: str = "", watch_calendar: bool = False) -> None:
        self.route = route.name
        self.rules = CostRules(route.actual)
        self.waits = route.reserve
        self.kept = kept_at_head(route)
        self.watch = watch
        self.calendar = watch_calendar


def kept_at_head(route: Route) -> dict[str, int]:
    """What stays charged of a request whose answer has just begun, or need not begin."""
    return {**route.costs, **{rule.meter: rule.at_head() for rule in route.actual}}


class CostCharge(Charge):
    """One request. Either `reservation` or `place` is there."""

    __slots__ = (
        "_begun",
        "_cost",
        "_done",
        "_name",
        "_place",
        "_report",
        "_subject",
        "_tap",
        "costs",
    )

    def __init__(
        self,
        settler: Settler,
        outage: Outage,
        charged: frozenset[int] | None,
        cost: CostOnRoute,
        subject: str,
        report: CostReport,
        *,
        reservation: Reservation | None = None,
        entry: bytes = b"",
        place: Place | None = None,
    ) -> None:
        super().__init__(settler, outage, charged, reservation, entry)
        self._cost = cost
        self._subject = subject
        self._report = report
        self._place = place
        self._tap: Tap | None = None
        self._name = ""
        self._begun = False
        self._done = False
        self.costs: list[Cost] = []

    def tap(self, request_id: str) -> Tap | None:
        """Reads the answer of the request, which is about to be sent upstream."""
        self._name = request_id
        self._tap = Tap(self._cost.rules, self._ended)
        if self._reservation is not None and self._tap.streams:
            self._reservation.progress = partial(self._under_way, self._reservation)
        return self._tap

    async def answered(self, status: int) -> None:
        """As of a charge that is not corrected; the reservation stays, to be settled at the end."""
        if not self._cost.waits:
            self._begun = True
            return
        if self._charged is not None and status not in self._charged:
            self._take_back("unpaid")
            return
        held = self._reservation
        progress = None if held is None else self._progress(held, answered=True)
        try:
            if held is not None and progress is not None:
                await self._settler.begin(held, progress)
            else:
                await self._outage.write(self._entry)
        except ReservationLost:
            self._drop()
            raise
        except StoreUnavailableError:
            try:
                if progress is None:
                    raise
                await self._outage.write(entries.settled(progress))
            except StoreUnavailableError:
                self._take_back("unserved")
                raise
        self._begun = True

    def give_back(self) -> None:
        """The request is over, and its answer, if there was one, did not come to its end."""
        if self._done:
            return
        if self._cost.waits and not self._begun:
            self._take_back("unanswered")
        else:
            self._settle(complete=False)

    def _ended(self) -> None:
        if not self._done:
            self._settle(complete=True)

    def _settle(self, complete: bool) -> None:
        tap = self._tap or Tap(self._cost.rules, self._ended)
        self._done, self._tap = True, None  # they refer to each other
        self.costs = tap.costs(complete)
        units = {cost.rule.meter: cost.units for cost in self.costs}
        held, self._reservation = self._reservation, None
        if held is not None:
            held.progress = None
            self._settler.cost(held, self._operation(Kind.COST, held, _changes(units)))
        elif self._place is not None:
            self._correct(self._place)
        self._report.settled(self._cost.route, self._subject, self._name, self.costs)

    def _correct(self, place: Place) -> None:
        changes = {
            cost.rule.meter: cost.units - cost.rule.estimate
            for cost in self.costs
            if cost.units != cost.rule.estimate
        }
        if not changes:
            return
        entry = entries.corrected(self._subject, changes, place.caps, place.span, place.at_ms)
        if not self._outage.note(entry):
            # what is on disk is what will be counted
            self.costs = [Cost(c.rule, c.rule.estimate, "kept_unwritten") for c in self.costs]

    def _take_back(self, result: str) -> None:
        held = self._reservation
        self._drop()
        if held is not None:
            self._settler.refund(held)
        self.costs = [Cost(rule, 0, result) for rule in self._cost.rules.actual]
        self._report.settled(self._cost.route, self._subject, self._name, self.costs)

    def _drop(self) -> None:
        self._done, self._tap = True, None
        if self._reservation is not None:
            self._reservation.progress = None
        self._reservation, self._entry = None, b""

    def _under_way(self, held: Reservation) -> Operation:
        return self._progress(held, answered=self._begun)

    def _progress(self, held: Reservation, answered: bool) -> Operation:
        """What is to stay charged should this process be killed from now on."""
        changes: tuple[Change, ...] = ()
        if answered or not self._cost.waits:
            units = self._cost.kept.copy()
            if self._tap is not None:
                units |= {rule.meter: so_far for rule, so_far in self._tap.streamed()}
            changes = _changes(units)
        return self._operation(Kind.PROGRESS, held, changes)

    def _operation(self, kind: Kind, held: Reservation, changes: tuple[Change, ...]) -> Operation:
        cost, calendar = self._cost, ""
        if cost.calendar:
            calendar = " ".join(map(str, calendar_bounds(self._settler.now_ms())))
        ms = held.ms if kind is Kind.PROGRESS else 0
        return Operation(kind, held.subject, held.id, changes, ms, 0, cost.watch, calendar)


def _changes(units: Mapping[str, int]) -> tuple[Change, ...]:
    """Only meter and units count; the reservation knows the rest."""
    return tuple(Change(name, count, 0, 0, 0) for name, count in units.items())
