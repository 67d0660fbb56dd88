"""Reading a cost from an answer, cut into pieces at any place."""

from __future__ import annotations

import json
from decimal import Decimal
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from core.cost import ActualCost, Kept
from gateway.cost.fields import MISSING, extract
from gateway.cost.sse import SseReader

ENDS = st.sampled_from(["\n", "\r\n", "\r"])
LIMIT = 10_000


def reader(*paths: str, limit: int = LIMIT) -> SseReader:
    return SseReader([tuple(path.split(".")) for path in paths], limit)


def read(body: bytes, cuts: list[int], *paths: str, limit: int = LIMIT) -> SseReader:
    found = reader(*paths, limit=limit)
    edges = [0, *sorted(cut % (len(body) + 1) for cut in cuts), len(body)]
    for start, stop in pairwise(edges):
        found.feed(body[start:stop])
    found.end()
    return found


# An event: what it says of the total (None: nothing), how its lines end, whether its document is
# spread over several data lines, and what stands around it.
events = st.tuples(
    st.one_of(st.none(), st.integers(0, 10**9), st.decimals(0, 1000, places=3)),
    ENDS,
    st.booleans(),
    st.sampled_from(["", ": comment", "id: 7", "event: delta", "retry: 10"]),
)


def written(total: Any, end: str, spread: bool, around: str) -> str:
    usage = "null" if total is None else f'{{"total": {total}}}'
    lines = [around] if around else []
    document = f'{{"usage": {usage}, "text": "data: \\n\\n {{}} é"}}'
    if spread:
        lines += [f"data: {part}" for part in document.replace(", ", ",\n", 1).split("\n")]
    else:
        lines.append(f"data:{document}")
    return end.join(lines) + end * 2


@settings(deadline=None)
@given(
    stream=st.lists(events, max_size=8),
    cuts=st.lists(st.integers(0, 2**16), max_size=12),
    done=st.booleans(),
    bom=st.booleans(),
)
@example(stream=[(5, "\r\n", True, "")] * 2, cuts=list(range(200)), done=True, bom=True)
@example(
    stream=[(5, "\r", False, ": comment"), (None, "\n", False, "")], cuts=[], done=True, bom=True
)
def test_the_last_event_that_has_it_counts_wherever_the_stream_is_cut(
    stream: list[tuple[Any, str, bool, str]], cuts: list[int], done: bool, bom: bool
) -> None:
    text = "".join(written(*event) for event in stream) + ("data: [DONE]\n\n" if done else "")
    found = read(("\ufeff" * bom + text).encode(), cuts, "usage.total", "nothing.here")
    totals = [event[0] for event in stream]
    known = [at for at, total in enumerate(totals) if total is not None]
    assert found.values == [totals[known[-1]] if known else MISSING, MISSING]
    assert found.since == [len(totals) - 1 - known[-1] if known else len(totals), len(totals)]
    assert found.done is done
    assert not found.too_long


def test_every_single_cut_and_pair_of_cuts() -> None:
    body = (
        b'\xef\xbb\xbf: hi\r\n\r\ndata: {"a":\rdata: 1}\n\n'
        b'event: x\ndata: {"usage":{"t": 3.10}}\r\r\n'
        b'retry: 1\ndata:{"b":1}\n\ndata: [DONE]\n\n'
    )
    for first in range(len(body) + 1):
        for second in range(first, len(body) + 1):
            found = read(body, [first, second], "usage.t", "a")
            assert found.values == [Decimal("3.10"), 1]
            assert (found.since, found.done) == ([1, 2], True)


@settings(deadline=None)
@given(cuts=st.lists(st.integers(0, 2**16), max_size=6), size=st.integers(0, 3_000))
def test_an_event_beyond_the_limit_is_counted_and_not_held(cuts: list[int], size: int) -> None:
    event = b'data: {"total": 1, "text": "' + b"x" * size + b'"}\n'
    found = read(event + b"\ndata: {}\n\n", cuts, "total", limit=1_000)
    long = len(event) - 1 > 1_000
    assert found.too_long is long
    assert found.values == [MISSING if long else 1]
    assert found.since == [2 if long else 1]


