"""What an audit finds: causes, differences, the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum


class Cause(StrEnum):
    """The class of a difference. Those of `NOTES` are told and are no drift."""

    PERIOD_SUM = "period_sum"  # hours do not add up to their period
    HOUR_OVERAGE_SUM = "hour_overage_sum"  # the same of overages
    ORPHAN = "orphan"  # rows without the row they belong to
    SEALED_CHANGED = "sealed_changed"  # a period that was written after it was sealed
    EVENT_EXCESS = "event_excess"  # more in usage events than in the hour they were counted in
    EVENT_MISSING = "event_missing"  # less, although nothing but events is counted there
    REDIS_BEHIND = "redis_behind"  # Redis is older than the ledger, and decides
    REDIS_OLDER = "redis_older"  # older, and replaced before it decides anything
    REDIS_AHEAD_NOT_DIRTY = "redis_ahead_not_dirty"  # newer, and would never be flushed
    REDIS_DIFFERS = "redis_differs"  # of the same version, with other numbers
    STATE_UNREADABLE = "state_unreadable"  # a state that no flush can store
    NEGATIVE_TOTAL = "negative_total"  # refunds exceed what was charged
    RESEALED = "resealed"  # a period that changed after it was sealed, and was sealed again


NOTES = frozenset({Cause.NEGATIVE_TOTAL, Cause.REDIS_OLDER, Cause.RESEALED})


@dataclass(frozen=True, slots=True)
class Drift:
    """One difference.

    Attributes:
        meter, period_start_ms, hour_start_ms: where; None where it concerns all of them.
        expected, found: the two numbers, in units of the meter; versions where states differ.
        text: the sentence that explains it.
        repaired: what was done about it; '' when it was left.
    """

    cause: Cause
    subject: str
    text: str
    meter: str | None = None
    period_start_ms: int | None = None
    hour_start_ms: int | None = None
    expected: Decimal | None = None
    found: Decimal | None = None
    repaired: str = ""

    @property
    def note(self) -> bool:
        return self.cause in NOTES


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The outcome of one audit.

    Attributes:
        started_ms, ended_ms: by the clock of this process.
        subjects: looked at in the ledger.
        states: live ones looked at in Redis; about, as SCAN may show one twice.
        keyless: subjects of keyless routes among the keys, which have no ledger.
        pending: states whose changes are listed and not in the ledger yet: no drift.
        found, repaired: how many by cause.
        drifts: the first of them, `len(drifts)` at most what was asked for.
    """

    started_ms: int
    ended_ms: int
    subjects: int
    states: int
    keyless: int
    pending: int
    found: Mapping[Cause, int]
    repaired: Mapping[Cause, int]
    drifts: tuple[Drift, ...]

    @property
    def left(self) -> dict[Cause, int]:
        """How many by cause are still there; every cause that is no note, also with 0."""
        return {
            cause: self.found.get(cause, 0) - self.repaired.get(cause, 0)
            for cause in Cause
            if cause not in NOTES
        }

    @property
    def clean(self) -> bool:
        """Whether nothing is left."""
        return not any(self.left.values())


class Collector:
    """Gathers an audit's findings in bounded memory: all are counted, the first `keep` are kept."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._seen: set[Drift] = set()
        self.found: dict[Cause, int] = {}
        self.repaired: dict[Cause, int] = {}
        self.drifts: list[Drift] = []
        self.subjects = self.states = self.keyless = self.pending = 0

    def add(self, drift: Drift) -> None:
        if drift in self._seen:
            return  # SCAN shows a key twice while the server rehashes
        self.found[drift.cause] = self.found.get(drift.cause, 0) + 1
        if drift.repaired:
            self.repaired[drift.cause] = self.repaired.get(drift.cause, 0) + 1
        if len(self.drifts) < self._keep:
            self._seen.add(drift)
            self.drifts.append(drift)

    def report(self, started_ms: int, ended_ms: int) -> AuditReport:
        return AuditReport(
            started_ms,
            ended_ms,
            self.subjects,
            self.states,
            self.keyless,
            self.pending,
            dict(self.found),
            dict(self.repaired),
            tuple(self.drifts),
        )
