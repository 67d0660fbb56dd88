"""`outage: local`: what one process may admit by itself while Redis is away.

A process gives out its share of each limit: `floor(limit / share)`, `share` being the number of
processes (`gateway.outage.instances` times workers). A limit smaller than the number of processes
has a share of 0, and routes with it refuse in an outage: any other rule would pass the limit.

What an outage can cost beyond what a limit allows, per limit and subject:
  closed  0: nothing is admitted.
  open    what the spools hold: at most `spool_max` bytes of records a process, whatever the limits.
  local   at most one more limit, `share * floor(limit / share)`, over all processes together:
            fixed window   in each window, as Redis may have given out a whole one before
            sliding window the same, by the window's own estimate
            rate           two bursts an outage: that of its begin, and that of Redis, where the
                           burst is whole again at its end; `rate` itself is shared
            quota (block)  in each period, over all its outages: a process keeps its count for the
                           whole period, and never forgets it for another subject
            concurrency    requests in flight at once, for those that Redis had admitted before
          A meter that keeps a maximum or the last value is not divided: no process can pass the
          quota, so neither can all of them, and the cost is 0.
Each process that is started in place of another begins with a whole share of its own: n restarts
in a period (or window) add at most `n * floor(limit / share)`.

Quotas with action warn or overage never refuse, and are counted when the spool is replayed; so they
are reported here without overage. Shadow limits (`enforce: false`) never refuse either, and do not
consume what they would have refused. As in `lua/admit.lua`, it is all or nothing over all limits,
names identify counters, and a clock that goes back opens no window and no period again.

Memory is bounded by a number of subjects. A subject is only forgotten when that changes nothing:
its windows and periods have ended, its bursts are whole, nothing is in flight. If the table is full
of others, new subjects are refused (`LocalFull`, for a 503), and counted in `turned_away`: to
forget a live count would give out its share twice without anybody noticing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

from core.admission.program import REFUSED, Verdict
from core.errors import TallygateError
from core.period import Span, calendar_period
from core.policy import (
    Action,
    Aggregation,
    Concurrency,
    FixedWindow,
    Gcra,
    Limit,
    Meter,
    PeriodKind,
    Quota,
    SlidingWindow,
)

MAX_SUBJECTS = 100_000
# Subjects looked at for one to forget, when the table is full.
_LOOKS = 8
_CONCURRENT_WAIT_MS = 1_000  # as in lua/admit.lua: when a slot comes back is not known


class LocalFull(TallygateError):
    """No room for another subject; nothing was admitted."""


@dataclass(frozen=True, slots=True)
class LocalProgram:
    """A plan on a route, as this process may apply it: limits by their share, with their costs."""

    rows: tuple[_Row, ...]
    refuses: bool  # whether any row can


class _Row(NamedTuple):
    key: tuple[str, ...]  # of its counter
    limit: Limit  # its numbers are the share's
    cost: int
    enforce: bool
    aggregation: Aggregation
    blocks: bool  # can be full; a quota with action warn or overage cannot


@dataclass(slots=True, eq=False)
class Slots:
    """Concurrency that an admitted request holds: give it to `LocalLimiter.release` at its end."""

    subject: str
    keys: tuple[tuple[str, ...], ...]


class LocalDecision(NamedTuple):
    """`numbers` are laid out as an answer of lua/admit.lua to one check.

    Now in ms, status (`Verdict`), then for each limit flags, remaining (smallest units; of the
    share of this process), ms until reset.
    """

    admitted: bool
    numbers: list[int]
    slots: Slots | None


# A counter: three numbers as its algorithm has them, and when it is as if it had never been (ms).
_State = tuple[int, int, int, int]


class _Answer(NamedTuple):
    full: bool
    after: _State
    left: int
    left_after: int
    wait: int
    reset: int


def compile_local(
    limits: Iterable[Limit], costs: Mapping[str, int], meters: Mapping[str, Meter], share: int
) -> LocalProgram:
    """The limits of a `Program`, in its order, as one of `share` processes may apply them.

    Args:
        limits: `Program.limits`: those that the costs touch.
        costs: of the route, meter name to smallest units.
        meters: by name; those not in it sum up.
        share: number of processes, 1 or more.

    Raises:
        ValueError: the share is below 1.
    """
    if share < 1:
        raise ValueError(f"a share of 1/{share}: the number of processes is 1 or more")
    rows: list[_Row] = []
    for limit in limits:
        if isinstance(limit, Concurrency):
            part: Limit = Concurrency(limit.name, limit.limit // share, limit.lease_ms)
            key: tuple[str, ...] = ("concurrency", limit.name)
            rows.append(_Row(key, part, 1, limit.enforce, Aggregation.SUM, blocks=True))
            continue
        meter = meters.get(limit.meter)
        aggregation = meter.aggregation if meter is not None else Aggregation.SUM
        blocks, key = True, (type(limit).__name__, limit.name)
        if isinstance(limit, Gcra):
            part = Gcra(
                limit.name, limit.meter, limit.rate, limit.period_us * share, limit.burst // share
            )
        elif isinstance(limit, FixedWindow):
            part = FixedWindow(limit.name, limit.meter, limit.limit // share, limit.window_ms)
        elif isinstance(limit, SlidingWindow):
            part = SlidingWindow(limit.name, limit.meter, limit.limit // share, limit.window_ms)
        else:
            whole = aggregation is not Aggregation.SUM
            units = limit.limit if whole else limit.limit // share
            part = Quota(limit.name, limit.meter, units, limit.period)
            blocks = limit.action is Action.BLOCK
            key = ("quota", limit.meter, limit.period)  # quotas of a meter share its counter
        rows.append(_Row(key, part, costs[limit.meter], limit.enforce, aggregation, blocks))
    return LocalProgram(tuple(rows), any(row.enforce and row.blocks for row in rows))


class LocalLimiter:
    """The counters of one process. Kept from one outage to the next; not thread-safe."""

    def __init__(self, max_subjects: int = MAX_SUBJECTS) -> None:
        self._max_subjects = max_subjects
        self._subjects: OrderedDict[str, dict[tuple[str, ...], _State]] = OrderedDict()
        self.turned_away = 0  # requests refused because the table is full

    def __len__(self) -> int:
        """Subjects held."""
        return len(self._subjects)

    def admit(
        self, program: LocalProgram, subject: str, period: Span, now_ms: int
    ) -> LocalDecision:
        """Decides one request, and counts it if it is admitted.

        Args:
            subject: as in `Keyspace.state`: a subscription, or plan and address.
            period: start and end of the billing period that holds `now_ms`; (0, 0) without one.
            now_ms: epoch milliseconds.

        Raises:
            LocalFull: the table has no room for this subject.
            ValueError: the plan has a billing quota, and the period does not hold `now_ms`.
        """
        counters = self._subjects.get(subject)
        new = counters is None
        if counters is None:
            counters = {}
        answers = [_ask(row, counters.get(row.key), period, now_ms) for row in program.rows]
        refused = any(
            answer.full and row.enforce for row, answer in zip(program.rows, answers, strict=True)
        )
        numbers = [now_ms, Verdict.REJECT if refused else Verdict.ADMIT]
        if refused:
            for answer in answers:
                numbers += (REFUSED if answer.full else 0, answer.left, answer.wait)
            return LocalDecision(False, numbers, None)
        lost = new and bool(program.rows) and not self._enter(subject, counters, now_ms)
        if lost and program.refuses:  # what nothing can refuse needs no memory
            self.turned_away += 1
            raise LocalFull(
                f"{len(self._subjects)} subjects are being limited by this process alone; "
                "a further one has to wait until Redis is back"
            )
        held: list[tuple[str, ...]] = []
        for row, answer in zip(program.rows, answers, strict=True):
            if answer.full and row.blocks and not isinstance(row.limit, Quota):
                numbers += (REFUSED, answer.left, answer.wait)  # a shadow limit does not consume
                continue
            counters[row.key] = answer.after
            numbers += (REFUSED if answer.full else 0, answer.left_after, answer.reset)
            if isinstance(row.limit, Concurrency) and not lost:
                held.append(row.key)
        if not new:
            self._subjects.move_to_end(subject)
        return LocalDecision(True, numbers, Slots(subject, tuple(held)) if held else None)

    def release(self, slots: Slots) -> None:
        """Gives back what a request held; a second time changes nothing."""
        counters = self._subjects.get(slots.subject)
        keys, slots.keys = slots.keys, ()
        for key in keys if counters is not None else ():
            assert counters is not None
            held = counters[key][0] - 1
            if held:
                counters[key] = (held, 0, 0, _NEVER)
            else:
                del counters[key]

    def _enter(self, subject: str, counters: dict[tuple[str, ...], _State], now_ms: int) -> bool:
        if len(self._subjects) >= self._max_subjects:
            for name in list(islice(self._subjects, _LOOKS)):
                if all(state[3] <= now_ms for state in self._subjects[name].values()):
                    del self._subjects[name]
                else:
                    self._subjects.move_to_end(name)  # the next call looks at others
        if len(self._subjects) >= self._max_subjects:
            return False
        self._subjects[subject] = counters
        return True


_NEVER = 2**62  # what is in flight is not forgotten


def _ask(row: _Row, state: _State | None, period: Span, now_ms: int) -> _Answer:
    limit, cost = row.limit, row.cost
    if isinstance(limit, Gcra):
        return _gcra(limit, cost, state, now_ms)
    if isinstance(limit, FixedWindow):
        return _fixed(limit, cost, state, now_ms)
    if isinstance(limit, SlidingWindow):
        return _sliding(limit, cost, state, now_ms)
    if isinstance(limit, Quota):
        return _quota(limit, row, state, period, now_ms)
    held = state[0] if state is not None else 0
    full = held >= limit.limit
    left = max(0, limit.limit - held)
    wait = _CONCURRENT_WAIT_MS if full else 0
    return _Answer(full, (held + 1, 0, 0, _NEVER), left, max(0, left - 1), wait, 0)


def _gcra(limit: Gcra, cost: int, state: _State | None, now_ms: int) -> _Answer:
    # last us, backlog in 1/period of a unit, period
    now_us, period = now_ms * 1000, limit.period_us
    backlog = 0
    if state is not None:
        last, backlog, unit, _ = state
        if unit != period:  # the limit or the share was changed: never rounded down
            backlog = -(-backlog * period // unit)
        backlog = max(0, backlog - max(0, now_us - last) * limit.rate)
    drains = limit.rate * 1000  # a millisecond
    capacity, after = limit.burst * period, backlog + cost * period
    full = after > capacity
    wait = -(-(after - capacity if full else backlog) // drains)
    reset = -(-after // drains)
    return _Answer(
        full,
        (now_us, after, period, now_ms + reset),
        max(0, capacity - backlog) // period,
        max(0, capacity - after) // period,
        wait,
        reset,
    )


def _fixed(limit: FixedWindow, cost: int, state: _State | None, now_ms: int) -> _Answer:
    # start, count
    window = limit.window_ms
    start, count = now_ms - now_ms % window, 0
    if state is not None and state[0] >= start:
        start, count = state[0] - state[0] % window, state[1]
    after, reset = count + cost, start + window - now_ms
    return _Answer(
        after > limit.limit,
        (start, after, 0, start + window),
        max(0, limit.limit - count),
        max(0, limit.limit - after),
        reset,
        reset,
    )


def _sliding(limit: SlidingWindow, cost: int, state: _State | None, now_ms: int) -> _Answer:
    # start, count, count of the window before; compared after multiplication with the window
    window = limit.window_ms
    start, count, before = now_ms - now_ms % window, 0, 0
    if state is not None:
        if state[0] >= start:
            start, count, before = state[0] - state[0] % window, state[1], state[2]
        elif state[0] + window >= start:
            before = state[1]
    elapsed = max(0, now_ms - start)
    weighted = before * (window - elapsed) + count * window
    total, after = limit.limit * window, weighted + cost * window
    reset = start + window - now_ms
    full, wait = after > total, reset
    if full:
        room = limit.limit - count - cost
        if room >= 0:  # enough of the window before has to slide out within this one
            wait = -((room * window) // before) + window - elapsed
        else:  # this window's own count has to slide out during the next
            room, later = limit.limit - cost, window
            if room >= 0 and count > 0:
                later = max(0, window - room * window // count)
            wait = window - elapsed + later
        wait = max(1, wait)
    return _Answer(
        full,
        (start, count + cost, before, start + 2 * window),
        max(0, total - weighted) // window,
        max(0, total - after) // window,
        wait,
        reset,
    )


def _quota(limit: Quota, row: _Row, state: _State | None, period: Span, now_ms: int) -> _Answer:
    # start, total
    billing = limit.period is PeriodKind.BILLING
    start, end = period if billing else calendar_period(limit.period, now_ms)
    total = 0
    # As a meter's record in Redis: it goes on until its own end, also under another anchor.
    if state is not None and state[0] >= start and state[3] > now_ms:
        start, total, _, end = state
    elif not start <= now_ms < end:
        raise ValueError(f"the billing period [{start}, {end}) does not hold {now_ms}")
    after = total + row.cost
    if row.aggregation is Aggregation.MAX:
        after = max(total, row.cost)
    elif row.aggregation is Aggregation.LAST:
        after = row.cost
    reset = end - now_ms
    return _Answer(
        row.blocks and after > limit.limit,
        (start, after, 0, end),
        max(0, limit.limit - total),
        max(0, limit.limit - after),
        reset,
        reset,
    )
