"""`tallygate creators|customers|subscriptions|keys`: the directory, by hand or from scripts.

Every command takes `--json` for scripts. Exit codes: 0 done, 1 failed (message on standard error),
2 wrong usage. `GROUPS` is what `cli.main` adds to its root; `python -m cli.manage` runs them alone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import json
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.table import Table

from cli.context import DEFAULT_DATA_DIR, Context, parse_time
from core import clock, directory
from core.db import Database, connect_pool
from core.directory import UNCHANGED
from core.errors import TallygateError
from core.policy import Status

_TIMEOUT_S = 10.0

T = TypeVar("T")


def _command(
    group: click.Group, name: str
) -> Callable[[Callable[..., None]], Callable[..., object]]:
    """Add a command with the options all share; expected failures become exit code 1."""

    def decorate(function: Callable[..., None]) -> Callable[..., object]:
        @click.option(
            "--config",
            "config_path",
            type=click.Path(path_type=Path, exists=True, dir_okay=False),
            help="Configuration; ./config.yaml when there is one.",
        )
        @click.option(
            "--data-dir",
            type=click.Path(path_type=Path, file_okay=False),
            help=f"Data directory of `tallygate up`  [default: {DEFAULT_DATA_DIR}]",
        )
        @click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")
        @functools.wraps(function)
        def run(
            *, config_path: Path | None, data_dir: Path | None, as_json: bool, **options: Any
        ) -> None:
            try:
                function(Context(config_path, data_dir), _Output(as_json), **options)
            except TallygateError as error:
                click.echo(f"tallygate: {error}", err=True)
                sys.exit(1)

        return group.command(name)(run)

    return decorate


class _Output:
    """Prints records (dataclasses, times in epoch ms) as JSON or as a table for people."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json

    def one(self, record: Any, **extra: str) -> None:
        """One record; `extra` fields come first."""
        values = extra | _plain(record)
        if self.as_json:
            click.echo(json.dumps(values))
            return
        table = Table(show_header=False, box=None)
        for field, value in values.items():
            table.add_row(field, _cell(value))
        _print(table)

    def many(self, records: Sequence[Any], columns: Sequence[str]) -> None:
        rows = [_plain(record) for record in records]
        if self.as_json:
            click.echo(json.dumps(rows))
            return
        if not rows:
            click.echo("None yet.")
            return
        table = Table(box=None, header_style="bold")
        for column in columns:
            table.add_column(column, no_wrap=column in ("id", "prefix"))
        for row in rows:
            table.add_row(*(_cell(row[column]) for column in columns))
        _print(table)

    def done(self, message: str, **fields: object) -> None:
        click.echo(json.dumps(fields) if self.as_json else message)


def _print(table: Table) -> None:
    # Identifiers are there to be copied: on a pipe nothing is cut to 80 columns.
    Console(soft_wrap=True, width=None if sys.stdout.isatty() else 250).print(table)


def _plain(record: Any) -> dict[str, Any]:
    """Field names without `_ms`, times as ISO 8601."""
    plain: dict[str, Any] = {}
    for name, value in dataclasses.asdict(record).items():
        if name.endswith("_ms"):
            plain[name.removesuffix("_ms")] = None if value is None else clock.isoformat(value)
        else:
            plain[name] = value
    return plain


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value).replace("[", "\\[")  # rich reads brackets as markup


def _call(context: Context, function: Callable[[Database], Awaitable[T]]) -> T:
    """Run `function` against the database of `context`."""

    async def run() -> T:
        database = await connect_pool(context.postgres_url(), size=1, timeout_s=_TIMEOUT_S)
        try:
            return await function(database)
        finally:
            await database.close()

    return asyncio.run(run())


_after = click.option("--after", default="", help="Only identifiers after this one (next page).")
_limit = click.option("--limit", default=100, show_default=True, help="Rows at most, up to 1000.")
_any_plan = click.option("--any-plan", is_flag=True, help="Accept a plan the config lacks.")
_status = click.Choice([status.value for status in Status])


@click.group()
def creators() -> None:
    """Creators: who sells an API."""


@_command(creators, "create")
@click.option("--name", required=True)
@click.option("--email", required=True)
def _create_creator(context: Context, output: _Output, name: str, email: str) -> None:
    """Add a creator."""
    output.one(_call(context, lambda db: directory.create_creator(db, name=name, email=email)))


@_command(creators, "list")
@_after
@_limit
def _list_creators(context: Context, output: _Output, after: str, limit: int) -> None:
    """Show creators."""
    found = _call(context, lambda db: directory.list_creators(db, after=after, limit=limit))
    output.many(found, ("id", "name", "email", "created_at"))


@click.group()
def customers() -> None:
    """Customers: who buys from a creator."""


@_command(customers, "create")
@click.option("--creator", required=True, help="Identifier of the creator.")
@click.option("--name", required=True)
@click.option("--email", required=True)
def _create_customer(
    context: Context, output: _Output, creator: str, name: str, email: str
) -> None:
    """Add a customer of a creator."""
    output.one(
        _call(
            context,
            lambda db: directory.create_customer(db, creator_id=creator, name=name, email=email),
        )
    )


@_command(customers, "list")
@click.option("--creator", help="Only those of this creator.")
@_after
@_limit
def _list_customers(
    context: Context, output: _Output, creator: str | None, after: str, limit: int
) -> None:
    """Show customers."""
    found = _call(
        context,
        lambda db: directory.list_customers(db, creator_id=creator, after=after, limit=limit),
    )
    output.many(found, ("id", "creator_id", "name", "email", "created_at"))


