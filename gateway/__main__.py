"""`python -m gateway`: the data plane, a supervisor and its workers.

SIGTERM and SIGINT drain and stop all workers; SIGHUP makes each read the configuration again (a
file that is refused changes nothing); SIGUSR2 replaces them one after another, without a lost
request. A worker that dies is replaced; should the supervisor be killed, the workers are told by
the kernel and drain by themselves.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from core.certificates import build
from core.config import Address, load
from core.config.fields import parse_address
from core.errors import TallygateError
from core.leave import leave
from core.telemetry import logs
from gateway import worker
from gateway.lifeline import die_with_parent
from gateway.listeners import HTTP, HTTPS, bind, check_free, inherited, parse_listener
from gateway.roll import CONNECTED
from gateway.settings import required
from gateway.supervisor import SIGNALS, Supervisor


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until a signal; the exit status: 0 after a clean stop, 1 with a message otherwise."""
    arguments = _parse(argv)
    try:
        listen = parse_address(arguments.listen) if arguments.listen else None
        if arguments.worker:
            return worker.run(_start(arguments, listen))
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # obeyed once workers are started
        given = inherited(os.environ)
        snapshot = load(arguments.config)
        required(snapshot)
        listen = listen or snapshot.settings.gateway.listen
        addresses = [(listen, HTTP)]
        if (tls := snapshot.settings.gateway.tls) is not None:
            build(tls)  # said once here, not by each worker
            addresses.append((tls.listen, HTTPS))
        if not given:
            for address, kind in addresses:
                check_free(address, kind)
    except (TallygateError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    settings = snapshot.settings
    logs.configure(settings.log.level, settings.log.format, "gateway")
    count = arguments.workers or settings.gateway.workers or len(os.sched_getaffinity(0))
    try:
        return Supervisor(arguments.config, snapshot, addresses, count, given).run()
    except TallygateError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        logs.drain()


def _start(arguments: argparse.Namespace, listen: Address | None) -> worker.Start:
    """A worker's part, as its supervisor asked for it."""
    # Until it handles them: a reload finds the worker reading the file anyway, and a terminal's
    # Ctrl-C, which all processes get, is the supervisor's to obey.
    for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(signum, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    die_with_parent(arguments.parent)
    listeners = [parse_listener(text) for text in arguments.listen_fd]
    if listen is not None:
        listeners.append(bind(listen))
    return worker.Start(
        arguments.config,
        listeners,
        arguments.ready_fd,
        arguments.workers or 1,
        arguments.connected,
        arguments.parent,
    )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tallygate gateway",
        description="Run the data plane: decide and proxy requests.",
        epilog="Signals: TERM, INT drain and stop (once more: kill); HUP reads the configuration "
        "again; USR2 restarts the workers one after another, without a lost request.",
    )
    parser.add_argument("--config", type=Path, default=Path("config.yaml"), metavar="FILE")
    parser.add_argument("--listen", metavar="HOST:PORT", help="instead of gateway.listen")
    parser.add_argument("--workers", type=_positive, metavar="N", help="instead of gateway.workers")
    for flag in ("--worker", CONNECTED):
        parser.add_argument(flag, action="store_true", help=argparse.SUPPRESS)
    for flag, default in (("--parent", 0), ("--ready-fd", -1)):
        parser.add_argument(flag, type=int, default=default, help=argparse.SUPPRESS)
    parser.add_argument("--listen-fd", action="append", default=[], help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} workers: at least 1 is needed")
    return number


if __name__ == "__main__":
    leave(main())
