"""WebSockets in the configuration: the example of the docs, and what `true` means."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from core.config import loads
from core.config.websocket import WebSocketSpec
from core.policy import FrameCost, WebSocket

TEXT = (Path(__file__).parents[3] / "docs" / "websocket.md").read_text()
ROUTE = """
upstreams: {live: {urls: ["http://127.0.0.1:9000"]}}
meters: {credits: {unit: credit, decimals: 3}}
routes: [{match: {path: /live/*}, upstream: live, websocket: %s}]
plans: {free: {unlimited: true}}
"""


def test_the_example_loads_and_means_what_it_says() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    base = 'upstreams: {live: {urls: ["http://127.0.0.1:9000"]}}\n'
    rule = loads(base + example, env={}).routes[0].websocket
    assert rule is not None
    assert rule.origins == frozenset((b"https://app.example.com",))
    assert rule.costs == (
        FrameCost("messages", 1, per_byte=False, sender="client"),
        FrameCost("traffic", 1, per_byte=True, sender="both"),
    )
    assert (rule.idle_ms, rule.max_message) == (300_000, 2**20)


def test_every_key_and_default_is_in_the_docs() -> None:
    table = TEXT.partition("| key | default |")[2].partition("\n\n")[0]
    keys = {field.alias or name for name, field in WebSocketSpec.model_fields.items()}
    assert keys <= {name.partition(".")[0] for name in re.findall(r"\| `([a-z_.<>]+)`", table)}


@pytest.mark.parametrize(
    ("written", "rule"),
    [
        ("true", WebSocket()),
        ("{}", WebSocket()),
        ("false", None),
        (
            "{meters: {credits: {per: byte, from: upstream, cost: 0.002}}}",
            WebSocket(costs=(FrameCost("credits", 2, per_byte=True, sender="upstream"),)),
        ),
        ("{meters: {credits: {per: message, cost: 0}}}", WebSocket()),
    ],
)
def test_what_is_written_is_what_is_compiled(written: str, rule: WebSocket | None) -> None:
    assert loads(ROUTE % written, env={}).routes[0].websocket == rule
