"""A live state as rows that can be laid next to the ledger's. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from core import keyspace


class LiveRow(NamedTuple):
    """A meter's period, or an hour of it: totals in smallest units, times in epoch ms."""

    meter: str
    period_start_ms: int
    hour_start_ms: int | None  # None: the whole period
    total: int
    overage: int


@dataclass(frozen=True, slots=True)
class LiveState:
    """One subject's state at one version."""

    subject: str
    key: str
    epoch: int
    version: int
    rows: tuple[LiveRow, ...]
    run: str = ""  # of the server in which it was compared with the ledger

    @property
    def meters(self) -> frozenset[str]:
        return frozenset(row.meter for row in self.rows)


def parse(key: str, state: Mapping[str, str]) -> LiveState:
    """The rows that a hash stands for.

    Raises:
        ValueError: the key or a field is not of this layout; the message names the field.
    """
    rows: list[LiveRow] = []
    for name, text in state.items():
        try:
            if name.startswith(keyspace.METER):
                meter = name.removeprefix(keyspace.METER)
                start, _, hour = map(int, state[keyspace.BOUNDS + meter].split(" "))
                total, overage, hour_total, hour_overage, *_ = map(int, text.split(" "))
                rows.append(LiveRow(meter, start, None, total, overage))
                rows.append(LiveRow(meter, start, hour, hour_total, hour_overage))
            elif name.startswith(keyspace.CLOSED_PERIOD):
                meter, start_text = name.removeprefix(keyspace.CLOSED_PERIOD).rsplit(":", 1)
                _, total, overage = map(int, text.split(" "))
                rows.append(LiveRow(meter, int(start_text), None, total, overage))
            elif name.startswith(keyspace.CLOSED_HOUR):
                meter, start_text, hour_text = name.removeprefix(keyspace.CLOSED_HOUR).rsplit(
                    ":", 2
                )
                total, overage = map(int, text.split(" "))
                rows.append(LiveRow(meter, int(start_text), int(hour_text), total, overage))
        except (ValueError, KeyError):
            raise ValueError(f"its field {name} reads {text!r}") from None
    numbers = []
    for name in (keyspace.EPOCH, keyspace.VERSION):
        try:
            numbers.append(int(state[name]))
        except KeyError:
            raise ValueError(f"it has no field {name}") from None
        except ValueError:
            raise ValueError(f"its field {name} reads {state[name]!r}") from None
    run = state.get(keyspace.RUN, "")
    return LiveState(keyspace.subject_of(key), key, numbers[0], numbers[1], tuple(rows), run)
