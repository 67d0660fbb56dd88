"""`python -m reconciler`: the background process.

SIGTERM and SIGINT flush once more and stop; SIGHUP reads the configuration again.
"""

from __future__ import annotations

import argparse
import asyncio
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import uvloop

from core.config import Snapshot, load
from core.errors import TallygateError
from core.telemetry import logs
from reconciler.worker import Reconciler


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until a signal; the exit status: 0 after a clean stop, 1 with a message otherwise."""
    parser = argparse.ArgumentParser(
        prog="tallygate reconciler", description="Copy counters into the ledger."
    )
    parser.add_argument("--config", type=Path, default=Path("config.yaml"), metavar="FILE")
    arguments = parser.parse_args(argv)
    try:
        snapshot = load(arguments.config)
        settings = snapshot.settings
        logs.configure(settings.log.level, settings.log.format, "reconciler")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_run(arguments.config, snapshot))
    except TallygateError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        logs.drain()
    return 0


async def _run(path: Path, snapshot: Snapshot) -> None:
    reconciler = Reconciler(path, snapshot)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, reconciler.stop)
    loop.add_signal_handler(signal.SIGHUP, reconciler.config.reload)
    await reconciler.run()


if __name__ == "__main__":
    sys.exit(main())
