"""What `tallygate up` prints, and the demo keys it remembers to print them again."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli.embedded.datadir import write_private

if TYPE_CHECKING:
    from cli.up_settings import Settings

_COLOURS = {"gateway": "cyan", "control": "magenta", "reconciler": "blue", "upstream": "green"}
_SHOWN_FIRST = ("timestamp", "level", "event", "process")


@dataclass(frozen=True)
class DemoKey:
    """A demo subscription and its API key in clear."""

    subscription: str
    plan: str
    key: str


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


async def demo_keys(path: Path, database: str, url: str, pepper: str) -> list[DemoKey]:
    """The demo keys, seeded on first use of this database.

    The database has only their digests, so they are kept in `path`, 0600, with the name of the
    database they belong to.
    """
    kept = _kept(path, database)
    if kept is not None:
        return kept
    from cli.demo import ensure_demo  # lazily: drags the driver in

    keys = [
        DemoKey(demo.subscription, demo.plan, demo.key) for demo in await ensure_demo(url, pepper)
    ]
    content = {"database": database, "keys": [asdict(key) for key in keys]}
    write_private(path, json.dumps(content, indent=2) + "\n")
    return keys


def _kept(path: Path, database: str) -> list[DemoKey] | None:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    if content["database"] != database:
        return None
    return [DemoKey(**entry) for entry in content["keys"]]


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
