"""The result of a comparison: as data, as tables, as a chart, and against its targets."""

from __future__ import annotations

import json
import statistics
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import chart
from benchmarks.peers import Peer
from benchmarks.processes import machine
from benchmarks.stack import Cores

Result = dict[str, Any]
_WIDTH = 150  # of tables that are piped or written to a file
CORES = Cores.of_machine()

_COLUMNS: tuple[tuple[str, Callable[[Mapping[str, float]], str]], ...] = (
    ("requests/s", lambda row: f"{row['rps']:,.0f}"),
    ("p50 ms", lambda row: f"{row['p50_us'] / 1000:.2f}"),
    ("p90", lambda row: f"{row['p90_us'] / 1000:.2f}"),
    ("p99", lambda row: f"{row['p99_us'] / 1000:.2f}"),
    ("p99.9", lambda row: f"{row['p999_us'] / 1000:.2f}"),
    ("gateway µs", lambda row: f"{row['gateway_us']:.1f}" if row["gateway_us"] else "–"),
    ("Redis µs", lambda row: f"{row['redis_us']:.1f}" if row["redis_us"] else "–"),
    ("core", lambda row: f"{row['core']:.0%}" if row["core"] else "–"),
    ("errors", lambda row: f"{row['errors']:.0f}"),
    ("RSS MiB", lambda row: f"{row['rss_mib']:.0f}" if row["rss_mib"] else "–"),
)


@contextmanager
def folder() -> Iterator[Path]:
    """A temporary folder that other users may pass through, as nginx' workers must."""
    with tempfile.TemporaryDirectory(prefix="bench-") as name:
        path = Path(name)
        path.chmod(0o711)
        yield path


def collect(options: Namespace, peers: Sequence[Peer], runs: Mapping[Any, Any]) -> Result:
    """Medians and all runs, by scenario and peer, with what they were measured on."""
    scenarios = [
        {
            "title": scenario.title,
            "peers": {
                name: {"median": _medians(found), "runs": found} for name, found in by_peer.items()
            },
        }
        for scenario, by_peer in runs.items()
    ]
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "rounds": options.rounds,
        "redis": str(options.redis or "embedded Valkey"),
        "peers": {peer.name: f"{peer.title} {peer.version}".strip() for peer in peers},
        "scenarios": scenarios,
    }


