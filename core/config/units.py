"""Human units: text such as `1d`, `10/s`, `5 MiB`, `10_000` as exact integers or decimals.

Every parser takes what YAML may hand over (text, int, Decimal) and raises `UnitError`, whose text
is `given: what is wrong; what is accepted`. A float is refused everywhere: its text is already
lost, and money must not pass through binary fractions.
"""

from __future__ import annotations

import json
import re
from decimal import Decimal

from core.policy import MAX_EXACT

DURATION_MS = {
    "ms": 1,
    "s": 1_000,
    "m": 60_000,
    "h": 3_600_000,
    "d": 86_400_000,
    "w": 604_800_000,
}
SIZE_BYTES = {
    "B": 1,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
}

# Digits may be grouped by single underscores, as in Python.
_DIGITS = r"[0-9]+(?:_[0-9]+)*"
INTEGER_PATTERN = rf"^[+-]?{_DIGITS}$"
QUANTITY_PATTERN = rf"^{_DIGITS}(?:\.{_DIGITS})?$"
DURATION_PATTERN = rf"^{_DIGITS} ?(?:ms|s|m|h|d|w)$"
RATE_PATTERN = rf"^{_DIGITS} ?/ ?(?:{_DIGITS} ?)?(?:ms|s|m|h|d|w)$"
SIZE_PATTERN = rf"^{_DIGITS}(?: ?(?:B|kB|MB|GB|KiB|MiB|GiB))?$"

_INTEGER = re.compile(INTEGER_PATTERN)
_QUANTITY = re.compile(QUANTITY_PATTERN)
_DURATION = re.compile(rf"^({_DIGITS}) ?(ms|s|m|h|d|w)$")
_RATE = re.compile(rf"^({_DIGITS}) ?/ ?({_DIGITS})? ?(ms|s|m|h|d|w)$")
_SIZE = re.compile(rf"^({_DIGITS})(?: ?(B|kB|MB|GB|KiB|MiB|GiB))?$")

_DURATION_HELP = "write a number and ms, s, m, h, d or w, such as 1d"
_RATE_HELP = "write a count, / and a period, such as 10/s, 600/m or 100/10s"
_SIZE_HELP = "write bytes, or a number and B, kB, MB, GB, KiB, MiB or GiB, such as 5 MiB"
_LONGEST_SHOWN = 80  # enough to recognise a value in the file, short enough for one line


class UnitError(ValueError):
    """A value that is not in its unit. `reason` is the text without the value given."""

    def __init__(self, given: object, reason: str) -> None:
        self.reason = reason
        super().__init__(f"{show(given)}: {reason}")


def show(value: object) -> str:
    """A value as one short line, in the spelling of the file; containers are only named."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, Decimal):
        return format(value, "f") if value.is_finite() else str(value)
    if value is None or isinstance(value, bool | int):
        return json.dumps(value)
    text = json.dumps(str(value), ensure_ascii=False)
    return text if len(text) <= _LONGEST_SHOWN else text[: _LONGEST_SHOWN - 4] + '..."'


def _bounded(given: object, number: int) -> int:
    if abs(number) > MAX_EXACT:
        raise UnitError(given, f"too large; at most {MAX_EXACT} can be counted exactly")
    return number


def parse_integer(value: object) -> int:
    """`10_000` (int, or text with optional sign and underscores) as an int.

    Raises:
        UnitError: anything else, or beyond `MAX_EXACT`.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        return _bounded(value, value)
    if isinstance(value, str) and len(value) < _LONGEST_SHOWN and _INTEGER.fullmatch(value.strip()):
        return _bounded(value, int(value))
    raise UnitError(value, "not a whole number; write digits, such as 100 or 10_000")


