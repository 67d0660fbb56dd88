"""Ledger rows as `store_periods` and `store_hours` take them: one text a column.

The numbers of a column travel as one text: packing them one by one takes the driver several times
as long. Quantities stay in smallest units and times in ms; Postgres converts both, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal

from core.meters import MeterRegistry
from reconciler.snapshot import HourRow, PeriodRow, StateSnapshot

Columns = list[object]


class _Meters:
    """Position of each meter, from 1, with the worth of its smallest unit."""

    def __init__(self, registry: MeterRegistry) -> None:
        self._registry = registry
        self._positions: dict[str, str] = {}
        self.names: list[str] = []
        self.worth: list[Decimal] = []

    def position(self, name: str) -> str:
        found = self._positions.get(name)
        if found is None:
            meter = self._registry.get(name)
            assert meter is not None, name  # states with unknown meters were left out
            self.names.append(name)
            self.worth.append(meter.from_units(1))
            found = self._positions[name] = str(len(self.names))
        return found


def columns(snapshots: Sequence[StateSnapshot], registry: MeterRegistry) -> tuple[Columns, Columns]:
    """Arguments of `store_periods` and of `store_hours` for all rows of these states."""
    meters = _Meters(registry)
    periods = _columns([(s, s.periods) for s in snapshots], meters)
    hours = _columns([(s, s.hours) for s in snapshots], meters)
    return periods, hours


def _columns(
    states: Sequence[tuple[StateSnapshot, Sequence[PeriodRow | HourRow]]], meters: _Meters
) -> Columns:
    subjects: list[str] = []
    positions: list[str] = []
    numbers: list[tuple[int, ...]] = []
    position = meters.position
    for snapshot, rows in states:
        subject, epoch, version = snapshot.subject, snapshot.epoch, snapshot.version
        for name, start_ms, second_ms, total, overage in rows:
            subjects.append(subject)
            positions.append(position(name))
            numbers.append((start_ms, second_ms, total, overage, epoch, version))
    texts = [" ".join(map(str, column)) for column in zip(*numbers, strict=True)] or [""] * 6
    return [subjects, " ".join(positions), *texts, meters.names, meters.worth]
