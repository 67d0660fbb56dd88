"""Rows written to the ledger without a flush."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal

from core import clock

_DECIMALS = 6  # the most that a meter may have


def packed(
    subjects: Sequence[str],
    meters: Sequence[str],
    starts: Sequence[datetime],
    seconds: Sequence[datetime],
    totals: Sequence[Decimal],
    overages: Sequence[Decimal],
    epochs: Sequence[int],
    versions: Sequence[int],
) -> list[object]:
    """Arguments of `store_periods` (`seconds` are ends) or `store_hours` (hours), a value a row."""

    def text(values: Sequence[int]) -> str:
        return " ".join(map(str, values))

    names = sorted(set(meters))
    return [
        list(subjects),
        text([names.index(meter) + 1 for meter in meters]),
        text([clock.from_datetime(at) for at in starts]),
        text([clock.from_datetime(at) for at in seconds]),
        text([int(Decimal(total).scaleb(_DECIMALS)) for total in totals]),
        text([int(Decimal(overage).scaleb(_DECIMALS)) for overage in overages]),
        text(epochs),
        text(versions),
        names,
        [Decimal(1).scaleb(-_DECIMALS)] * len(names),
    ]
