"""One gateway worker: a process with one event loop behind a listening socket of its own.

Workers share the port through SO_REUSEPORT, so the kernel spreads connections and a worker that
dies takes only its own with it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import socket
import sys
from pathlib import Path

import uvloop

from core.config import Address, Snapshot, load
from core.errors import TallygateError
from core.telemetry import logs
from gateway.app import Gateway
from gateway.http.server import HttpServer, Limits
from gateway.proxy import watch

_log = logs.get_logger()

# Connections one worker serves at once; beyond that the kernel queues. Never more than there are
# file descriptors for: out of them, accepting would fail and be tried again without end.
_BACKPRESSURE = 65_536
_RESERVED_FILES = 64
_FEW_FILES = 4_096
_GC_THRESHOLD = (20_000, 20, 100)


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
    client = snapshot.settings.gateway.client
    watch.current().body_ticks = watch.ticks(client.body_timeout_ms / 1000)
    server = HttpServer(
        gateway,
        limits=Limits(
            head=client.max_head,
            target=client.max_url,
            fields=client.max_fields,
            head_s=-(-client.head_timeout_ms // 1000),
            keepalive_s=-(-client.idle_timeout_ms // 1000),
            connections=_connections(snapshot),
        ),
        refuse=gateway.refuse,
    )
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopped.set)
    loop.add_signal_handler(signal.SIGHUP, gateway.config.reload)
    gateway.on_fatal = stopped.set
    try:
        if gateway.fatal is None:
            await server.listen(_bind(listen))
            if ready_fd >= 0:
                os.write(ready_fd, b"1")
                os.close(ready_fd)
            await stopped.wait()
            await server.drain(snapshot.settings.gateway.drain_ms / 1000)
    finally:
        await server.close()
        await gateway.close()
        _log.info("stopped")
    if gateway.fatal is not None:
        raise gateway.fatal


def _bind(listen: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in listen.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((listen.host, listen.port))
    return sock


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
