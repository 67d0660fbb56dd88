"""What an answer costs as a whole, and as far as it came, by each source and rule."""

from __future__ import annotations

import pytest

from core.cost import ActualCost, OnAbort
from gateway.cost.tap import CostRules, Header, Tap

STREAM = (b"content-type", b"text/event-stream; charset=utf-8")
JSON = (b"content-type", b"application/json")
HEADER = ActualCost("header", 3, 5_000, header="x-usage-cost")
BYTES = ActualCost("bytes", 0, 9, bytes_per=10, on_abort=OnAbort.STREAMED)
BODY = ActualCost("body", 0, 9, json=("usage", "total"), limit=100)
EVENTS = ActualCost(
    "events", 0, 9, sse=("total",), per_event=2, limit=100, on_abort=OnAbort.STREAMED, most=50
)
EITHER = ActualCost("either", 0, 9, json=("total",), sse=("total",), limit=100)


def tap(*rules: ActualCost) -> tuple[Tap, list[str]]:
    ended: list[str] = []
    return Tap(CostRules(rules), lambda: ended.append("ended")), ended


def run(
    rule: ActualCost, headers: list[Header], *pieces: bytes, complete: bool = True
) -> tuple[int, str]:
    reading, ended = tap(rule)
    reading.head(200, headers)
    for piece in pieces:
        reading.piece(piece)
    if complete:
        reading.end()
    assert len(ended) == complete
    ((_, units, result),) = reading.costs(complete)
    return units, result


@pytest.mark.parametrize(
    ("headers", "expected"),
    [
        ([(b"x-usage-cost", b"1.25")], (1_250, "actual")),
        ([(b"x-usage-cost", b"0")], (0, "actual")),
        ([], (5_000, "kept_missing")),
        ([(b"x-usage-cost", b"much")], (5_000, "kept_invalid")),
        ([(b"x-usage-cost", b"-1")], (5_000, "kept_negative")),
        ([(b"x-usage-cost", b"1e30")], (5_000, "kept_above_max")),
        ([(b"x-usage-cost", b"1"), (b"x-usage-cost", b"1")], (5_000, "kept_invalid")),
        ([(b"x-usage-cost", "½".encode())], (5_000, "kept_invalid")),
    ],
)
def test_a_header(headers: list[Header], expected: tuple[int, str]) -> None:
    assert run(HEADER, headers) == expected


def test_a_header_is_stripped_unless_it_is_wanted_and_may_be_a_trailer() -> None:
    cost, other = (b"x-usage-cost", b"2"), (b"x-other", b"1")
    reading, _ = tap(HEADER)
    assert reading.head(200, [other, cost]) == [other]
    shown = ActualCost("header", 3, 5_000, header="x-usage-cost", strip=False)
    reading, _ = tap(shown)
    assert reading.head(200, [other, cost]) == [other, cost]
    reading, _ = tap(HEADER)
    assert reading.head(200, [other]) == [other]
    assert reading.trailers([cost, other]) == [other]
    assert reading.costs(True)[0].units == 2_000


def test_bytes() -> None:
    assert run(BYTES, [], b"12345678", b"90") == (1, "actual")
    assert run(BYTES, [], b"12345678", b"901") == (2, "actual")
    assert run(BYTES, [], b"123", complete=False) == (1, "aborted_streamed")
    assert run(BYTES, [], complete=False) == (0, "aborted_streamed")


def test_a_json_body() -> None:
    assert run(BODY, [JSON], b'{"usage": {"to', b'tal": 41}}') == (41, "actual")
    assert run(BODY, [], b'{"usage": {"total": "41"}}') == (41, "actual")
    assert run(BODY, [JSON], b"{}") == (9, "kept_missing")
    assert run(BODY, [JSON]) == (9, "kept_missing")
    assert run(BODY, [JSON], b"<html>") == (9, "kept_invalid")
    assert run(BODY, [JSON], b'{"usage": {"total": true}}') == (9, "kept_invalid")
    assert run(BODY, [JSON], b" " * 90, b'{"usage": {"total": 41}}') == (9, "kept_too_long")
    assert run(BODY, [STREAM], b'{"usage": {"total": 41}}') == (9, "kept_missing")
    gzip = (b"content-encoding", b"gzip")
    assert run(BODY, [JSON, gzip], b'{"usage": {"total": 41}}') == (9, "kept_encoded")
    identity = (b"content-encoding", b"identity")
    assert run(BODY, [JSON, identity], b'{"usage": {"total": 41}}') == (41, "actual")
    assert run(BODY, [JSON], b'{"usage": {"total": 41}}', complete=False) == (9, "aborted_estimate")


def test_events() -> None:
    total, event, done = b'data: {"total": 30}\n\n', b"data: {}\n\n", b"data: [DONE]\n\n"
    assert run(EVENTS, [STREAM], event, total, done) == (30, "actual")
    assert run(EVENTS, [STREAM], event) == (9, "kept_missing")
    assert run(EVENTS, [JSON], total) == (9, "kept_missing")
    assert run(EVENTS, [STREAM], b'data: {"total": 51}\n\n') == (9, "kept_above_max")
    assert run(EVENTS, [STREAM], b"data: " + b"x" * 200 + b"\n\n") == (9, "kept_too_long")
    # cut: the last total, and what came after it
    assert run(EVENTS, [STREAM], complete=False) == (0, "aborted_streamed")
    assert run(EVENTS, [STREAM], event, event[:4], complete=False) == (2, "aborted_streamed")
    assert run(EVENTS, [STREAM], total, event * 3, complete=False) == (36, "aborted_streamed")
    assert run(EVENTS, [STREAM], event * 99, complete=False) == (50, "aborted_streamed")
    # the stream says that it is complete, and its client does not wait for more
    assert run(EVENTS, [STREAM], event, total, done, complete=False) == (30, "actual")


def test_an_answer_in_either_form() -> None:
    assert run(EITHER, [STREAM], b'data: {"total": 4}\n\n') == (4, "actual")
    assert run(EITHER, [JSON], b'{"total": 5}') == (5, "actual")


def test_time_passes() -> None:
    reading, _ = tap(ActualCost("time", 6, 1, ms_per=1, on_abort=OnAbort.STREAMED))
    reading.head(200, [])
    first = reading.costs(True)[0].units
    while (second := reading.costs(True)[0].units) == first:
        pass
    assert second > first


@pytest.mark.parametrize(
    ("rule", "units"), [(OnAbort.STREAMED, 0), (OnAbort.ESTIMATE, 9), (OnAbort.NOTHING, 0)]
)
def test_an_answer_that_did_not_begin(rule: OnAbort, units: int) -> None:
    for source in ({"bytes_per": 1}, {"ms_per": 1}, {"header": "x"}, {"sse": ("a",), "limit": 1}):
        reading, _ = tap(ActualCost("m", 0, 9, on_abort=rule, **source))  # type: ignore[arg-type]
        ((_, found, result),) = reading.costs(False)
        assert (found, result) == (units, f"aborted_{rule}")


def test_several_meters_of_one_answer() -> None:
    output = ActualCost("output", 0, 9, sse=("out",), limit=100)
    reading, _ = tap(HEADER, BYTES, EVENTS, output)
    reading.head(200, [STREAM, (b"x-usage-cost", b"1")])
    body = b'data: {"out": 3}\n\ndata: {"total": 8}\n\n'
    reading.piece(body)
    found = {cost.rule.meter: cost.units for cost in reading.costs(True)}
    assert found == {"header": 1_000, "bytes": 4, "events": 8, "output": 3}
