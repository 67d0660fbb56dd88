"""`tallygate usage`: what a subscription has used, live counters over the ledger.

Exit codes: 0 shown, 1 failed (message on standard error), 2 wrong usage. That Redis is down is no
failure: the ledger answers, and the output says so.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.table import Table

from cli.context import Context
from cli.stores import find_stores, place_options
from core import clock
from core.config import Snapshot
from core.config.units import format_quantity
from core.db import connect_pool
from core.errors import TallygateError
from core.period import HOUR_MS
from core.redis.store import Store
from core.usage import LimitUsage, Usage, read_usage

# People wait for an answer, but a store that hangs should be named soon.
_REDIS_TIMEOUT_S, _POSTGRES_TIMEOUT_S = 2.0, 10.0
# Without a terminal there is no width to ask for; wide enough that no row is folded.
_PLAIN_WIDTH = 200


@click.command()
@click.option("--subscription", required=True, help="Identifier of the subscription.")
@click.option(
    "--hours",
    type=click.IntRange(0, 24 * 366),
    default=24,
    show_default=True,
    help="Show this many hours up to now.",
)
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
@place_options
def usage(
    subscription: str, hours: int, as_json: bool, config_path: Path | None, data_dir: Path | None
) -> None:
    """Show the usage of a subscription."""
    try:
        found = _read(Context(config_path, data_dir), config_path, subscription, hours)
    except TallygateError as error:
        click.echo(f"tallygate: {error}", err=True)
        sys.exit(1)
    if as_json:
        click.echo(json.dumps(_plain(found), indent=2))
    else:
        _show(found)


def _read(context: Context, config_path: Path | None, subscription: str, hours: int) -> Usage:
    snapshot, redis_url, postgres_url = find_stores(context, config_path)
    return asyncio.run(_ask(redis_url, postgres_url, snapshot, subscription, hours))


async def _ask(
    redis_url: str, postgres_url: str, snapshot: Snapshot, subscription: str, hours: int
) -> Usage:
    store = Store.connect(redis_url, _REDIS_TIMEOUT_S)
    try:
        database = await connect_pool(postgres_url, size=1, timeout_s=_POSTGRES_TIMEOUT_S)
        try:
            now_ms = clock.now_ms()
            this_hour = now_ms - now_ms % HOUR_MS
            return await read_usage(
                database,
                store,
                snapshot,
                subscription,
                hours_from=this_hour - (hours - 1) * HOUR_MS,
                hours_to=this_hour + HOUR_MS,
            )
        finally:
            await database.close()
    finally:
        await store.close()


def _plain(value: Any) -> Any:
    """JSON values: field names without `_ms`, times as RFC 3339, quantities as decimal text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {}
        for item in dataclasses.fields(value):
            content = getattr(value, item.name)
            if item.name.endswith("_ms"):
                plain[item.name.removesuffix("_ms")] = _time(content)
            else:
                plain[item.name] = _plain(content)
        return plain
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return format(value, "f") if isinstance(value, Decimal) else value


def _time(ms: int | None) -> str | None:
    return None if ms is None else clock.isoformat(ms)


def _show(found: Usage) -> None:
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console = Console(highlight=False, markup=False, width=_PLAIN_WIDTH)
    console.print(
        f"{found.subscription}  plan {found.plan}  {found.status}  "
        f"as of {clock.isoformat(found.as_of_ms)}",
    )
    if found.note:
        console.print(f"Note: {found.note}")
    _table(
        console,
        "Billing period",
        ("meter", "total", "overage", "unit", "from", "to", "source"),
        [
            (
                row.meter,
                format_quantity(row.total),
                format_quantity(row.overage),
                row.unit,
                clock.isoformat(row.start_ms),
                clock.isoformat(row.end_ms),
                _source(row.live),
            )
            for row in found.meters
        ],
    )
    _table(
        console,
        "Limits",
        ("limit", "algorithm", "meter", "used", "limit", "left", "%", "status", "action", "resets"),
        [_limit_row(row) for row in found.limits],
    )
    _table(
        console,
        "Hours",
        ("hour", "meter", "total", "overage", "source"),
        [
            (
                clock.isoformat(row.hour_start_ms) + (" (day)" if row.day else ""),
                row.meter,
                format_quantity(row.total),
                format_quantity(row.overage),
                _source(row.live),
            )
            for row in found.hours
        ],
    )
    _table(
        console,
        "Limit events of the period",
        ("time", "limit", "event", "%", "used", "of"),
        [
            (
                clock.isoformat(row.occurred_at_ms),
                row.limit,
                row.kind,
                str(row.threshold) if row.threshold else "",
                format_quantity(row.used),
                format_quantity(row.maximum),
            )
            for row in found.events
        ],
    )
    console.print(_lag_text(found))


def _table(
    console: Console, title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    if not rows:
        console.print(f"{title}: none")
        return
    table = Table(title=title, title_justify="left", box=None, header_style="bold")
    for column in columns:
        right = column in ("total", "overage", "used", "limit", "left", "%", "of")
        table.add_column(column, justify="right" if right and column != columns[0] else "left")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def _limit_row(row: LimitUsage) -> tuple[str, ...]:
    used, left = format_quantity(row.used), format_quantity(row.remaining)
    share, status = row.percentage, str(row.status)
    if not row.known:
        used, left, share, status = "?", "?", "?", "unknown"
    return (
        row.name,
        row.algorithm,
        row.meter or "",
        used,
        format_quantity(row.limit),
        left,
        share,
        status,
        str(row.action) if row.enforce else f"{row.action} (shadow)",
        _time(row.reset_ms) or "",
    )


def _lag_text(found: Usage) -> str:
    lag = found.lag
    ledger = "nothing" if lag.ledger_version is None else f"version {lag.ledger_version}"
    if lag.unflushed is None:
        return f"Ledger: {ledger}; how far it is behind is unknown, as Redis does not answer."
    if lag.live_version is None:
        return f"Ledger: {ledger}; no live state: the next request is counted from the ledger."
    if lag.behind:
        return f"Ledger: {ledger}; Redis has only version {lag.live_version}: it lost writes."
    if lag.unflushed:
        since = f" since {clock.isoformat(lag.since_ms)}" if lag.since_ms is not None else ""
        return f"Ledger: {ledger}; Redis has version {lag.live_version}, unflushed{since}."
    return f"Ledger: {ledger}; up to date with Redis."


def _source(live: bool) -> str:
    return "live" if live else "ledger"
