"""From what a route says of its WebSockets to what the gateway reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from core.config.compile import Meters, mapping
from core.config.document import Path
from core.config.problems import Problems
from core.config.websocket import WebSocketSpec
from core.policy import Aggregation, FrameCost, WebSocket


def refer_websocket(path: Path, raw: Mapping[str, Any], meters: Meters, problems: Problems) -> None:
    """Report meters of a route's WebSockets that are not there, or cannot add up."""
    for name in mapping(raw.get("websocket"), "meters"):
        at = (*path, "websocket", "meters", name)
        meters.refer(at, name, value=False)
        known = meters.compiled.get(name)
        if known is not None and known.aggregation is not Aggregation.SUM:
            problems.add(
                at,
                f"what goes through adds up, and this meter keeps the {known.aggregation} value; "
                "name a meter with aggregation sum",
                value=False,
            )


def compile_websocket(path: Path, spec: WebSocketSpec | None, meters: Meters) -> WebSocket | None:
    """The rule of a route; `path` is the route's in the file."""
    if spec is None:
        return None
    costs: list[FrameCost] = []
    for name, cost in spec.meters.items():
        units = meters.scale((*path, "websocket", "meters", name, "cost"), name, cost.cost)
        if units:
            costs.append(FrameCost(name, units, cost.per == "byte", cost.sender))
    return WebSocket(
        origins=frozenset(origin.encode() for origin in spec.origins or ()),
        costs=tuple(costs),
        idle_ms=spec.idle_timeout_ms,
        max_message=spec.max_message or 0,
        recheck_ms=spec.recheck_ms,
        max_connections=spec.max_connections,
    )
