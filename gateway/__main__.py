"""`python -m gateway`: the data plane, a supervisor and its workers.

SIGTERM and SIGINT drain and stop all workers; SIGHUP makes each read the configuration again (a
file that is refused changes nothing). A worker that dies is replaced; should the supervisor be
killed, the workers are told by the kernel and drain by themselves.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

from core.config import Address, load
from core.config.fields import parse_address
from core.errors import TallygateError
from core.leave import leave
from core.telemetry import logs
from core.tls import build
from gateway import worker
from gateway.lifeline import die_with_parent
from gateway.settings import required
from gateway.supervisor import Supervisor


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until a signal; the exit status: 0 after a clean stop, 1 with a message otherwise."""
    arguments = _parse(argv)
    try:
        listen = parse_address(arguments.listen) if arguments.listen else None
        if arguments.worker:
            # A reload asked for now finds the worker reading the file anyway.
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            die_with_parent(arguments.parent)
            workers = arguments.workers or 1
            return worker.run(arguments.config, listen, arguments.ready_fd, workers)
        snapshot = load(arguments.config)
        required(snapshot)
        listen = listen or snapshot.settings.gateway.listen
        _check_port(listen, "gateway.listen")
        if (tls := snapshot.settings.gateway.tls) is not None:
            build(tls)
            _check_port(tls.listen, "gateway.tls.listen")
    except (TallygateError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    settings = snapshot.settings
    logs.configure(settings.log.level, settings.log.format, "gateway")
    count = arguments.workers or settings.gateway.workers or len(os.sched_getaffinity(0))
    try:
        return Supervisor(arguments.config, snapshot, listen, count).run()
    finally:
        logs.drain()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tallygate gateway", description="Run the data plane: decide and proxy requests."
    )
    parser.add_argument("--config", type=Path, default=Path("config.yaml"), metavar="FILE")
    parser.add_argument("--listen", metavar="HOST:PORT", help="instead of gateway.listen")
    parser.add_argument("--workers", type=_positive, metavar="N", help="instead of gateway.workers")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--ready-fd", type=int, default=-1, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} workers: at least 1 is needed")
    return number


def _check_port(listen: Address, setting: str) -> None:
    """Workers share the port, and so would two gateways: refuse that with a plain bind.

    Raises:
        TallygateError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((listen.host, listen.port))
        except OSError as error:
            raise TallygateError(
                f"{setting}: cannot listen on {listen}: {error.strerror}; "
                "choose another port or stop what uses it"
            ) from None


if __name__ == "__main__":
    leave(main())
