"""`python -m gateway`: supervises the workers of the data plane.

SIGTERM and SIGINT drain and stop all workers; SIGHUP makes each read the configuration again (a
file that is refused changes nothing). A worker that dies is replaced; should this process be
killed, the workers are told by the kernel and drain by themselves.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core import clock
from core.config import Address, Snapshot, load
from core.config.fields import parse_address
from core.errors import TallygateError
from core.leave import leave
from core.telemetry import logs
from gateway import worker
from gateway.lifeline import die_with_parent

_log = logs.get_logger()

_SIGNALS = frozenset((signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD))
_POLL_S = 0.5
# A worker that lived this long is replaced at once; one that dies sooner waits, doubling.
_SETTLED_S = 10.0
_BACKOFF_FIRST_S = 0.1
_BACKOFF_MAX_S = 5.0
# On top of the drain time: closing the stores, writing the last metrics.
_STOP_MARGIN_S = 5.0


@dataclass(slots=True)
class _Slot:
    number: int
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    backoff_s: float = 0.0
    start_at: float = 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Runs until a signal; the exit status: 0 after a clean stop, 1 with a message otherwise."""
    arguments = _parse(argv)
    try:
        listen = parse_address(arguments.listen) if arguments.listen else None
        if arguments.worker:
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            die_with_parent(arguments.parent)
            return worker.run(arguments.config, listen)
        snapshot = load(arguments.config)
        listen = listen or snapshot.settings.gateway.listen
        _check_port(listen)
    except (TallygateError, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    settings = snapshot.settings
    logs.configure(settings.log.level, settings.log.format, "gateway")
    try:
        return _supervise(arguments.config, snapshot, listen, arguments.workers)
    finally:
        logs.drain()


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tallygate gateway", description="Run the data plane: decide and proxy requests."
    )
    parser.add_argument("--config", type=Path, default=Path("config.yaml"), metavar="FILE")
    parser.add_argument("--listen", metavar="HOST:PORT", help="instead of gateway.listen")
    parser.add_argument("--workers", type=int, metavar="N", help="instead of gateway.workers")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--parent", type=int, default=0, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def _check_port(listen: Address) -> None:
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
                f"gateway.listen: cannot listen on {listen}: {error.strerror}; "
                "choose another port or stop what uses it"
            ) from None


def _supervise(config: Path, snapshot: Snapshot, listen: Address, workers: int | None) -> int:
    count = workers or snapshot.settings.gateway.workers or len(os.sched_getaffinity(0))
    command = [
        sys.executable,
        *("-m", "gateway", "--worker"),
        *("--parent", str(os.getpid())),
        *("--config", str(config)),
        *("--listen", str(listen)),
    ]
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    slots = [_Slot(number) for number in range(1, count + 1)]
    for slot in slots:
        _start(slot, command)
    _log.info("listening", address=str(listen), workers=count)
    while True:
        received = signal.sigtimedwait(_SIGNALS, _POLL_S)
        number = received.si_signo if received else None
        if number in (signal.SIGTERM, signal.SIGINT):
            return _stop(slots, snapshot.settings.gateway.drain_ms / 1000 + _STOP_MARGIN_S)
        if number == signal.SIGHUP:
            _tell(slots, signal.SIGHUP)
        for slot in slots:
            _look_after(slot, command)


def _start(slot: _Slot, command: list[str]) -> None:
    slot.process = subprocess.Popen(command)  # noqa: S603 - our own interpreter and arguments
    slot.started = clock.monotonic()


def _look_after(slot: _Slot, command: list[str]) -> None:
    now = clock.monotonic()
    if slot.process is not None:
        status = slot.process.poll()
        if status is None:
            return
        settled = now - slot.started > _SETTLED_S
        slot.backoff_s = (
            _BACKOFF_FIRST_S
            if settled
            else min(slot.backoff_s * 2 or _BACKOFF_FIRST_S, _BACKOFF_MAX_S)
        )
        slot.start_at = now + (0 if settled else slot.backoff_s)
        slot.process = None
        _log.error("worker_died", worker=slot.number, status=status, restart_in_s=slot.backoff_s)
    if slot.start_at <= now:
        _start(slot, command)


def _tell(slots: list[_Slot], number: int) -> None:
    for slot in slots:
        if slot.process is not None and slot.process.poll() is None:
            slot.process.send_signal(number)


def _stop(slots: list[_Slot], patience_s: float) -> int:
    """Drains all workers; a second signal, or the end of the patience, kills them."""
    _tell(slots, signal.SIGTERM)
    deadline = clock.monotonic() + patience_s
    while any(slot.process is not None and slot.process.poll() is None for slot in slots):
        received = signal.sigtimedwait(_SIGNALS, 0.05)
        again = received is not None and received.si_signo in (signal.SIGTERM, signal.SIGINT)
        if again or clock.monotonic() > deadline:
            _tell(slots, signal.SIGKILL)
    _log.info("stopped")
    return 0


if __name__ == "__main__":
    leave(main())
