"""Reads a subject's state hash into ledger rows. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from core import keyspace


class PeriodRow(NamedTuple):
    """A meter's billing period: absolute totals in smallest units, times in epoch ms."""

    meter: str
    start_ms: int
    end_ms: int
    total: int
    overage: int


class HourRow(NamedTuple):
    """A meter's hour within a billing period: absolute totals in smallest units, epoch ms."""

    meter: str
    period_start_ms: int
    hour_start_ms: int
    total: int
    overage: int


@dataclass(frozen=True, slots=True)
class StateSnapshot:
    """One subject's state at one version. `closed` are fields that are final once flushed."""

    subject: str
    key: str
    epoch: int
    version: int
    periods: tuple[PeriodRow, ...]
    hours: tuple[HourRow, ...]
    closed: tuple[str, ...]

    @property
    def meters(self) -> frozenset[str]:
        """The meters of all rows."""
        return frozenset([row.meter for row in self.periods] + [row.meter for row in self.hours])


def read_state(key: str, state: Mapping[str, str]) -> StateSnapshot:
    """The rows that the hash at `key` stands for.

    Raises:
        ValueError: the key or a field is not of this layout.
    """
    periods: list[PeriodRow] = []
    hours: list[HourRow] = []
    closed: list[str] = []
    for name, text in state.items():
        if name.startswith(keyspace.METER):
            meter = name.removeprefix(keyspace.METER)
            start, end, hour = map(int, state[keyspace.BOUNDS + meter].split(" "))
            total, overage, hour_total, hour_overage, _ = map(int, text.split(" "))
            periods.append(PeriodRow(meter, start, end, total, overage))
            hours.append(HourRow(meter, start, hour, hour_total, hour_overage))
        elif name.startswith(keyspace.CLOSED_PERIOD):
            meter, start_text = name.removeprefix(keyspace.CLOSED_PERIOD).rsplit(":", 1)
            end, total, overage = map(int, text.split(" "))
            periods.append(PeriodRow(meter, int(start_text), end, total, overage))
            closed.append(name)
        elif name.startswith(keyspace.CLOSED_HOUR):
            meter, start_text, hour_text = name.removeprefix(keyspace.CLOSED_HOUR).rsplit(":", 2)
            total, overage = map(int, text.split(" "))
            hours.append(HourRow(meter, int(start_text), int(hour_text), total, overage))
            closed.append(name)
    return StateSnapshot(
        keyspace.subject_of(key),
        key,
        int(state[keyspace.EPOCH]),
        int(state[keyspace.VERSION]),
        tuple(periods),
        tuple(hours),
        tuple(closed),
    )
