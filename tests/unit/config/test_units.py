from __future__ import annotations

from decimal import Decimal

import pytest

from core.config import units
from core.config.units import UnitError
from core.policy import MAX_EXACT


@pytest.mark.parametrize(
    ("given", "ms"),
    [
        ("250ms", 250),
        ("1s", 1_000),
        ("1m", 60_000),
        ("1h", 3_600_000),
        ("1d", 86_400_000),
        ("1w", 604_800_000),
        ("1_000ms", 1_000),
        ("5 m", 300_000),
        ("0s", 0),
    ],
)
def test_durations(given: str, ms: int) -> None:
    assert units.parse_duration(given) == ms


@pytest.mark.parametrize(
    "given",
    ["", "s", "1", "-1s", "1.5s", "1 fortnight", "1S", "1__0s", "1s\n2", "1d" * 99, 5, None],
)
def test_what_is_no_duration_says_what_was_given_and_what_is_accepted(given: object) -> None:
    with pytest.raises(UnitError) as caught:
        units.parse_duration(given)
    assert str(caught.value).startswith(units.show(given) + ": ")
    assert "write a number and ms, s, m, h, d or w" in str(caught.value)


@pytest.mark.parametrize(
    ("given", "rate"),
    [
        ("10/s", (10, 1_000_000)),
        ("600/m", (600, 60_000_000)),
        ("1_000/h", (1_000, 3_600_000_000)),
        ("5/d", (5, 86_400_000_000)),
        ("100/10s", (100, 10_000_000)),
        ("1/250ms", (1, 250_000)),
        ("10 / s", (10, 1_000_000)),
    ],
)
def test_rates(given: str, rate: tuple[int, int]) -> None:
    assert units.parse_rate(given) == rate


@pytest.mark.parametrize("given", ["10", 10, "0/s", "1/0s", "-1/s", "1.5/s", "10/fortnight", "/s"])
def test_what_is_no_rate(given: object) -> None:
    with pytest.raises(UnitError, match="such as 10/s, 600/m or 100/10s"):
        units.parse_rate(given)


@pytest.mark.parametrize(
    ("given", "size"),
    [("5 MiB", 5 * 2**20), ("10kB", 10_000), ("1_024", 1_024), (7, 7), ("1GB", 10**9), ("3B", 3)],
)
def test_sizes(given: object, size: int) -> None:
    assert units.parse_size(given) == size


@pytest.mark.parametrize("given", ["5 mib", "-1", "1.5 MiB", True, "MiB"])
def test_what_is_no_size(given: object) -> None:
    with pytest.raises(UnitError, match="such as 5 MiB"):
        units.parse_size(given)


@pytest.mark.parametrize(("given", "number"), [("10_000", 10_000), (5, 5), ("-3", -3), (" 1 ", 1)])
def test_integers(given: object, number: int) -> None:
    assert units.parse_integer(given) == number


@pytest.mark.parametrize("given", ["1_", "_1", "1.0", "", True, 1.0, None, "٣", "9" * 5000])
def test_what_is_no_integer(given: object) -> None:
    with pytest.raises(UnitError, match="not a whole number"):
        units.parse_integer(given)


def test_quantities_keep_their_exact_text() -> None:
    assert str(units.parse_quantity("0.10")) == "0.10"
    assert str(units.parse_quantity(Decimal("99.00"))) == "99.00"
    assert units.parse_quantity("10_000.5") == Decimal("10000.5")


@pytest.mark.parametrize("given", [0.1, "1e3", "inf", "NaN", Decimal("NaN"), True, None, "-1", -1])
def test_what_is_no_quantity(given: object) -> None:
    with pytest.raises(UnitError, match=r"not a number|negative"):
        units.parse_quantity(given)


def test_numbers_beyond_exact_doubles_are_refused() -> None:
    assert units.parse_integer(MAX_EXACT) == MAX_EXACT
    for parse, given in (
        (units.parse_integer, MAX_EXACT + 1),
        (units.parse_quantity, MAX_EXACT + 1),
        (units.parse_duration, f"{MAX_EXACT}s"),
        (units.parse_rate, "1/99999999999999w"),
        (units.parse_size, f"{MAX_EXACT} GiB"),
    ):
        with pytest.raises(UnitError, match="too large"):
            parse(given)


@pytest.mark.parametrize("text", ["250ms", "1s", "90s", "5m", "1h", "1d", "2w", "0s"])
def test_a_formatted_duration_reads_back(text: str) -> None:
    assert units.format_duration(units.parse_duration(text)) == text


@pytest.mark.parametrize(
    ("count", "period_us", "text"),
    [
        (1, 100_000, "10/s"),
        (1, 3_600_000, "1_000/h"),
        (1, 86_400_000_000, "1/d"),
        (1, 200_000, "5/s"),
        (1, 31 * 86_400_000_000, "1/31d"),
    ],
)
def test_a_reduced_rate_is_shown_per_a_named_period(count: int, period_us: int, text: str) -> None:
    assert units.format_rate(Decimal(count), period_us) == text


def test_a_long_value_is_shown_cut() -> None:
    assert len(units.show("x" * 500)) <= 80
