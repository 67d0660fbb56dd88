"""What a route says of costs that its answers decide, as the hot path reads it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from jsonschema import Draft202012Validator

from core.config import json_schema, loads
from core.cost import MOST_UNITS, ActualCost, OnAbort
from core.policy import Route

DOCS = Path(__file__).parents[3] / "docs" / "outcome-cost.md"
AROUND = """
upstreams: {llm: {urls: [http://127.0.0.1:9000]}}
plans: {free: {unlimited: true}}
"""


def routes(text: str, env: dict[str, str] | None = None) -> tuple[Route, ...]:
    Draft202012Validator(json_schema()).validate(yaml.safe_load(text))
    return loads(text + AROUND, env=env or {}).routes


def test_the_example_of_the_docs() -> None:
    (example,) = re.findall(r"^```yaml\n(.*?)^```", DOCS.read_text(), re.MULTILINE | re.DOTALL)
    (route,) = routes(example)
    assert route.costs == {"requests": 1, "tokens": 1_000, "usd": 10_000}
    total = ("usage", "total_tokens")
    assert route.actual == (
        ActualCost(
            "tokens", 0, 1_000, 200_000, OnAbort.STREAMED,
            json=total, sse=total, per_event=1, limit=2**20,
        ),
        ActualCost("usd", 6, 10_000, MOST_UNITS, header="x-usage-cost"),
    )  # fmt: skip
    assert [rule.source for rule in route.actual] == ["json_or_sse", "header"]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{header: X-Cost, strip: false}", {"header": "x-cost", "strip": False}),
        ("{bytes: response}", {"bytes_per": 1}),
        ("{bytes: response, per: 2KiB}", {"bytes_per": 2_048}),
        ("{bytes: response, per: 100}", {"bytes_per": 100}),
        ("{duration: response}", {"ms_per": 1}),
        ("{duration: response, per: 1m}", {"ms_per": 60_000}),
        ("{json: a.0.b, limit: 64KiB}", {"json": ("a", "0", "b"), "limit": 65_536}),
        ("{sse: total, per_event: 0}", {"sse": ("total",), "limit": 2**20}),
    ],
)
def test_each_source(source: str, expected: dict[str, object]) -> None:
    (route,) = routes(f"""
routes:
  - match: {{path: /a}}
    upstream: llm
    meters: {{requests: {{estimate: 3, from: {source}, max: "${{MAX}}"}}}}
""", {"MAX": "1_000"})  # fmt: skip
    assert route.actual == (ActualCost("requests", 0, 3, 1_000, **expected),)  # type: ignore[arg-type]
    assert not route.reserve