def test_what_never_ends_holds_no_more_than_the_limit() -> None:
    for piece in (b"x", b"data: 1\n", b"data\n", b": comment\n"):
        found = reader("a", limit=1_000)
        for _ in range(5_000):
            found.feed(piece)
        assert sum(map(len, found._rest)) + sum(map(len, found._data)) <= 1_000 + len(piece)
        assert len(found._data) <= 1_000


def test_a_last_event_without_its_empty_line_counts() -> None:
    assert read(b'data: {"a": 4}', [], "a").values == [4]
    assert read(b'data: {"a": 4}\n', [], "a").values == [4]
    assert read(b'data: {"a": 4}\r', [], "a").values == [4]


@settings(deadline=None)
@given(
    value=st.one_of(
        st.integers(-(10**30), 10**30),
        st.decimals(-(10**9), 10**9, places=6),
        st.text(max_size=20),
        st.booleans(),
    )
)
def test_a_number_in_json_is_what_its_text_says(value: Any) -> None:
    text = str(value) if isinstance(value, Decimal) else json.dumps(value)
    data = f'{{"other": 1.5, "usage": [{{"total": {text}}}]}}'.encode()
    assert extract(data, [("usage", "0", "total")]) == [value]


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[1,]", b'{"a": NaN}', b'{"a": Infinity}', b"\xff", b"[" * 100_000, b"{} {}"],
    ids=range(8),
)
def test_what_is_no_json_has_no_fields(data: bytes) -> None:
    assert extract(data, [("a",)]) is None


@pytest.mark.parametrize("document", [{}, {"a": None}, {"a": {"b": 1}}, [], [[]], "a", 7])
def test_a_field_that_is_not_there(document: Any) -> None:
    assert extract(json.dumps(document).encode(), [("a", "c"), ("5",)]) == [MISSING, MISSING]


RULE = ActualCost("m", 2, 100, most=1_000_00)


@pytest.mark.parametrize(
    ("value", "units"),
    [
        (0, 0),
        (7, 700),
        ("7", 700),
        (" 7.5\t", 750),
        (Decimal("0.01"), 1),
        (Decimal("0.001"), 1),  # every smallest unit begun
        (Decimal("1e1"), 1_000),
        ("1E-2", 1),
        (Decimal("0." + "0" * 60 + "1"), 1),
        (1000, 1_000_00),
        (1001, Kept.ABOVE_MAX),
        (Decimal("1e999999"), Kept.ABOVE_MAX),
        (10**60, Kept.ABOVE_MAX),
        (10**100, Kept.INVALID),
        (-1, Kept.NEGATIVE),
        ("-0.01", Kept.NEGATIVE),
        ("", Kept.INVALID),
        ("abc", Kept.INVALID),
        ("NaN", Kept.INVALID),
        ("Infinity", Kept.INVALID),
        ("1_000", Kept.INVALID),
        ("1,5", Kept.INVALID),
        ("٧", Kept.INVALID),
        ("1" * 65, Kept.INVALID),
        (1.5, Kept.INVALID),  # a float is no text of a number
        (True, Kept.INVALID),
        (None, Kept.INVALID),
        ([1], Kept.INVALID),
        ({}, Kept.INVALID),
    ],
)
def test_what_a_reported_number_costs(value: object, units: int | Kept) -> None:
    assert RULE.reported(value) == units


@settings(deadline=None)
@given(units=st.integers(0, 10**5), extra=st.text("0", max_size=20))
def test_a_decimal_that_the_meter_keeps_is_exact(units: int, extra: str) -> None:
    text = f"{units // 100}.{units % 100:02d}{extra}"
    assert RULE.reported(text) == units
    assert RULE.reported(Decimal(text)) == units


def test_what_is_measured_costs_every_unit_begun_and_no_more_than_max() -> None:
    size = ActualCost("m", 0, 1, most=10, bytes_per=1024)
    assert [size.measured(n, 0) for n in (0, 1, 1024, 1025, 10**9)] == [0, 1, 1, 2, 10]
    time = ActualCost("m", 1, 1, most=10**6, ms_per=1_000)
    assert [time.measured(0, n) for n in (0, 1, 100_000, 100_001, 3_600_000_000)] == [
        0,
        1,
        1,
        2,
        36_000,
    ]
