"""A result as one SVG: CPU per request of gateway and Redis, and requests/s, by scenario.

Bars compare within a scenario: the longest of each is as wide as the panel. The direct upstream,
which is many times as fast, is left to the table.

Plain bars, written by hand: no plotting library is worth its weight for two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape

_COLOURS = {
    "tallygate": "#2563eb",
    "traefik": "#24a1c1",
    "traefik-fast": "#0e7490",
    "nginx": "#15803d",
    "envoy": "#b45bcf",
}
_BAR, _GAP, _GROUP, _TOP = 15, 3, 16, 92
_LABEL, _PANEL, _PAD = 190, 330, 64
_WIDTH = _LABEL + 2 * (_PANEL + _PAD)


def draw(result: Mapping[str, Any]) -> str:
    """The whole picture; a scenario is a group of bars, a peer a colour."""
    scenarios = [_through(scenario) for scenario in result["scenarios"]]
    scenarios = [scenario for scenario in scenarios if scenario["peers"]]
    rows, height = _place(scenarios)
    panels = (
        ("CPU per request, µs: gateway, Redis (pale)", _cpu),
        ("requests/s", lambda median: (median["rps"], 0.0)),
    )
    size = f'width="{_WIDTH}" height="{height}" viewBox="0 0 {_WIDTH} {height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="#ffffff"/>',
        _text(16, 24, f"Tallygate benchmarks, {result['date'][:10]}", size=16),
        _text(16, 42, f"{result['machine']}, medians of {result['rounds']} rounds", "#52606d"),
        *_legend({name: title for name, title in result["peers"].items() if name != "direct"}),
    ]
    for title, y in _titles(scenarios, rows):
        parts.append(_text(_LABEL - 12, y, title, anchor="end"))
    for number, (title, values) in enumerate(panels):
        left = _LABEL + number * (_PANEL + _PAD)
        parts.append(_text(left, _TOP - 6, title, "#52606d"))
        parts += _bars(rows, left, values)
    return "\n".join([*parts, "</svg>", ""])


# peer, its medians, those of all in the scenario, place
Row = tuple[str, Mapping[str, float], Sequence[Mapping[str, float]], float]
Values = Callable[[Mapping[str, float]], tuple[float, float]]


def _cpu(median: Mapping[str, float]) -> tuple[float, float]:
    return median["gateway_us"], median["redis_us"]


def _through(scenario: Mapping[str, Any]) -> dict[str, Any]:
    peers = {name: found for name, found in scenario["peers"].items() if name != "direct"}
    return {"title": scenario["title"], "peers": peers}


def _place(scenarios: Sequence[Mapping[str, Any]]) -> tuple[list[Row], int]:
    rows: list[Row] = []
    y = float(_TOP)
    for scenario in scenarios:
        all_of_it = [found["median"] for found in scenario["peers"].values()]
        for name, found in scenario["peers"].items():
            rows.append((name, found["median"], all_of_it, y))
            y += _BAR + _GAP
        y += _GROUP
    return rows, int(y + 4)


def _titles(scenarios: Sequence[Mapping[str, Any]], rows: list[Row]) -> list[tuple[str, float]]:
    found, at = [], 0
    for scenario in scenarios:
        found.append((scenario["title"], rows[at][3] + _BAR - 3))
        at += len(scenario["peers"])
    return found


def _bars(rows: list[Row], left: float, values: Values) -> list[str]:
    parts = []
    for name, median, others, y in rows:
        scale = _PANEL / (max(sum(values(each)) for each in others) or 1.0)
        first, second = values(median)
        colour = _COLOURS.get(name, "#52606d")
        parts.append(_rect(left, y, first * scale, colour))
        if second:
            parts.append(_rect(left + first * scale, y, second * scale, colour, opacity=0.4))
        total = first + second
        if total:
            label = f"{total:,.0f}" if total >= 100 else f"{total:.1f}"
            parts.append(_text(left + total * scale + 5, y + _BAR - 3, label, "#3e4c59", size=11))
    return parts


def _legend(peers: Mapping[str, str]) -> list[str]:
    parts, x = [], 16.0
    for name, title in peers.items():
        parts.append(_rect(x, 54, 12, _COLOURS.get(name, "#52606d"), height=12))
        parts.append(_text(x + 17, 64, title))
        x += 36 + 7.0 * len(title)
    return parts


def _rect(
    x: float, y: float, width: float, colour: str, *, opacity: float = 1, height: float = _BAR
) -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height}" '
        f'fill="{colour}" fill-opacity="{opacity:g}"/>'
    )


def _text(
    x: float,
    y: float,
    text: str,
    colour: str = "#1f2933",
    *,
    size: int = 12,
    anchor: str = "start",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{colour}" font-size="{size}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )
