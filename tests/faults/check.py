"""Conservation: answers = upstream = Redis = ledger = events, after a round is healed and drained.

What one request may have charged, by its answer (`charges`):

  answer                                         charged
  429                                            0: a refused request burns nothing
  503 (no decision)                              0 or 1: its check may have run while its answer was
                                                 lost; 0 with `exact_503`
  none, and the upstream served it               1
  none, and the upstream did not                 0 or 1: in flight in a process that was killed
  anything else: 2xx, what the upstream          1: it was admitted
    answered, 502 and 504 of a dead upstream
  with `reservations`, on a route that charges by the answer:
    2xx                                          1
    another answer of the upstream               1 with on_response, 0 with {status: [2xx]}
    502, 504                                     0
    none, the upstream served it as paid for     0 or 1: it may have been passed on
    none otherwise, and 503                      0: what waits for an answer is taken back

Where the answer says what it cost, that is what 1 stands for; or the estimate, which is less, when
there was no answer, or its worker may have been killed, or its reservation lost, before it was
settled.

For each subscription and meter, with low and high the sums of that times the route's cost:

  faults of the round                            must hold
  none of those that lose data                   low <= ledger <= high, also of each hour
  FLUSHALL, an older copy (at time t)            ledger before t + low of what began after t
                                                 <= ledger <= high
  any                                            Redis = ledger, hours add up to their period,
                                                 overage = what is above the quota, the ledger
                                                 never falls (but by what can be refunded)

What a switch lets be counted for a moment and taken back (503, a charge that waits for its
answer) may be in the ledger when data are lost, and then stays or goes: it widens the bounds of
such rounds.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from decimal import Decimal

from tests.faults.history import Ledger, Request, Round
from tests.faults.rules import (
    PLANS,
    QUOTA_NAMES,
    REDIS_TIMEOUT_S,
    Switches,
    route_of,
    thresholds_of,
)

# Faults that end a gateway process, and with it connections of clients.
KILLS_GATEWAYS = {"worker_kill", "gateway_kill"}
KILLS_UPSTREAM = {"upstream_kill"}
_HOUR_MS = 3_600_000


def charges(request: Request, served: int | None, switches: Switches) -> tuple[int, int]:
    """How often a request was charged, at least and at most. `served`: status of the upstream."""
    status, charge = request.status, route_of(request.path).charge
    if status == 429:
        return 0, 0
    waits = switches.reservations and charge != "on_admit"
    if status == 503:
        return 0, 0 if switches.exact_503 or waits else 1
    if not waits:
        if status == 0 and served is None:
            return 0, 1
        return 1, 1
    if status == 0:
        paid = served is not None and (charge == "on_response" or served // 100 == 2)
        return 0, int(paid)
    paid = status // 100 == 2 if charge == "2xx" else status not in (502, 504)
    return int(paid), int(paid)


def momentary(request: Request, switches: Switches) -> bool:
    """Whether it may have been counted for a while and then taken back."""
    if request.status in (0, 503) and switches.exact_503:
        return True
    return switches.reservations and route_of(request.path).charge != "on_admit"


@dataclass
class _Bounds:
    """Of one subscription and meter; `hours` are the same by hour."""

    low: int = 0
    high: int = 0
    momentary: int = 0
    low_after: int = 0  # of what began after the last loss
    hours: dict[int, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))


class _Check:
    def __init__(self, round_: Round) -> None:
        self.round = round_
        self.switches = round_.switches
        self.served = dict(round_.served)
        self.losses = round_.losses
        self.lost_at = max((loss.end for loss in round_.losses), default=None)
        self.faults = {row.fault for row in round_.faults}
        self.bounds: dict[tuple[str, str], _Bounds] = defaultdict(_Bounds)
        self.by_subject: dict[str, list[Request]] = defaultdict(list)
        for request in round_.requests:
            self.by_subject[request.subject].append(request)
            self._count(request)

    def _count(self, request: Request) -> None:
        least, most = charges(request, self.served.get(request.id), self.switches)
        after = self.lost_at is None or request.start > self.lost_at
        # a check that was sent before its worker died may run until its caller's time is over
        late = REDIS_TIMEOUT_S + 1 if request.status in (0, 503) else 0.001
        first = self.round.wall_ms(request.start - 0.001) // _HOUR_MS
        last = self.round.wall_ms(request.end + late) // _HOUR_MS
        route = route_of(request.path)
        for meter, cost in route.costs.items():
            bounds = self.bounds[request.subject, meter]
            settled = request.status == 200 and not (self.faults & KILLS_GATEWAYS or self.losses)
            lowest = cost if settled else route.estimates.get(meter, cost)
            bounds.low += least * lowest
            bounds.high += most * cost
            bounds.low_after += least * lowest if after else 0
            bounds.momentary += cost if momentary(request, self.switches) else 0
            for hour in range(first, last + 1):
                bounds.hours[hour * _HOUR_MS][1] += most * cost
                if first == last:
                    bounds.hours[hour * _HOUR_MS][0] += least * lowest

    # Answers

    def answers(self) -> Iterator[str]:
        round_ = self.round
        times = Counter(name for name, _ in round_.served)
        sent = {request.id for request in round_.requests}
        for name, count in times.items():
            if name not in sent:
                yield f"the upstream served {name}, which no client of this round sent"
            if count > 1 and not self.faults & KILLS_UPSTREAM:
                yield f"the upstream served {name} {count} times"
        lost = 0
        for request in round_.requests:
            yield from self._answer(request)
            lost += request.status == 0
        if lost and not self.faults & KILLS_GATEWAYS:
            yield f"{lost} requests without an answer, though no gateway was killed"

    def _answer(self, request: Request) -> Iterator[str]:
        served = self.served.get(request.id)
        status = request.status
        plan = PLANS[self.round.plans[request.subject]]
        if status == 0:
            return
        if status in (429, 503):
            # What cannot be charged is not passed on: its reservation went with Redis' data.
            withheld = status == 503 and route_of(request.path).charge != "on_admit"
            if served is not None and not withheld:
                yield f"{request} was answered {status}, but the upstream served it"
            if status == 429 and not (plan.blocks or plan.rate or plan.slots):
                yield f"{request} was refused, though nothing of its plan refuses"
        elif status in (502, 504):
            if not self.faults & KILLS_UPSTREAM:
                yield f"{request} was answered {status}, though the upstream lived"
        elif served is None:
            yield f"{request} was answered {status}, but the upstream did not serve it"
        elif status != served:
            yield f"{request} was answered {status}, the upstream said {served}"

    # Totals

    def totals(self) -> Iterator[str]:
        round_ = self.round
        found = {key[:2] for key in round_.ledger.periods}
        for subject, meter in sorted(found | set(self.bounds)):
            bounds = self.bounds[subject, meter]
            total = round_.ledger.of(subject, meter)
            plan = round_.plans.get(subject, "?")
            low, high = Decimal(bounds.low), Decimal(bounds.high)
            if round_.losses:
                # the last loss decides: what began before it is worth what the ledger had then
                last = max(round_.losses, key=lambda loss: loss.end)
                low = last.before.of(subject, meter) + bounds.low_after - bounds.momentary
                high += bounds.momentary
            if not low <= total <= high:
                yield (
                    f"{subject} ({plan}) {meter}: the ledger has {total}, "
                    f"the answers say {low} to {high} ({self._reckoning(subject)})"
                )
            if not round_.losses:
                yield from self._hours(subject, meter, bounds)

    def _reckoning(self, subject: str) -> str:
        statuses = Counter(request.status for request in self.by_subject[subject])
        served = sum(request.id in self.served for request in self.by_subject[subject])
        words = [f"{count} x {status or 'no answer'}" for status, count in statuses.items()]
        return ", ".join([*words, f"{served} served"])

    def _hours(self, subject: str, meter: str, bounds: _Bounds) -> Iterator[str]:
        hours: dict[int, Decimal] = defaultdict(Decimal)
        for (of, name, _, hour), row in self.round.ledger.hours.items():
            if (of, name) == (subject, meter):
                hours[hour] += row.total
        if len(bounds.hours) > 1 and bounds.momentary:
            return  # what is taken back may be taken off a later hour
        for hour in sorted(set(hours) | set(bounds.hours)):
            low, high = bounds.hours[hour]
            if not low <= hours[hour] <= high:
                yield (
                    f"{subject} {meter}: the ledger has {hours[hour]} in the hour {hour}, "
                    f"the answers say {low} to {high}"
                )

    def rows(self) -> Iterator[str]:
        """Hours add up, overage is right, Redis has the same."""
        ledger, redis = self.round.ledger, self.round.redis
        for (subject, meter, start), period in sorted(ledger.periods.items()):
            hours = [row for key, row in ledger.hours.items() if key[:3] == (subject, meter, start)]
            total = sum((row.total for row in hours), Decimal(0))
            overage = sum((row.overage for row in hours), Decimal(0))
            if (total, overage) != period:
                yield f"{subject} {meter}: hours add up to {total}, {overage}, the period {period}"
            plan = PLANS[self.round.plans[subject]]
            quota = plan.quotas.get(meter)
            billed = "action: overage" in plan.limits and quota is not None
            expected = max(Decimal(0), period.total - quota) if billed and quota else Decimal(0)
            if period.overage != expected:
                yield f"{subject} {meter}: {period}, of which {expected} are above the quota"
        for subject in self.round.plans:
            yield from self._same(subject, ledger, redis)

    def _same(self, subject: str, ledger: Ledger, redis: Ledger) -> Iterator[str]:
        live = {key: row for key, row in redis.periods.items() if key[0] == subject}
        stored = {key: row for key, row in ledger.periods.items() if key[0] == subject}
        if not live and self.round.losses:
            return  # forgotten, and not asked for since
        for key in sorted(set(live) | set(stored)):
            if key not in stored and live[key].total == 0:
                continue  # a new state that nothing was admitted on
            if live.get(key) != stored.get(key):
                yield f"{key}: Redis has {live.get(key)}, the ledger {stored.get(key)}"
        for hour, row in redis.hours.items():
            kept = ledger.hours.get(hour)
            if hour[0] == subject and kept != row and (kept is not None or row.total):
                yield f"{hour}: Redis has {row}, the ledger {kept}"

    def monotone(self) -> Iterator[str]:
        highest: dict[tuple[str, str, int], Decimal] = {}
        final = self.round.ledger.periods
        for observed in [*(row.ledger.periods for row in self.round.observations), final]:
            for key, before in highest.items():
                now = observed[key].total if key in observed else None
                allowed = before - self.bounds[key[:2]].momentary
                if now is None or now < allowed:
                    yield f"{key}: the ledger fell from {before} to {now}"
                    return
            for key, row in observed.items():
                highest[key] = max(highest.get(key, row.total), row.total)

    # Limits

    def limits(self) -> Iterator[str]:
        for subject, name in self.round.plans.items():
            plan, requests = PLANS[name], self.by_subject[subject]
            if plan.blocks:
                yield from self._quota(subject, plan.quotas["requests"], requests)
            if plan.rate is not None and requests:
                rate, burst = plan.rate
                seconds = max(r.end for r in requests) - min(r.start for r in requests)
                most = rate * seconds + burst * (1 + len(self.round.losses)) + 1
                admitted = sum(r.status not in (0, 429, 503) for r in requests)
                if admitted > most:
                    yield f"{subject}: {admitted} admitted in {seconds:.1f} s at {rate}/s"
            if plan.slots is not None:
                most = plan.slots * (1 + len(self.round.losses))
                if self.round.peaks.get(subject, 0) > most:
                    yield f"{subject}: {self.round.peaks[subject]} at once with {plan.slots} slots"

    def _quota(self, subject: str, quota: int, requests: list[Request]) -> Iterator[str]:
        """It is never passed, and nobody is refused before it is reached."""
        total = self.round.ledger.of(subject, "requests")
        if total > quota:
            yield f"{subject}: {total} counted under a quota of {quota} that blocks"
        refused = any(
            request.status == 429 and (self.lost_at is None or request.start > self.lost_at)
            for request in requests
        )
        taken_back = self.bounds[subject, "requests"].momentary
        if refused and total < quota - taken_back:
            yield f"{subject}: refused with {total} counted under a quota of {quota}"

    def events(self) -> Iterator[str]:
        fired: Counter[tuple[str, str, int, str, int]] = Counter(
            (e.subject, e.limit, e.period_start_ms, e.kind, e.threshold) for e in self.round.events
        )
        for what, count in fired.items():
            if count > 1:
                yield f"{what} fired {count} times"
        reached = {
            (e.subject, e.meter, e.kind == "exceeded", e.threshold)
            for e in self.round.events
            if e.limit in QUOTA_NAMES.values()
        }
        for subject, name in self.round.plans.items():
            for meter, quota in PLANS[name].quotas.items():
                bounds = self.bounds[subject, meter]
                total = self.round.ledger.of(subject, meter)
                expected = {
                    (subject, meter, False, percent)
                    for percent in thresholds_of(name)
                    if total * 100 >= percent * quota
                }
                if total > quota:
                    expected.add((subject, meter, True, 100))
                mine = {event for event in reached if event[:2] == (subject, meter)}
                # an event that was lost fires again at the next count
                if (not self.round.losses or bounds.low_after > 0) and expected - mine:
                    yield f"{subject} {meter} {total} of {quota}: not fired: {expected - mine}"
                if not self.round.losses and not bounds.momentary and mine - expected:
                    yield f"{subject} {meter} {total} of {quota}: fired early: {mine - expected}"


def check(round_: Round) -> list[str]:
    """What does not hold; empty when everything does."""
    run = _Check(round_)
    return [
        *round_.troubles,
        *run.answers(),
        *run.totals(),
        *run.rows(),
        *run.monotone(),
        *run.limits(),
        *run.events(),
    ]
