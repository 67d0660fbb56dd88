"""`tallygate audit`: do hours add up to periods, and does Redis agree with the ledger?

Exit codes: 0 no drift, 1 drift (found, or left after --repair), 2 wrong usage or configuration,
3 a store could not be reached.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import click

from cli.context import Context, parse_time
from cli.stores import find_stores, place_options
from core import clock
from core.audit import AuditReport, Drift, MeterUse, audit
from core.config import Snapshot
from core.config.units import UnitError, parse_duration
from core.db import connect_pool
from core.doctor import Severity
from core.doctor.postgres import schema
from core.errors import StoreUnavailableError, TallygateError
from core.meters import MeterRegistry
from core.redis.store import Store

# A batch of subjects is one statement; one with years of hours takes its time.
_REDIS_TIMEOUT_S, _POSTGRES_TIMEOUT_S = 5.0, 120.0


@click.command(name="audit")
@click.option("--subscription", help="Only this one  [default: all]")
@click.option(
    "--since",
    help="Only periods that end after this: 2026-01-31, 2026-01-31T12:00:00Z, or 7d for the last "
    "seven days  [default: all]",
)
@click.option("--repair", is_flag=True, help="Mend what changes nothing that is billed.")
@click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
@click.option(
    "--show",
    type=click.IntRange(0),
    default=100,
    show_default=True,
    help="Print so many differences; all are counted.",
)
@place_options
def command(
    subscription: str | None,
    since: str | None,
    repair: bool,
    as_json: bool,
    show: int,
    config_path: Path | None,
    data_dir: Path | None,
) -> None:
    """Recompute totals and compare Redis with the ledger.

    Periods are compared with their hours, hours with their usage events, live states with the
    ledger. It runs next to everything else and may take its time.

    Exit status: 0 no drift, 1 drift (found, or left after --repair), 2 wrong usage or
    configuration, 3 a store could not be reached.
    """
    try:
        since_ms = _since(since) if since else 0
        stores = find_stores(Context(config_path, data_dir), config_path)
        report = asyncio.run(_run(*stores, subscription, since_ms, repair, show))
    except StoreUnavailableError as error:
        click.echo(f"tallygate: {error}", err=True)
        sys.exit(3)
    except TallygateError as error:
        click.echo(f"tallygate: {error}", err=True)
        sys.exit(2)
    finally:
        _progress("", 0)
    if as_json:
        click.echo(json.dumps(_plain(report), indent=2))
    else:
        _show(report)
    sys.exit(0 if report.clean else 1)


def _since(text: str) -> int:
    try:
        return clock.now_ms() - parse_duration(text)
    except UnitError:
        return parse_time("--since", text)


async def _run(
    snapshot: Snapshot,
    redis_url: str,
    postgres_url: str,
    subscription: str | None,
    since_ms: int,
    repair: bool,
    show: int,
) -> AuditReport:
    store = Store.connect(redis_url, _REDIS_TIMEOUT_S)
    try:
        database = await connect_pool(postgres_url, size=1, timeout_s=_POSTGRES_TIMEOUT_S)
        try:
            found = await schema(database)
            if found.severity is not Severity.OK:
                raise TallygateError(f"{found.text}: {found.fix}")
            registry = MeterRegistry(snapshot.meters, snapshot.source)
            await registry.refresh(database)
            registry.check(snapshot.meters)
            report = await audit(
                database,
                store,
                registry,
                subject=subscription,
                since_ms=since_ms,
                use=MeterUse.of(snapshot),
                repair=repair,
                keep=show,
                on_progress=_progress,
            )
        finally:
            await database.close()
    finally:
        await store.close()
    if subscription is not None and not (report.subjects or report.states or report.found):
        raise TallygateError(
            f"--subscription: neither Redis nor the ledger knows {subscription!r}; see "
            "`tallygate subscriptions list`"
        )
    return report


def _progress(where: str, done: int) -> None:
    """One line that is overwritten, on a terminal alone; '' wipes it."""
    if sys.stderr.isatty():
        text = f"{where}: {done:,} subjects" if where else ""
        click.echo(f"\r\x1b[K{text}", nl=False, err=True)


def _plain(report: AuditReport) -> dict[str, object]:
    return {
        "clean": report.clean,
        "started": clock.isoformat(report.started_ms),
        "ended": clock.isoformat(report.ended_ms),
        "subjects": report.subjects,
        "states": report.states,
        "keyless": report.keyless,
        "pending": report.pending,
        "found": {str(cause): count for cause, count in report.found.items()},
        "repaired": {str(cause): count for cause, count in report.repaired.items()},
        "left": {str(cause): count for cause, count in report.left.items()},
        "differences": [_plain_drift(drift) for drift in report.drifts],
    }


def _plain_drift(drift: Drift) -> dict[str, object]:
    def time(ms: int | None) -> str | None:
        return None if ms is None else clock.isoformat(ms)

    return {
        "cause": str(drift.cause),
        "note": drift.note,
        "subject": drift.subject,
        "meter": drift.meter,
        "period_start": time(drift.period_start_ms),
        "hour_start": time(drift.hour_start_ms),
        "expected": None if drift.expected is None else format(drift.expected, "f"),
        "found": None if drift.found is None else format(drift.found, "f"),
        "text": drift.text,
        "repaired": drift.repaired,
    }


def _show(report: AuditReport) -> None:
    for drift in report.drifts:
        label = "note" if drift.note else "repaired" if drift.repaired else "drift"
        colour = {"note": "cyan", "repaired": "green", "drift": "red"}[label]
        done = f" Repaired: {drift.repaired}." if drift.repaired else ""
        click.echo(f"{click.style(label, fg=colour)} {drift.cause}  {drift.text}.{done}")
    more = sum(report.found.values()) - len(report.drifts)
    if more > 0:
        click.echo(f"… and {more:,} more; see them with --show {len(report.drifts) + more}")
    click.echo(
        f"Ledger: {report.subjects:,} subjects. Redis: {report.states:,} states, "
        f"{report.pending:,} of them with changes that the next flush stores."
    )
    for cause, count in sorted(report.found.items()):
        repaired = report.repaired.get(cause, 0)
        click.echo(f"  {cause}: {count:,}" + (f", {repaired:,} repaired" if repaired else ""))
    click.echo("No drift." if report.clean else f"Drift: {sum(report.left.values()):,} left.")
