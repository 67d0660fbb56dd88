"""What a round did and what it left behind: plain data, written out when the round fails."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.rules import Switches

# All times are CLOCK_MONOTONIC in seconds, which all processes of the machine share.


class Request(NamedTuple):
    """One request of a client. `status` is 0 where there was no answer."""

    id: str
    subject: str
    path: str
    status: int
    start: float
    end: float


class Total(NamedTuple):
    """A total and the part of it beyond the limit."""

    total: Decimal
    overage: Decimal


Period = tuple[str, str, int]  # subject, meter, start in epoch ms
Hour = tuple[str, str, int, int]  # subject, meter, start of the period, start of the hour


@dataclass
class Ledger:
    """The rows of a round's subjects, in Postgres or as Redis' states would make them."""

    periods: dict[Period, Total] = field(default_factory=dict)
    hours: dict[Hour, Total] = field(default_factory=dict)

    def of(self, subject: str, meter: str) -> Decimal:
        """The total of a meter over all periods."""
        return sum(
            (row.total for key, row in self.periods.items() if key[:2] == (subject, meter)),
            Decimal(0),
        )


class Observation(NamedTuple):
    """The ledger as it was at a time between `start` and `end`."""

    start: float
    end: float
    ledger: Ledger


class Event(NamedTuple):
    """A row of limit_events."""

    subject: str
    limit: str
    meter: str
    kind: str
    threshold: int
    period_start_ms: int
    usage: Decimal


class Happened(NamedTuple):
    """A fault that was injected: `what` says to whom; `end` is when it was taken back."""

    fault: str
    what: str
    start: float
    end: float


class Loss(NamedTuple):
    """Redis forgot, some time between `start` and `end`; `before` was in the ledger by then."""

    fault: str
    start: float
    end: float
    before: Ledger


@dataclass
class Round:
    """Everything that `check` looks at. `plans`: the plan of each subject."""

    seed: int
    switches: Switches
    schedule: list[str]
    plans: dict[str, str] = field(default_factory=dict)
    requests: list[Request] = field(default_factory=list)
    served: list[tuple[str, int]] = field(default_factory=list)  # request id, status
    peaks: dict[str, int] = field(default_factory=dict)  # most at once upstream, by subject
    faults: list[Happened] = field(default_factory=list)
    losses: list[Loss] = field(default_factory=list)
    observations: list[Observation] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)
    redis: Ledger = field(default_factory=Ledger)
    events: list[Event] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)  # what went wrong before any counting
    seconds: float = 0.0
    wall_offset: float = field(default_factory=lambda: time.time() - time.monotonic())

    def wall_ms(self, at: float) -> int:
        """Epoch ms of a monotonic time."""
        return round((at + self.wall_offset) * 1000)


def _plain(value: Any) -> Any:
    if isinstance(value, Decimal):
        return str(value)
    if isinstance(value, Ledger):
        return {
            "periods": [[*key, *row] for key, row in sorted(value.periods.items())],
            "hours": [[*key, *row] for key, row in sorted(value.hours.items())],
        }
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return {name: _plain(item) for name, item in value._asdict().items()}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def write(
    folder: Path, round_: Round, violations: Iterable[str], logs: Mapping[str, str], replay: str
) -> Path:
    """Writes a failed round into a new directory below `folder`, and returns it.

    `violations.txt` for people, `history.json` with everything, a file a process with its output.
    """
    path = folder / f"seed-{round_.seed}"
    number = 1
    while path.exists():
        number += 1
        path = folder / f"seed-{round_.seed}-{number}"
    path.mkdir(parents=True)
    happened = [
        f"{row.start - round_.requests[0].start if round_.requests else 0:8.3f} s  "
        f"for {row.end - row.start:.3f} s  {row.fault}: {row.what}"
        for row in round_.faults
    ]
    lines = [
        f"seed {round_.seed}, {replay}",
        "",
        *("planned", *round_.schedule, "", "happened, since the first request", *happened, ""),
        "violations",
        *violations,
    ]
    (path / "violations.txt").write_text("\n".join(lines) + "\n")
    document = {name: _plain(getattr(round_, name)) for name in Round.__dataclass_fields__} | {
        "switches": asdict(round_.switches)
    }
    (path / "history.json").write_text(json.dumps(document, default=str) + "\n")
    for name, text in logs.items():
        (path / f"{name}.log").write_text(text)
    return path
