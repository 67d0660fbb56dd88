"""One gateway worker: a process with one event loop behind a listening socket of its own.

Workers share the port through SO_REUSEPORT (Granian sets it), so the kernel spreads connections
and a worker that dies takes only its own with it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import sys
from pathlib import Path

import uvloop
from granian.constants import HTTPModes, Interfaces
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server.embed import Server

from core.config import Address, Snapshot, load
from core.errors import TallygateError
from core.telemetry import logs
from gateway.app import Gateway

_log = logs.get_logger()

# Connections one worker serves at once; beyond that the kernel queues. Never more than there are
# file descriptors for: out of them, accepting would fail and be tried again without end.
_BACKPRESSURE = 65_536
_RESERVED_FILES = 64
_FEW_FILES = 4_096
# How long a connection may be idle or take to send a head. Load balancers keep theirs for about a
# minute and must not meet one that we are just closing.
_KEEPALIVE_MS = 75_000
_BACKLOG = 2_048
_GC_THRESHOLD = (20_000, 20, 100)
# Granian's default of 400 KiB is what a slow reader costs; our pieces are at most 64 KiB.
_WRITE_BUFFER = 128 * 1024


def run(config: Path, listen: Address | None, ready_fd: int = -1, workers: int = 1) -> int:
    """Runs one of so many workers until SIGTERM or SIGINT; the exit status.

    One byte is written to `ready_fd` (unless negative) once it listens.
    """
    try:
        snapshot = load(config)
        settings = snapshot.settings
        logs.configure(settings.log.level, settings.log.format, "gateway")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            listen = listen or settings.gateway.listen
            runner.run(_serve(config, snapshot, listen, ready_fd, workers))
    except (TallygateError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        logs.drain()
    return 0


async def _serve(
    path: Path, snapshot: Snapshot, listen: Address, ready_fd: int, workers: int
) -> None:
    gateway = Gateway(path, snapshot, workers)
    await gateway.open()
    # What exists now lives as long as the process: leave it out of every collection to come. And
    # collect rarely: requests leave no cycles behind, so the default only walks live objects.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLD)
    server = Server(
        gateway,
        address=listen.host,
        port=listen.port,
        interface=Interfaces.ASGINL,
        http=HTTPModes.http1,
        http1_settings=HTTP1Settings(
            header_read_timeout=_KEEPALIVE_MS, max_buffer_size=_WRITE_BUFFER
        ),
        backlog=_BACKLOG,
        backpressure=_connections(snapshot),
        websockets=False,
        log_level=LogLevels.error,
        log_dictconfig=logs.GRANIAN_LOGGING,
    )
    server.workers_kill_timeout = max(1, snapshot.settings.gateway.drain_ms // 1000)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, server.stop)
    loop.add_signal_handler(signal.SIGHUP, gateway.config.reload)
    gateway.on_fatal = server.stop

    def on_startup() -> None:  # called once the socket is bound
        if ready_fd >= 0:
            os.write(ready_fd, b"1")
            os.close(ready_fd)

    server.on_startup(on_startup)
    try:
        if gateway.fatal is None:
            await server.serve()
    finally:
        await gateway.close()
        _log.info("stopped")
    if gateway.fatal is not None:
        raise gateway.fatal


def _connections(snapshot: Snapshot) -> int:
    """Client connections to accept: what the file limit leaves beside stores and upstreams."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    upstreams = sum(upstream.max_connections for upstream in snapshot.upstreams.values())
    left = soft - upstreams - _RESERVED_FILES
    if left < _FEW_FILES:
        _log.warning("few_files", connections=max(1, left), fix="raise the limit: ulimit -n")
    return max(1, min(_BACKPRESSURE, left))
