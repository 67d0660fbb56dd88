"""`tallygate doctor`: what would be lost in which crash, and how to mend it.

Exit codes: 0 nothing can be lost that the guarantees cover, 1 something would be, or cannot be
known, or a store could not be reached (the output names which), 2 wrong usage or configuration.
"""

from __future__ import annotations

import asyncio
import json
import sys
import textwrap
from pathlib import Path

import click

from cli.context import Context
from cli.stores import find_stores, place_options
from core.doctor import Crash, Diagnosis, Finding, Severity, diagnose
from core.errors import TallygateError

_TITLES = {"redis": "Redis", "postgres": "Postgres", "config": "Configuration"}
_STYLES = {
    Severity.OK: "green",
    Severity.NOTE: "cyan",
    Severity.WARNING: "yellow",
    Severity.CRITICAL: "red",
}
_WIDTH = 100
_INDENT = " " * 11


@click.command()
@place_options
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
def doctor(config_path: Path | None, data_dir: Path | None, as_json: bool) -> None:
    """Say what would be lost in which crash, and how to mend it.

    Reads the settings of Redis and Postgres and the configuration; changes nothing.

    Exit status: 0 nothing can be lost that the guarantees cover, 1 something would be or cannot be
    known, or a store could not be reached, 2 wrong usage or configuration.
    """
    try:
        found = asyncio.run(diagnose(*find_stores(Context(config_path, data_dir), config_path)))
    except TallygateError as error:
        click.echo(f"tallygate: {error}", err=True)
        sys.exit(2)
    if as_json:
        click.echo(json.dumps(_plain(found), indent=2))
    else:
        _show(found)
    sys.exit(0 if found.safe else 1)


def _plain(found: Diagnosis) -> dict[str, object]:
    return {
        "safe": found.safe,
        "severity": str(found.severity),
        "findings": [
            {
                "check": item.check,
                "severity": str(item.severity),
                "text": item.text,
                "loses": {str(crash): text for crash, text in item.loses.items()},
                "fix": item.fix,
            }
            for item in found.findings
        ],
    }


def _show(found: Diagnosis) -> None:
    area = ""
    for item in found.findings:
        if item.area != area:
            area = item.area
            click.secho(f"{_TITLES[area]}", bold=True)
        _show_one(item)
    click.secho("What would be lost", bold=True)
    for name in ("redis", "postgres", "config"):
        for crash in Crash:
            losses = [i for i in found.findings if i.area == name and crash in i.loses]
            for item in losses:
                _wrapped(f"  {_TITLES[name]}, {crash}: {item.loses[crash]}", "    ")
    if not any(item.loses for item in found.findings):
        click.echo("  nothing")
    if found.safe:
        click.secho(
            "Nothing is lost when a process or a machine crashes, or when memory is full.",
            fg="green",
        )
    else:
        bad = [i.check for i in found.findings if i.severity.rank >= Severity.WARNING.rank]
        click.secho(f"To mend: {', '.join(bad)}.", fg=_STYLES[found.severity])


def _show_one(item: Finding) -> None:
    label = click.style(f"  {item.severity:<8}", fg=_STYLES[item.severity])
    lines = textwrap.wrap(item.text, _WIDTH - len(_INDENT)) or [""]
    click.echo(f"{label} {lines[0]}")
    for line in lines[1:]:
        click.echo(f"{_INDENT}{line}")
    for crash, text in item.loses.items():
        _wrapped(f"{_INDENT}{crash}: {text}", _INDENT + "  ")
    if item.fix:
        _wrapped(f"{_INDENT}Fix: {item.fix}", _INDENT + "  ")


def _wrapped(text: str, indent: str) -> None:
    for line in textwrap.wrap(
        text, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    ):
        click.echo(line)