def _medians(runs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def _found(result: Result, title: str, peer: str) -> Mapping[str, Any] | None:
    for scenario in result["scenarios"]:
        if scenario["title"] == title:
            return scenario["peers"].get(peer)  # type: ignore[no-any-return]
    return None


def median_of(result: Result, title: str, peer: str, name: str) -> float | None:
    found = _found(result, title, peer)
    return float(found["median"][name]) if found else None


def ratio(
    result: Result, name: str, above: tuple[str, str], below: tuple[str, str]
) -> float | None:
    """Median over the rounds of one (scenario, peer) over another, each pair of one round."""
    first, second = _found(result, *above), _found(result, *below)
    if not first or not second:
        return None
    pairs = zip(first["runs"], second["runs"], strict=True)
    return float(statistics.median(a[name] / b[name] for a, b in pairs))


def targets(result: Result) -> list[dict[str, Any]]:
    """Each target with what was measured; those whose parts were not measured are left out."""
    plain, refused = "64 conn, 1 KiB", "64 conn, rejected"
    own = plain, "tallygate"
    latency, scaled, idle = (result.get(name, {}) for name in ("latency", "scaling", "idle"))
    rows = (
        ("CPU of gateway + Redis / Traefik's", "total_us", own, (plain, "traefik"), "<=", 0.5),
        ("requests/s on one core / Traefik's", "rps", own, (plain, "traefik"), ">=", 1.7),
        ("CPU of gateway + Redis / nginx + Lua's", "total_us", own, (plain, "nginx"), "<=", 1.25),
        ("CPU of an admitted / of a rejected one", "total_us", own,
         (refused, "tallygate"), ">=", 2.0),
    )  # fmt: skip
    measured: list[tuple[str, float | None, str, float]] = [
        (title, ratio(result, name, above, below), sign, target)
        for title, name, above, below, sign, target in rows
    ]
    measured += [
        ("added p99 at half of saturation, ms", latency.get("added_p99_ms"), "<=", 2.0),
        ("two workers / one, by CPU per request", scaled.get("by_cpu"), ">=", 1.7),
        ("RSS of an idle connection, KiB", idle.get("kib"), "<=", 15.0),
    ]
    return [
        {
            "target": title,
            "wanted": f"{sign} {target:g}",
            "measured": value,
            "met": value <= target if sign == "<=" else value >= target,
        }
        for title, value, sign, target in measured
        if value is not None
    ]


def write(result: Result, output: Path, extra_chart: Path | None = None) -> None:
    """<date>.json and <date>.svg; a second run of a day replaces the first."""
    output.mkdir(parents=True, exist_ok=True)
    day = result["date"][:10]
    (output / f"{day}.json").write_text(json.dumps(result, indent=1) + "\n")
    picture = chart.draw(result)
    for path in [output / f"{day}.svg", *([extra_chart] if extra_chart else [])]:
        path.write_text(picture)


def print_json(result: Result) -> None:
    print(json.dumps(result, indent=1))


def print_tables(result: Result) -> None:
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH
    console.print(_heading(result))
    table = Table()
    table.add_column("scenario")
    table.add_column("through")
    for title, _ in _COLUMNS:
        table.add_column(title, justify="right")
    for scenario in result["scenarios"]:
        for number, (name, found) in enumerate(scenario["peers"].items()):
            cells = [text(found["median"]) for _, text in _COLUMNS]
            first = scenario["title"] if number == 0 else ""
            table.add_row(first, result["peers"][name], *cells)
        table.add_section()
    console.print(table)
    if found := result.get("latency"):
        _print_latency(console, found)
    if found := result.get("scaling"):
        console.print(
            f"Two workers: {found['by_cpu']:.2f} x one by CPU per request"
            + (f", {found['by_rate']:.2f} x by requests/s" if found["by_rate"] else "")
        )
    if found := result.get("idle"):
        console.print(f"{found['connections']:,} idle connections: {found['kib']:.1f} KiB each")
    if found := result.get("soak"):
        rise = found["mib_per_10_min"]
        console.print(f"Soak: {rise:+.2f} MiB in ten minutes, grows: {found['grows']}")
    if result["targets"]:
        _print_targets(console, result["targets"])


def _heading(result: Result) -> str:
    return (
        f"{result['date'][:10]}, {result['machine']}, medians of {result['rounds']} rounds, client "
        f"{result['client']}, {result['redis']}, {result['python']}; load average before it "
        f"{result['load']:.1f}"
    )


def markdown(result: Result) -> str:
    """The same tables, for a page."""
    titles = [title for title, _ in _COLUMNS]
    lines = [f"{_heading(result)}.", ""]
    lines += _head(["scenario", "through"], titles)
    for scenario in result["scenarios"]:
        for name, found in scenario["peers"].items():
            cells = [text(found["median"]) for _, text in _COLUMNS]
            lines.append(_line([scenario["title"], result["peers"][name], *cells]))
    if found := result.get("latency"):
        names = ("p50", "p90", "p99", "p99.9", "max")
        rate = f"{found['rate']:,.0f}"
        lines += ["", f"Latency in ms at {rate} requests/s, from the intended time of each:", ""]
        lines += _head(["through"], names)
        for peer, row in found["peers"].items():
            lines.append(_line([peer, *(f"{row[name]:.2f}" for name in names)]))
    lines += ["", *_head(["target"], ("wanted", "measured", "met"))]
    for row in result["targets"]:
        met = "yes" if row["met"] else "no"
        lines.append(_line([row["target"], row["wanted"], f"{row['measured']:.2f}", met]))
    return "\n".join(lines) + "\n"


def replace(page: Path, text: str) -> None:
    """Puts the text between the page's marks.

    Raises:
        ValueError: the page has none.
    """
    before, start, rest = page.read_text().partition(_MARKS[0])
    _, end, after = rest.partition(_MARKS[1])
    if not end:
        raise ValueError(f"{page} has no {_MARKS[0]} … {_MARKS[1]}")
    page.write_text(f"{before}{start}\n{text}{end}{after}")


_MARKS = "<!-- results -->", "<!-- /results -->"


def _head(names: Sequence[str], numbers: Sequence[str]) -> list[str]:
    rules = ["---"] * len(names) + ["---:"] * len(numbers)
    return [_line([*names, *numbers]), _line(rules)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _print_latency(console: Console, found: Mapping[str, Any]) -> None:
    table = Table(
        title=f"Latency at {found['rate']:,.0f} requests/s, from the intended time of each, ms"
    )
    names = ("p50", "p90", "p99", "p99.9", "max")
    for title in ("through", *names):
        table.add_column(title, justify="left" if title == "through" else "right")
    for peer, row in found["peers"].items():
        table.add_row(peer, *(f"{row[name]:.2f}" for name in names))
    console.print(table)


def _print_targets(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="Targets")
    for title in ("target", "wanted", "measured", "met"):
        table.add_column(title, justify="left" if title == "target" else "right")
    for row in rows:
        met = "yes" if row["met"] else "no"
        table.add_row(row["target"], row["wanted"], f"{row['measured']:.2f}", met)
    console.print(table)
