"""What `tallygate up` prints."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from cli.demo import DemoKey
    from cli.up_settings import Settings

_COLOURS = {"gateway": "cyan", "control": "magenta", "reconciler": "blue", "upstream": "green"}
_SHOWN_FIRST = ("timestamp", "level", "event", "process")


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
    words += [f"{name}={value}" for name, value in fields.items() if name not in _SHOWN_FIRST]
    return " ".join(words)


def show(settings: Settings, data_dir: Path, keys: list[DemoKey]) -> None:
    """The summary on stdout: where everything is, the demo keys, three lines to try."""
    from rich.console import Console  # lazily: 60 ms that an error does not need
    from rich.table import Table

    # Off a terminal nothing may be cut: a key or a URL would lose its end.
    console = Console(file=sys.stdout, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
    gateway, control = http(settings.gateway), http(settings.control)
    where = Table(show_header=False, title="tallygate is up", title_justify="left")
    where.add_row("gateway", gateway, "your API, with limits")
    where.add_row("control", control, "usage and management APIs, console, portal")
    where.add_row("config", str(settings.config), "edit it: changes are taken over while running")
    where.add_row("data", str(data_dir), "kept; remove it to start afresh")
    console.print(where)
    if not keys:
        return
    table = Table("subscription", "plan", "key", title="demo", title_justify="left")
    for key in keys:
        table.add_row(key.subscription, key.plan, key.key, style=None)
    console.print(table)
    url = f"{gateway}/weather/current"
    header = f'-H "X-API-Key: {keys[0].key}"'
    tries = (
        f"curl -i {header} {url}",
        f'seq 30 | xargs -I@ curl -so /dev/null -w "%{{http_code}} " {header} {url}   # until 429',
        f"curl -i {url}   # without a key: 401",
    )
    click.echo("Try:")
    for line in tries:
        click.echo(f"  {line}")
