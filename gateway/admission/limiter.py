"""From a matched, authenticated request to a decision.

A subject that answers COLD is seeded from the ledger and asked again; STALE means that a period
ended between our guess of Redis time and Redis' own, so the bounds are computed anew from the time
in the answer. Both count nothing, so asking again is free of double counting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from core import clock
from core.admission.program import OVERAGE, REFUSED, WARNED, Program, Verdict
from core.admission.seeder import Seeder
from core.errors import StoreUnavailableError
from core.keyspace import Keyspace
from core.period import Span, billing_period
from core.policy import OutageMode
from core.telemetry import logs
from gateway.admission.batcher import Batcher
from gateway.admission.blocked import Blocked, Refused
from gateway.admission.charge import Charge
from gateway.admission.leases import Held, Leases
from gateway.admission.settler import Settler
from gateway.answers.verdict import LimitState, Policy
from gateway.cost.charge import CostCharge, CostOnRoute, Place
from gateway.cost.report import CostReport
from gateway.outage.decide import Outage, OutageRules
from gateway.outage.local import Slots

_log = logs.get_logger()

# A subject can be cold, conflict with a concurrent change, and meet a period's end; more than that
# in one request means that something is wrong, and then it is better to say so than to spin.
_MAX_TRIES = 6


_NO_STATES: list[LimitState] = []
_CLOSED = OutageRules(OutageMode.CLOSED, None, {})


class Metered(Protocol):
    """What the limiter needs of a subscription; the two period fields are its own cache."""

    id: str
    anchor_ms: int
    period_start_ms: int
    period_end_ms: int
    period_months: int


@dataclass(frozen=True, slots=True)
class Admission:
    """A program with what its answers are read with. `interval_months` is the plan's; `charged` are
    the statuses a reservation is charged for, None all of them; `cost` is there where the answer
    decides the cost."""

    program: Program
    policies: tuple[Policy, ...]
    interval_months: int
    outage: OutageRules = _CLOSED
    charged: frozenset[int] | None = None
    cost: CostOnRoute | None = None
    blocked: Blocked = field(default_factory=Blocked, compare=False)


class Decision(NamedTuple):
    """`states`: one for each limit asked; `held` and `slots` are to be released when the request
    ends. `charge` is there where the answer decides what is paid.

    `numbers` instead of states, as Redis sent them, when no limit has anything to report: nearly
    always, and then only one of the limits is told about.
    """

    admitted: bool
    overage: bool
    states: list[LimitState]
    held: Held | None
    charge: Charge | None = None
    slots: Slots | None = None
    numbers: Sequence[int] = ()


class Limiter:
    """Decides requests of one worker."""

    def __init__(
        self,
        batcher: Batcher,
        seeder: Seeder,
        leases: Leases,
        keyspace: Keyspace,
        settler: Settler,
        outage: Outage,
        *,
        on_event: Callable[[str], None] | None = None,
        costs: CostReport | None = None,
    ) -> None:
        self._batcher = batcher
        self._seeder = seeder
        self._leases = leases
        self._keyspace = keyspace
        self._settler = settler
        self._outage = outage
        self._costs = costs or CostReport()
        self._on_event = on_event

    async def admit(self, admission: Admission, subscription: Metered, request_id: str) -> Decision:
        """Decides one request of a subscription; without Redis as the route's outage mode says.

        Raises:
            StoreUnavailableError: no decision could be had; nothing may be served.
        """
        batcher = self._batcher
        program = admission.program
        if admission.blocked and (refused := admission.blocked.find(subscription.id)) is not None:
            return self.repeat(admission, refused)
        try:
            if program.lease_limits:
                return await self._ask_redis(admission, subscription, request_id)
            # What `_ask_redis` does, once and without its layers: nearly every request ends here.
            now_ms = batcher.redis_now_ms()
            if (
                not subscription.period_start_ms <= now_ms < subscription.period_end_ms
                or subscription.period_months != admission.interval_months
            ):
                self._set_period(admission, subscription, now_ms)
            keys = (self._keyspace.state(subscription.id),)
            asked = clock.monotonic()
            numbers = await batcher.submit(
                program,
                keys,
                subscription.period_start_ms,
                subscription.period_end_ms,
                request_id,
                subscription.id,
            )
            if numbers[1] == Verdict.ADMIT:
                return self._decision(admission, numbers, keys, request_id, subscription.id)
            if numbers[1] == Verdict.REJECT:
                self._remember(admission, subscription.id, numbers, asked)
                return self._decision(admission, numbers, keys, request_id, subscription.id)
            return await self._ask_redis(admission, subscription, request_id)
        except StoreUnavailableError as error:
            if admission.outage.mode is OutageMode.CLOSED:
                raise
            now_ms = batcher.redis_now_ms()
            span = billing_period(subscription.anchor_ms, admission.interval_months, now_ms)
            return await self._without_redis(admission, subscription.id, span, now_ms, error)

    async def _ask_redis(
        self, admission: Admission, subscription: Metered, request_id: str
    ) -> Decision:
        batcher = self._batcher
        program = admission.program
        keys = self._keys(subscription.id, program)
        for _ in range(_MAX_TRIES):
            now_ms = batcher.redis_now_ms()
            asked = clock.monotonic()
            # The interval is part of what is cached: under a configuration that changed it, an
            # older request may still be under way.
            if (
                not subscription.period_start_ms <= now_ms < subscription.period_end_ms
                or subscription.period_months != admission.interval_months
            ):
                self._set_period(admission, subscription, now_ms)
            numbers = await self._ask(
                program,
                keys,
                subscription.period_start_ms,
                subscription.period_end_ms,
                request_id,
                subscription.id,
            )
            status = numbers[1]
            if status <= Verdict.REJECT:
                if status == Verdict.REJECT:
                    self._remember(admission, subscription.id, numbers, asked)
                return self._decision(admission, numbers, keys, request_id, subscription.id)
            if status in (Verdict.COLD, Verdict.UNVERIFIED):
                await self._seeder.seed(
                    subscription.id, keys[0], program.plan_limits, numbers[0], batcher.run
                )
            elif status == Verdict.STALE:
                self._set_period(admission, subscription, numbers[0])
            else:
                raise _undecided(status, subscription.id)
        raise StoreUnavailableError("the subject's state kept changing; no decision was reached")

    async def admit_anonymous(
        self, admission: Admission, subject: str, request_id: str
    ) -> Decision:
        """Decides one request of a keyless route; `subject` names plan and client address.

        Raises:
            StoreUnavailableError: no decision could be had; nothing may be served.
        """
        try:
            return await self._ask_redis_anonymous(admission, subject, request_id)
        except StoreUnavailableError as error:
            if admission.outage.mode is OutageMode.CLOSED:
                raise
            now_ms = self._batcher.redis_now_ms()
            return await self._without_redis(admission, subject, (0, 0), now_ms, error)

    async def _ask_redis_anonymous(
        self, admission: Admission, subject: str, request_id: str
    ) -> Decision:
        if admission.blocked and (refused := admission.blocked.find(subject)) is not None:
            return self.repeat(admission, refused)
        keys = self._keys(subject, admission.program)
        for _ in range(_MAX_TRIES):
            asked = clock.monotonic()
            numbers = await self._ask(admission.program, keys, 0, 0, request_id, subject)
            if numbers[1] <= Verdict.REJECT:
                if numbers[1] == Verdict.REJECT:
                    self._remember(admission, subject, numbers, asked)
                return self._decision(admission, numbers, keys, request_id, subject)
            if numbers[1] != Verdict.STALE:
                raise _undecided(numbers[1], subject)
        raise StoreUnavailableError("the calendar kept changing; no decision was reached")

    def repeat(self, admission: Admission, refused: Refused) -> Decision:
        """The decision that Redis would take again."""
        states, overage = self._states(admission, refused.numbers(clock.monotonic()))
        return Decision(False, overage, states, None)

    def repeated(self, reasons: int) -> None:
        """A refusal was repeated as it was, with so many limits that refuse."""
        if self._on_event is not None:
            for _ in range(reasons):
                self._on_event("refused")

    @staticmethod
    def _remember(admission: Admission, subject: str, numbers: Sequence[int], asked: float) -> None:
        # Where answers decide what is paid, quota comes back at any time.
        if not admission.program.reserve_ms:
            admission.blocked.remember(subject, numbers, admission.policies, asked)

    async def _without_redis(
        self,
        admission: Admission,
        subject: str,
        span: Span,
        now_ms: int,
        reason: StoreUnavailableError,
    ) -> Decision:
        program = admission.program
        outage = self._outage
        try:
            found = await outage.decide(admission.outage, program, subject, span, now_ms)
        except StoreUnavailableError as error:
            raise error from reason
        charge: Charge | None = None
        cost = admission.cost
        if cost is not None and found.admitted and program.durable:
            place = Place(span, now_ms, admission.outage.caps)
            charge = CostCharge(
                self._settler, outage, admission.charged, cost, subject, self._costs,
                entry=found.entry, place=place,
            )  # fmt: skip
        elif found.entry:
            charge = Charge(self._settler, outage, admission.charged, None, found.entry)
        if not found.numbers:
            return Decision(True, False, [], None, charge)
        states, _ = self._states(admission, found.numbers)
        return Decision(found.admitted, False, states, None, charge, found.slots)

    def release(self, decision: Decision) -> None:
        """The request has ended, however it did: gives back what it held. Never waits or fails."""
        if decision.held is not None:
            self._leases.release(decision.held)
        if decision.slots is not None:
            self._outage.release(decision.slots)
        if decision.charge is not None:
            decision.charge.give_back()

    async def _ask(
        self,
        program: Program,
        keys: tuple[str, ...],
        start_ms: int,
        end_ms: int,
        request_id: str,
        subject: str,
    ) -> Sequence[int]:
        try:
            return await self._batcher.submit(program, keys, start_ms, end_ms, request_id, subject)
        except BaseException:
            if program.lease_limits:
                # It may have been admitted all the same: its slots must not wait for their expiry.
                self._leases.release_unknown(request_id, keys[1:])
            raise

    def _keys(self, subject: str, program: Program) -> tuple[str, ...]:
        keyspace = self._keyspace
        if not program.lease_limits:
            return (keyspace.state(subject),)
        leases = (keyspace.leases(subject, name) for name in program.lease_limits)
        return (keyspace.state(subject), *leases)

    @staticmethod
    def _set_period(admission: Admission, subscription: Metered, now_ms: int) -> None:
        subscription.period_start_ms, subscription.period_end_ms = billing_period(
            subscription.anchor_ms, admission.interval_months, now_ms
        )
        subscription.period_months = admission.interval_months

    def _decision(
        self,
        admission: Admission,
        numbers: Sequence[int],
        keys: tuple[str, ...],
        request_id: str,
        subject: str,
    ) -> Decision:
        program = admission.program
        plain = numbers[1] == Verdict.ADMIT and not any(numbers[2::3])
        if plain and not program.lease_limits and not program.reserve_ms:
            return Decision(True, False, _NO_STATES, None, None, None, numbers)
        states, any_overage = self._states(admission, numbers)
        if numbers[1] != Verdict.ADMIT:
            return Decision(False, any_overage, states, None)
        held: Held | None = None
        charge: Charge | None = None
        if program.lease_limits:
            held = self._leases.hold(request_id, keys[1:], program.lease_ms)
        if program.reserve_ms:
            reservation = self._settler.hold(request_id, subject, program.reserve_ms)
            if admission.cost is None:
                charge = Charge(self._settler, self._outage, admission.charged, reservation, b"")
            else:
                charge = CostCharge(
                    self._settler, self._outage, admission.charged, admission.cost, subject,
                    self._costs, reservation=reservation,
                )  # fmt: skip
        return Decision(True, any_overage, states, held, charge)

    def _states(
        self, admission: Admission, numbers: Sequence[int]
    ) -> tuple[list[LimitState], bool]:
        """One state for each limit asked, and whether any was overage."""
        states: list[LimitState] = []
        at = 2
        any_overage = False
        for static, divisor, enforce in admission.policies:
            flags = numbers[at]
            remaining = numbers[at + 1]
            if divisor != 1:
                remaining //= divisor
            if not flags:
                states.append(LimitState(*static, remaining, numbers[at + 2]))
            else:
                refused = flags == REFUSED
                overage = flags == OVERAGE
                any_overage = any_overage or overage
                states.append(
                    LimitState(
                        *static,
                        remaining,
                        numbers[at + 2],
                        not (refused and enforce),
                        overage,
                        flags == WARNED,
                        refused and not enforce,
                    )
                )
                self._report(flags, enforce)
            at += 3
        return states, any_overage

    def _report(self, flags: int, enforce: bool) -> None:
        if self._on_event is None:
            return
        if flags == REFUSED:
            self._on_event("refused" if enforce else "shadow_refused")
        else:
            self._on_event("overage" if flags == OVERAGE else "warned")


def _undecided(status: int, subject: str) -> StoreUnavailableError:
    if status == Verdict.BROKEN:
        _log.error("state_unreadable", subject=subject)
        return StoreUnavailableError(f"the state of {subject} cannot be read; delete its hash")
    return StoreUnavailableError("Redis took longer than the time-out")
