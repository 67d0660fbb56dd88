"""Every shape of request, direct and through the gateway: only what is listed may differ."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from tests.differential.conftest import Pair
from tests.differential.differences import TABLE, table
from tests.differential.shapes import REFUSED, SHAPES, Shape
from tests.support.processes import ROOT


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_a_shape(pair: Pair, shape: Shape) -> None:
    pair.check(shape)


_PLAIN = st.text(st.sampled_from("abcXYZ019-_~!$&'()*+,;=:@"), min_size=1, max_size=12)
_ESCAPES = st.sampled_from(
    ("%20", "%21", "%41", "%7e", "%C3%A9", "%E2%82%AC", "%3B", "%3d", "%26", "%2B", "%3F", "%2F")
)
_SEGMENT = st.one_of(_PLAIN, st.just("v1.2"), _ESCAPES)
_ESCAPED = st.lists(_SEGMENT, min_size=1, max_size=4).map("".join)
_QUERY = st.lists(
    st.one_of(_SEGMENT, st.sampled_from(["&", "=", "?", "/", "%20", "+", "%C3%A9"])), max_size=8
).map("".join)
_NAME = st.from_regex(r"X-[A-Za-z][A-Za-z0-9-]{0,20}[a-z]", fullmatch=True).map(
    lambda name: f"{name}-q"  # none that means something
)
_VALUE = st.binary(max_size=40).map(
    lambda raw: bytes(byte for byte in raw if byte == 9 or (byte >= 32 and byte != 127)).strip()
)
_shapes = st.builds(
    Shape,
    name=st.just("generated"),
    method=st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE"]),
    target=st.builds(
        "/anything/{}?{}".format, st.lists(_ESCAPED, max_size=4).map("/".join), _QUERY
    ),
    fields=st.lists(st.tuples(_NAME, _VALUE), max_size=6).map(tuple),
    body=st.one_of(st.none(), st.binary(max_size=400)),
    chunks=st.lists(st.integers(1, 100), max_size=6).map(tuple),
)


@example(Shape("bare", "GET", "/anything/?"))
@given(shape=_shapes)
@settings(
    derandomize=True,
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
def test_generated_shapes(pair: Pair, shape: Shape) -> None:
    pair.check(shape)


@pytest.mark.parametrize("target", REFUSED)
def test_a_path_without_an_honest_reading_is_refused(pair: Pair, target: str) -> None:
    counted = pair.stack.state(pair.subscriber)["requests"].total
    assert pair.through(Shape("refused", "GET", target)).status == 400
    pair.asked -= 1
    assert pair.stack.state(pair.subscriber)["requests"].total == counted
    pair.comparison.used.add("path")


def test_each_request_was_counted_once(pair: Pair) -> None:
    assert pair.asked > 0
    assert pair.stack.state(pair.subscriber)["requests"].total == pair.asked


def test_nearly_all_of_them_shared_a_connection(pair: Pair) -> None:
    """Or framing that goes wrong from one answer to the next would not be seen."""
    assert pair.opened <= pair.asked / 20


def test_every_difference_in_the_table_is_real_and_documented(pair: Pair) -> None:
    if pair.asked < len(SHAPES):
        pytest.skip("only some of the shapes were sent")
    assert pair.comparison.used == {row.key for row in TABLE}
    page = Path(ROOT, "docs", "differences.md").read_text()
    assert table() in page, "docs/differences.md is out of date; print `table()`"
