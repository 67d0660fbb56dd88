"""What the configuration itself risks: outage modes, the spool, how far the ledger is behind."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from core.config import Snapshot
from core.config.units import format_duration
from core.doctor.disk import filesystem, free_bytes
from core.doctor.findings import Crash, Finding, Severity, ok
from core.policy import OutageMode

_VOLATILE = ("tmpfs", "ramfs")
_CONTAINER = ("overlay", "aufs")
_LONG_FLUSH_MS = 60_000


def workers(snapshot: Snapshot) -> int:
    """Gateway workers of one host, as this machine would start them."""
    configured = snapshot.settings.gateway.workers
    return configured or len(os.sched_getaffinity(0))


def connections(snapshot: Snapshot) -> int:
    """Postgres connections that all processes may hold: pools, and one LISTEN a gateway worker."""
    gateway, pool = snapshot.settings.gateway, snapshot.settings.postgres.pool
    return gateway.outage.instances * workers(snapshot) * (pool + 1) + 2 * pool


def unflushed(snapshot: Snapshot) -> str:
    """What the ledger lacks at any moment, in words."""
    interval = format_duration(snapshot.settings.reconciler.flush_interval_ms)
    return (
        f"what was counted since the last flush to the ledger (every {interval} while Postgres "
        "answers)"
    )


def examine(snapshot: Snapshot) -> list[Finding]:
    """Findings about a valid configuration, on the machine this runs on."""
    return [*_routes(snapshot), *_spool(snapshot), *_flush(snapshot)]


def _routes(snapshot: Snapshot) -> Iterator[Finding]:
    by_mode: dict[OutageMode, list[str]] = {}
    for route in snapshot.routes:
        by_mode.setdefault(route.outage, []).append(route.name)
    if by_mode.keys() <= {OutageMode.CLOSED}:
        yield ok("config.outage", "every route refuses (503) while Redis does not answer")
    for mode, text in (
        (OutageMode.OPEN, "admit without any limit while Redis does not answer"),
        (OutageMode.LOCAL, "admit a worker's share of each limit while Redis does not answer"),
    ):
        if names := by_mode.get(mode):
            yield Finding(
                f"config.outage.{mode}",
                Severity.NOTE,
                f"routes that {text}, and count it afterwards: {', '.join(names)}",
                {},
                "outage: closed on those that must never pass a limit",
            )


def _spool(snapshot: Snapshot) -> Iterator[Finding]:
    outage = snapshot.settings.gateway.outage
    if outage.spool_dir is None:
        return
    check, path = "config.spool_dir", Path(outage.spool_dir)
    shown = f"gateway.outage.spool_dir {path}"
    parent = path
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    missing = " (not there yet)" if parent != path else ""
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        yield Finding(
            check,
            Severity.WARNING,
            f"{shown}: {parent} is no directory that this user can write, so requests of open and "
            "local routes are refused in an outage",
            {},
            "make the directory, owned by the user the gateway runs as",
        )
        return
    kind = filesystem(parent)
    if kind in _VOLATILE:
        yield Finding(
            check,
            Severity.CRITICAL,
            f"{shown}{missing} is in memory ({kind})",
            {Crash.POWER: "everything that was admitted during an outage and not counted yet"},
            "name a directory on a disk in gateway.outage.spool_dir",
        )
    elif kind in _CONTAINER:
        yield Finding(
            check,
            Severity.WARNING,
            f"{shown}{missing} is in a container's own layer ({kind})",
            {Crash.DISK: "what was admitted during an outage and not counted yet, when the "
             "container is replaced"},
            "mount a volume there",
        )  # fmt: skip
    else:
        yield ok(check, f"{shown}{missing} is on a disk ({kind or 'of unknown type'})")
    needed, free = outage.spool_max * workers(snapshot), free_bytes(parent)
    if free < needed:
        yield Finding(
            "config.spool_max",
            Severity.WARNING,
            f"the spools of all workers may take {needed} bytes and {parent} has {free}: a full "
            "disk refuses requests (503) before the spool is full",
            {},
            "make room, or lower gateway.outage.spool_max",
        )


def _flush(snapshot: Snapshot) -> Iterator[Finding]:
    interval = snapshot.settings.reconciler.flush_interval_ms
    if interval > _LONG_FLUSH_MS:
        yield Finding(
            "config.flush_interval",
            Severity.NOTE,
            f"reconciler.flush_interval {format_duration(interval)}: so much is in Redis alone",
            {},
            "1s costs little: only subjects that changed are copied",
        )