@click.group()
def subscriptions() -> None:
    """Subscriptions: which customer is on which plan."""


@_command(subscriptions, "create")
@click.option("--customer", required=True, help="Identifier of the customer.")
@click.option("--plan", required=True)
@click.option("--status", type=_status, default=str(Status.ACTIVE), show_default=True)
@click.option("--anchor", help="Start of the first billing period, ISO 8601  [default: now]")
@_any_plan
def _create_subscription(
    context: Context,
    output: _Output,
    customer: str,
    plan: str,
    status: str,
    anchor: str | None,
    any_plan: bool,
) -> None:
    """Put a customer on a plan."""
    anchor_ms = None if anchor is None else parse_time("anchor", anchor)
    if not any_plan:
        context.check_plan(plan)
    output.one(
        _call(
            context,
            lambda db: directory.create_subscription(
                db, customer_id=customer, plan=plan, status=status, anchor_ms=anchor_ms
            ),
        )
    )


@_command(subscriptions, "list")
@click.option("--creator", help="Only those of this creator.")
@click.option("--customer", help="Only those of this customer.")
@_after
@_limit
def _list_subscriptions(
    context: Context,
    output: _Output,
    creator: str | None,
    customer: str | None,
    after: str,
    limit: int,
) -> None:
    """Show subscriptions."""
    found = _call(
        context,
        lambda db: directory.list_subscriptions(
            db, creator_id=creator, customer_id=customer, after=after, limit=limit
        ),
    )
    output.many(found, ("id", "customer_id", "plan", "status", "anchor"))


@_command(subscriptions, "show")
@click.argument("subscription")
def _show_subscription(context: Context, output: _Output, subscription: str) -> None:
    """Show one subscription."""
    output.one(_call(context, lambda db: directory.get_subscription(db, subscription)))


@_command(subscriptions, "change-plan")
@click.argument("subscription")
@click.argument("plan")
@_any_plan
def _change_plan(
    context: Context, output: _Output, subscription: str, plan: str, any_plan: bool
) -> None:
    """Move a subscription to another plan, keeping what it consumed."""
    if not any_plan:
        context.check_plan(plan)
    output.one(_call(context, lambda db: directory.set_plan(db, subscription, plan)))


@_command(subscriptions, "set-status")
@click.argument("subscription")
@click.argument("status", type=_status)
def _set_status(context: Context, output: _Output, subscription: str, status: str) -> None:
    """Set a subscription's status."""
    output.one(_call(context, lambda db: directory.set_status(db, subscription, status)))


@_command(subscriptions, "set-anchor")
@click.argument("subscription")
@click.argument("anchor")
def _set_anchor(context: Context, output: _Output, subscription: str, anchor: str) -> None:
    """Count billing periods from another time (ISO 8601)."""
    anchor_ms = parse_time("anchor", anchor)
    output.one(_call(context, lambda db: directory.set_anchor(db, subscription, anchor_ms)))


@click.group()
def keys() -> None:
    """API keys of a subscription."""


@_command(keys, "create")
@click.option("--subscription", required=True, help="Identifier of the subscription.")
@click.option("--name", default="default", show_default=True)
@click.option("--expires", help="When it ends, ISO 8601  [default: never]")
def _create_key(
    context: Context, output: _Output, subscription: str, name: str, expires: str | None
) -> None:
    """Make a key; the secret is shown this once."""
    expires_at_ms = None if expires is None else parse_time("expires", expires)
    hasher = context.hasher()
    new = _call(
        context,
        lambda db: directory.create_key(
            db, hasher, subscription_id=subscription, name=name, expires_at_ms=expires_at_ms
        ),
    )
    output.one(new.key, secret=new.secret)
    if not output.as_json:
        click.echo("Copy the secret now: it cannot be shown again.", err=True)


@_command(keys, "list")
@click.option("--subscription", help="Only those of this subscription.")
@_after
@_limit
def _list_keys(
    context: Context, output: _Output, subscription: str | None, after: str, limit: int
) -> None:
    """Show keys, without their secrets."""
    found = _call(
        context,
        lambda db: directory.list_keys(db, subscription_id=subscription, after=after, limit=limit),
    )
    columns = ("id", "subscription_id", "name", "prefix", "active", "expires_at", "last_used_at")
    output.many(found, columns)


@_command(keys, "update")
@click.argument("key")
@click.option("--name")
@click.option("--active/--inactive", default=None, help="Let it work, or not for now.")
@click.option("--expires", help="When it ends, ISO 8601, or `never`.")
def _update_key(
    context: Context,
    output: _Output,
    key: str,
    name: str | None,
    active: bool | None,
    expires: str | None,
) -> None:
    """Change a key's name, expiry, or whether it works."""
    if name is None and active is None and expires is None:
        raise click.UsageError("nothing to change: give --name, --active, --inactive or --expires")
    expiry = (
        UNCHANGED
        if expires is None
        else None
        if expires == "never"
        else parse_time("expires", expires)
    )
    output.one(
        _call(
            context,
            lambda db: directory.update_key(
                db, key, name=name, active=active, expires_at_ms=expiry
            ),
        )
    )


@_command(keys, "revoke")
@click.argument("key")
def _revoke_key(context: Context, output: _Output, key: str) -> None:
    """End a key for good."""
    _call(context, lambda db: directory.revoke_key(db, key))
    output.done(f"Revoked {key}.", id=key, revoked=True)


GROUPS: tuple[click.Group, ...] = (creators, customers, subscriptions, keys)

if __name__ == "__main__":
    click.Group("manage", commands={group.name or "": group for group in GROUPS})()
