"""The `tallygate` command. Each subcommand's module is imported when it is used, not before."""

from __future__ import annotations

import asyncio
import importlib
import os
import sys
from pathlib import Path
from typing import Any

import click

from core.errors import TallygateError

# name -> (module, attribute, line of help). Help is here so that `--help` imports nothing.
_COMMANDS = {
    "up": ("cli.up", "up", "Run everything in this terminal, stores included."),
    "check": ("cli.check", "check", "Check a config file; print all of its problems."),
    "schema": ("cli.check", "schema", "Print the JSON schema of the config file."),
    "creators": ("cli.manage", "creators", "Manage API creators."),
    "customers": ("cli.manage", "customers", "Manage the customers of a creator."),
    "subscriptions": ("cli.manage", "subscriptions", "Manage subscriptions."),
    "keys": ("cli.manage", "keys", "Manage API keys."),
    "usage": ("cli.usage", "usage", "Show the usage of a subscription."),
    "doctor": ("cli.doctor", "doctor", "Say what would be lost in which crash, and the fix."),
    "audit": ("cli.audit", "command", "Recompute totals; compare Redis with the ledger."),
    "migrate": ("cli.main", "migrate", "Bring the database to this version's schema."),
    "gateway": ("cli.main", "gateway", "Run the gateway (data plane)."),
    "control": ("cli.main", "control", "Run the control plane (APIs, console, portal)."),
    "reconciler": ("cli.main", "reconciler", "Run the reconciler (ledger, billing, notices)."),
}


class _Refusal(click.ClickException):
    """An expected failure: its message alone, exit status 1."""

    def show(self, file: Any = None) -> None:
        click.echo(f"tallygate: {self.format_message()}", file=file or sys.stderr)


class _Group(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        entry = _COMMANDS.get(cmd_name)
        if entry is None:
            return None
        command = getattr(importlib.import_module(entry[0]), entry[1])
        assert isinstance(command, click.Command)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, entry[2]) for name, entry in _COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except TallygateError as error:
            raise _Refusal(str(error)) from error


def _print_version(ctx: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from importlib.metadata import PackageNotFoundError, version  # lazily: slow to import

    try:
        found = version("tallygate")
    except PackageNotFoundError:
        found = "not installed (running from source)"
    click.echo(f"tallygate {found}")
    ctx.exit()


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Print the version and exit.",
)
def main() -> None:
    """Tallygate: a quota and rate-limit gateway with a billing-grade ledger."""


@click.command()
@click.option(
    "--config",
    "config_path",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    help="Configuration; ./config.yaml when there is one.",
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    help="Data directory of a running `tallygate up`  [default: .tallygate]",
)
def migrate(config_path: Path | None, data_dir: Path | None) -> None:
    """Bring the database to this version's schema.

    The database is the configuration's, or that of TALLYGATE_POSTGRES_URL. Safe to repeat, and to
    run from several places at once.
    """
    from cli.context import Context
    from core.db.migrate import migrate as run  # lazily: drags the driver in

    applied = asyncio.run(run(Context(config_path, data_dir).postgres_url()))
    for name in applied:
        click.echo(f"applied {name}")
    if not applied:
        click.echo("nothing to apply")


def _process(name: str) -> click.Command:
    """`tallygate NAME args…` is `python -m NAME args…`; the process parses its own arguments."""

    def run(args: tuple[str, ...]) -> None:
        from cli.supervise import find_own_packages

        find_own_packages(os.environ)  # the gateway starts its workers as `python -m gateway`
        status = importlib.import_module(f"{name}.__main__").main(list(args))
        if name == "control":  # it serves HTTP in this very process
            from core.leave import leave

            leave(status or 0)
        sys.exit(status or 0)

    return click.Command(
        name,
        callback=run,
        params=[click.Argument(["args"], nargs=-1, type=click.UNPROCESSED)],
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
        add_help_option=False,
        help=_COMMANDS[name][2],
    )


gateway = _process("gateway")
control = _process("control")
reconciler = _process("reconciler")

if __name__ == "__main__":
    main()
