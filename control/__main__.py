"""`python -m control`: the control process, one worker on one event loop.

SIGTERM and SIGINT stop it cleanly: no new connections, answers under way are finished, stores are
closed. SIGHUP reads the configuration again; a file that is refused changes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop
from granian.constants import Interfaces
from granian.log import LogLevels
from granian.server.embed import Server

from control.app import Control, create_app, open_control
from core.config import Address, Snapshot, load
from core.config.fields import parse_address
from core.errors import TallygateError
from core.leave import leave
from core.telemetry import logs

_log = logs.get_logger()

# How often what no request triggers (dropped log lines) reaches the metrics.
_HOUSEKEEPING_S = 5.0
# Longest wait for answers under way once a stop was asked for.
_STOP_S = 10


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until a signal; the exit status: 0 after a clean stop, 1 with a message otherwise."""
    arguments = _parse(argv)
    try:
        snapshot = load(arguments.config)
        listen = parse_address(arguments.listen) if arguments.listen else None
    except (TallygateError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    settings = snapshot.settings
    logs.configure(settings.log.level, settings.log.format, "control")
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(arguments.config, snapshot, listen or settings.control.listen))
    except (TallygateError, OSError) as error:
        _log.critical("exited", reason=str(error))
        return 1
    finally:
        logs.drain()
    return 0


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tallygate control", description="Run the control plane (APIs, console, portal)."
    )
    parser.add_argument("--config", type=Path, default=Path("config.yaml"), metavar="FILE")
    parser.add_argument("--listen", metavar="HOST:PORT", help="instead of control.listen")
    return parser.parse_args(argv)


async def _serve(path: Path, snapshot: Snapshot, listen: Address) -> None:
    control = await open_control(path, snapshot)
    side_tasks = [
        asyncio.create_task(control.config.run(), name="config-watcher"),
        asyncio.create_task(_housekeeping(control), name="housekeeping"),
    ]
    try:
        await _serve_http(control, listen)
    finally:
        for task in side_tasks:
            task.cancel()
        await asyncio.gather(*side_tasks, return_exceptions=True)
        await control.close()
        _log.info("stopped")


async def _serve_http(control: Control, listen: Address) -> None:
    server = Server(
        create_app(control),
        address=listen.host,
        port=listen.port,
        interface=Interfaces.ASGINL,  # what the application holds is opened before it is built
        # Its own start and stop lines, and a warning that embedding is new, tell operators nothing.
        log_level=LogLevels.error,
        log_dictconfig=logs.GRANIAN_LOGGING,
        websockets=False,
    )
    server.workers_kill_timeout = _STOP_S
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, server.stop)
    loop.add_signal_handler(signal.SIGHUP, control.config.reload)
    listening = False

    def on_startup() -> None:  # called once the socket is bound
        nonlocal listening
        listening = True
        _log.info("listening", address=str(listen))

    server.on_startup(on_startup)
    try:
        await server.serve()
    except RuntimeError as error:
        if listening:
            raise
        reason = str(error).partition("\n")[0]  # Rust adds a stack trace
        raise TallygateError(f"control.listen: cannot listen on {listen}: {reason}") from None


async def _housekeeping(control: Control) -> None:
    while True:
        dropped = logs.take_dropped()
        if dropped:
            control.metrics.log_lines_dropped.inc(dropped)
        await asyncio.sleep(_HOUSEKEEPING_S)


if __name__ == "__main__":
    leave(main())
