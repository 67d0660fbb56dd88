"""The examples of docs/routes.md are configurations, and its table of keys is complete."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

import pytest

from core.config import loads
from core.config.catalog import RouteSpec

TEXT = (Path(__file__).parents[3] / "docs" / "routes.md").read_text()
EXAMPLES = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
BASE = """
upstreams: {orders: {urls: ["http://127.0.0.1:9000"]}}
plans: {free: {limits: {day: {window: 1d, limit: 5}}}}
"""


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_loads(example: str) -> None:
    if example.startswith("- "):
        example = "routes:\n" + textwrap.indent(example, "  ")
    elif not example.startswith("routes:"):
        route = "- match: {path: /shops/*}\n  upstream: orders\n" + textwrap.indent(example, "  ")
        example = "routes:\n" + textwrap.indent(route, "  ")
    env = {"ORDERS_TOKEN": "x", "UPSTREAM_TOKEN": "x"}
    assert loads(BASE + example, env=env).routes


def test_every_key_of_a_route_is_there() -> None:
    table = TEXT.partition("## Keys")[2].partition("##")[0]
    named = set(re.findall(r"`([a-z_]+)(?:\.[a-z]+)?`", table))
    keys = {field.alias or name for name, field in RouteSpec.model_fields.items()}
    assert keys <= named
