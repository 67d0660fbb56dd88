"""Reads a subject's state hash into ledger rows. Pure functions."""

from __future__ import annotations

import re
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


@dataclass(slots=True)
class StateSnapshot:
    """One subject's state at one version.

    `closed` are fields to drop once flushed, each followed by its text.
    """

    subject: str
    key: str
    epoch: int
    version: int
    periods: list[PeriodRow]
    hours: list[HourRow]
    closed: list[str]

    @property
    def meters(self) -> frozenset[str]:
        """The meters of all rows."""
        return frozenset([row.meter for row in self.periods] + [row.meter for row in self.hours])


# int() would also take what no script writes: "+1", "1_0", digits of other scripts.
_NUMBERS = {n: re.compile(rf"-?[0-9]+(?: -?[0-9]+){{{n - 1}}}").fullmatch for n in (2, 3, 5)}


def _numbers(text: str, count: int) -> list[int]:
    if _NUMBERS[count](text) is None:
        raise ValueError(f"{text!r} is not {count} whole numbers")
    return [int(word) for word in text.split(" ")]


def read_state(key: str, state: Mapping[str, str]) -> StateSnapshot:
    """The rows that the hash at `key` stands for; fields of other kinds are not looked at.

    Raises:
        ValueError: the key or a field is not of this layout.
        KeyError: a field is missing.
    """
    periods: list[PeriodRow] = []
    hours: list[HourRow] = []
    closed: list[str] = []
    for name, text in state.items():
        kind = name[:2]
        if kind == keyspace.METER:
            meter = name[2:]
            total, overage, hour_total, hour_overage, _ = _numbers(text, 5)
            start, end, hour = _numbers(state[keyspace.BOUNDS + meter], 3)
            periods.append(PeriodRow(meter, start, end, total, overage))
            hours.append(HourRow(meter, start, hour, hour_total, hour_overage))
        elif kind == "cp" and name.startswith(keyspace.CLOSED_PERIOD):
            meter, start_text = name.removeprefix(keyspace.CLOSED_PERIOD).rsplit(":", 1)
            end, total, overage = _numbers(text, 3)
            periods.append(PeriodRow(meter, int(start_text), end, total, overage))
            closed += (name, text)
        elif kind == "ch" and name.startswith(keyspace.CLOSED_HOUR):
            meter, start_text, hour_text = name.removeprefix(keyspace.CLOSED_HOUR).rsplit(":", 2)
            total, overage = _numbers(text, 2)
            hours.append(HourRow(meter, int(start_text), int(hour_text), total, overage))
            closed += (name, text)
    return StateSnapshot(
        keyspace.subject_of(key),
        key,
        int(state[keyspace.EPOCH]),
        int(state[keyspace.VERSION]),
        periods,
        hours,
        closed,
    )