def parse_quantity(value: object) -> Decimal:
    """A count or an amount of money, zero or more, exactly as its text says.

    Raises:
        UnitError: negative, not a plain decimal number, a binary float, or beyond `MAX_EXACT`.
    """
    # YAML hands ints and (through this package's reader) Decimals; both have an exact text.
    number = isinstance(value, int | Decimal) and not isinstance(value, bool)
    text = show(value) if number else str(value).strip()
    if (number or isinstance(value, str)) and len(text) < _LONGEST_SHOWN:
        if text.startswith("-") and _QUANTITY.fullmatch(text[1:]):
            raise UnitError(value, "negative; write 0 or more")
        if _QUANTITY.fullmatch(text):
            quantity = Decimal(text.replace("_", ""))
            _bounded(value, int(quantity))
            return quantity
    raise UnitError(value, "not a number; write digits, such as 10_000 or 0.02")


def parse_duration(value: object) -> int:
    """`250ms`, `1s`, `5m`, `1h`, `1d`, `1w` as integer milliseconds, zero or more.

    Raises:
        UnitError: anything else; also a number without a unit, which would be a guess.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        raise UnitError(value, f"a duration needs a unit; {_DURATION_HELP}")
    found = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None or len(found[1]) > _LONGEST_SHOWN:
        raise UnitError(value, f"not a duration; {_DURATION_HELP}")
    return _bounded(value, int(found[1]) * DURATION_MS[found[2]])


def parse_rate(value: object) -> tuple[int, int]:
    """`10/s`, `600/m`, `100/10s` as (count, period in microseconds), both at least 1, not reduced.

    Raises:
        UnitError: anything else.
    """
    found = _RATE.fullmatch(value.strip()) if isinstance(value, str) else None
    if found is None or len(found[0]) > _LONGEST_SHOWN:
        raise UnitError(value, f"not a rate; {_RATE_HELP}")
    count = _bounded(value, int(found[1]))
    period_us = _bounded(value, int(found[2] or 1) * DURATION_MS[found[3]] * 1_000)
    if count < 1 or period_us < 1:
        raise UnitError(value, f"a rate of nothing; {_RATE_HELP}")
    return count, period_us


def parse_size(value: object) -> int:
    """`5 MiB`, `10kB`, or a bare number of bytes as integer bytes, zero or more.

    Raises:
        UnitError: anything else.
    """
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    found = _SIZE.fullmatch(text.strip()) if isinstance(text, str) else None
    if found is None or len(found[1]) > _LONGEST_SHOWN:
        raise UnitError(value, f"not a size; {_SIZE_HELP}")
    return _bounded(value, int(found[1]) * SIZE_BYTES[found[2] or "B"])


def format_duration(ms: int) -> str:
    """Milliseconds in the largest unit that divides them: 86_400_000 is `1d`, 90_000 is `90s`."""
    for unit, size in reversed(DURATION_MS.items()):
        # Weeks only from one week's multiple on, and zero has no natural unit.
        if ms and ms % size == 0:
            return f"{ms // size}{unit}"
    return f"{ms}ms" if ms else "0s"


def format_rate(count: Decimal, period_us: int) -> str:
    """A rate per the smallest named period that keeps the count whole: (1, 3_600_000) is `1_000/h`.

    `count` is in units of the meter, not scaled; falls back to the period as it is.
    """
    for unit in ("s", "m", "h", "d", "w"):
        per_unit, rest = divmod(count * DURATION_MS[unit] * 1_000, period_us)
        if rest == 0 and per_unit >= 1:
            return f"{format_quantity(per_unit)}/{unit}"
    period = format_duration(period_us // 1_000) if period_us % 1_000 == 0 else f"{period_us}us"
    return f"{format_quantity(count)}/{period}"


def format_quantity(quantity: Decimal | int) -> str:
    """`10_000`, `0.5`: grouped by underscores, without trailing zeros."""
    text = format(Decimal(quantity), "f")
    whole, _, fraction = text.partition(".")
    fraction = fraction.rstrip("0")
    return f"{int(whole):_}" + (f".{fraction}" if fraction else "")
