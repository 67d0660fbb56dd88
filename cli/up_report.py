"""What `tallygate up` prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cli.demo import DemoKey
    from cli.up_settings import Settings

_COLOURS = {"gateway": "cyan", "control": "magenta", "reconciler": "blue", "upstream": "green"}
_SHOWN_FIRST = ("timestamp", "level", "event", "process")
_BURST = 40  # requests of the line that provokes a 429: twice the burst of the plan `free`


def http(address: tuple[str, int]) -> str:
    """The URL of an address; a wildcard host is shown as one that a client can use."""
    host, port = address
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104
    return f"http://[{host}]:{port}" if ":" in host and "[" not in host else f"http://{host}:{port}"


def say(name: str, line: str) -> None:
    """One line of a process on stderr, its name in front; stdout is kept for the summary."""
    label = click.style(f"{name:<10} |", fg=_COLOURS.get(name, "yellow"))
    click.echo(f"{label} {_readable(line)}", err=True)


def _readable(line: str) -> str:
    """A JSON log line as `12:50:00.123 level event key=value …`; any other line as it is."""
    if not line.startswith("{"):
        return line
    try:
        fields: dict[str, Any] = json.loads(line)
        clock = str(fields["timestamp"]).partition("T")[2].rstrip("Z")
        words = [clock, str(fields["level"]), str(fields["event"])]
    except (ValueError, KeyError):
        return line
    if fields.get("decision_id"):
        fields.pop("request_id", None)  # one of the two is enough to find the request again
    words += [
        f"{name}={value}"
        for name, value in fields.items()
        if name not in _SHOWN_FIRST and value not in ("", None)
    ]
    return " ".join(words)


def show(settings: Settings, data_dir: Path, keys: Sequence[DemoKey]) -> None:
    """The summary on stdout: where everything is, the demo keys, lines to try.

    Plain lines, so that nothing is cut or broken: they are there to be copied.
    """
    lines = [click.style("tallygate is up", bold=True), ""]
    where = [
        ("gateway", http(settings.gateway), "your API, with limits"),
        ("control", http(settings.control), "health and metrics"),
        ("config", _short(settings.config), "edit it: changes apply while this runs"),
        ("data", _short(data_dir), "kept; remove it to start afresh"),
    ]
    lines += _columns(where)
    if keys:
        demo = [(key.subscription, key.plan, key.key) for key in keys]
        lines += ["", *_columns([("subscription", "plan", "key"), *demo])]
    if keys and settings.try_path:
        lines += ["", "Try in another terminal:", *_tries(settings, keys)]
    lines += ["", "Ctrl-C stops everything.", ""]
    click.echo("\n".join(lines))


def _tries(settings: Settings, keys: Sequence[DemoKey]) -> list[str]:
    first = next((key for key in keys if key.plan == "free"), keys[0])
    url = f"{http(settings.gateway)}{settings.try_path}"
    header = f"-H '{settings.key_header}{first.key}'"
    burst = (
        f"{_BURST} requests at once: 429 when the plan's burst is used up",
        f"curl -so /dev/null -w '%{{http_code}} ' {header} '{url}?n=[1-{_BURST}]'; echo",
    )
    steps = [
        ("an answer of the API behind the gateway", f"curl {header} {url}"),
        (
            "which limits there are, what is left, when they reset",
            f"curl -sD - -o /dev/null {header} {url}",
        ),
        *([burst] if first.plan == "free" else []),
        ("what was counted", f"{_ourselves()} usage --subscription {first.subscription}"),
    ]
    return [
        line
        for what, command in steps
        for line in (click.style(f"  # {what}", dim=True), f"  {command}")
    ]


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  "
        + "   ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _short(path: Path) -> str:
    """Relative to where we are, when it is below."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _ourselves() -> str:
    """How this command was called, to be called again: `.venv/bin/tallygate` under `make run`."""
    called = Path(sys.argv[0])
    return _short(called) if called.name == "tallygate" else "tallygate"
