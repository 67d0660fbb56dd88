"""What a request really cost, as its answer says: the rules, and arithmetic on exact numbers.

A route charges an estimate when it admits, and corrects it by one of these sources. Quantities are
integers in the meter's smallest unit; a reported number is read as a decimal, never as a float.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import ROUND_CEILING, Context, Decimal, InvalidOperation
from enum import StrEnum

# The most that one answer may cost when a route does not say: a thousand of these are still exact.
MOST_UNITS = 2**43
# A number of more characters is none that anybody charges by.
_LONGEST = 64
_EXACT = Context(prec=200)


class OnAbort(StrEnum):
    """What an answer costs that did not come to its end."""

    STREAMED = "streamed"  # what of it was there
    ESTIMATE = "estimate"  # what was reserved
    NOTHING = "nothing"


class Kept(StrEnum):
    """Why the estimate stands although the answer came to its end."""

    MISSING = "missing"  # the answer does not say
    INVALID = "invalid"  # what it says is no number, or there are several
    NEGATIVE = "negative"
    ABOVE_MAX = "above_max"
    TOO_LONG = "too_long"  # the body, or an event, is longer than is looked at
    ENCODED = "encoded"  # the body is compressed


FieldPath = tuple[str, ...]
"""Keys from the outside in; a number also counts into a list."""


@dataclass(frozen=True, slots=True)
class ActualCost:
    """Where the cost of one meter is taken from.

    One of `header`, `json` or `sse` or both, `bytes_per` and `ms_per` is set. `estimate`, `most`
    and `per_event` are in smallest units of the meter, which keeps `decimals`.
    """

    meter: str
    decimals: int
    estimate: int
    most: int = MOST_UNITS
    on_abort: OnAbort = OnAbort.ESTIMATE
    header: str = ""
    strip: bool = True
    json: FieldPath = ()
    sse: FieldPath = ()
    per_event: int = 0
    limit: int = 0
    bytes_per: int = 0
    ms_per: int = 0

    @property
    def source(self) -> str:
        """What it is taken from, in one word."""
        if self.header:
            return "header"
        if self.json or self.sse:
            return "json_or_sse" if self.json and self.sse else "json" if self.json else "sse"
        return "bytes" if self.bytes_per else "duration"

    def at_head(self) -> int:
        """What stays charged of an answer that has just begun, should its gateway be killed."""
        return self.estimate if self.on_abort is OnAbort.ESTIMATE else 0

    def measured(self, size: int, micros: int) -> int:
        """The cost of so many bytes, or of so much time; every smallest unit begun is one."""
        amount, per = (size, self.bytes_per) if self.bytes_per else (micros, self.ms_per * 1000)
        scale: int = 10**self.decimals
        return min(-(-amount * scale // per), self.most)

    def reported(self, value: object) -> int | Kept:
        """The cost that a number, or its text, says; more digits than are kept are rounded up."""
        number = _number(value)
        if number is None:
            return Kept.INVALID
        if number < 0:
            return Kept.NEGATIVE
        if number.adjusted() > _LONGEST:  # before it is written out
            return Kept.ABOVE_MAX
        scaled = number.scaleb(self.decimals, _EXACT)
        units = int(scaled.to_integral_value(ROUND_CEILING, _EXACT))
        return units if units <= self.most else Kept.ABOVE_MAX


def _number(value: object) -> Decimal | None:
    if isinstance(value, bool | float):
        return None  # a float's text is lost: whoever reads JSON hands over a Decimal
    if isinstance(value, int):
        return Decimal(value) if value.bit_length() < 4 * _LONGEST else None
    if isinstance(value, str):
        value = value.strip(" \t")
        if not value.isascii() or "_" in value:
            return None
        if len(value) > _LONGEST:
            return None
        try:
            value = Decimal(value)
        except InvalidOperation:
            return None
    if isinstance(value, Decimal) and value.is_finite():
        # a longer fraction could not be rounded exactly
        return value if len(value.as_tuple().digits) <= 2 * _LONGEST else None
    return None
