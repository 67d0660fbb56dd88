"""One gateway worker: a process with one event loop that serves the sockets of its slot."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

from core import clock
from core.config import Snapshot, load
from core.errors import TallygateError
from core.telemetry import logs
from gateway import compiled
from gateway.app import Gateway
from gateway.http.server import HANDSHAKES, HttpServer, Limits
from gateway.listeners import HTTPS, Listener
from gateway.proxy import watch

_log = logs.get_logger()

# Connections one worker serves at once; beyond that the kernel queues. Never more than there are
# file descriptors for: out of them, accepting would fail and be tried again without end.
_MAX_CONNECTIONS = 65_536
_RESERVED_FILES = 64
_FEW_FILES = 4_096
_GC_THRESHOLD = (20_000, 20, 100)
# How long a handshake may be under way that began before new ones were refused.
_HANDSHAKE_S = 0.25
# And how long the rest of the queue may take to be accepted.
_QUEUE_S = 1.0
_CONNECTED_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class Start:
    """How the supervisor starts a worker.

    Attributes:
        config: its file.
        listeners: to be served, and closed, by the worker.
        ready_fd: one byte is written to it, unless negative, once they are served.
        workers: how many there are on this host.
        connected: serve only once both stores are connected.
        parent: process id of the supervisor.
    """

    config: Path
    listeners: Sequence[Listener]
    ready_fd: int = -1
    workers: int = 1
    connected: bool = False
    parent: int = 0


def run(start: Start) -> int:
    """Runs a worker until SIGTERM; the exit status."""
    try:
        snapshot = load(start.config)
        settings = snapshot.settings
        logs.configure(settings.log.level, settings.log.format, "gateway")
        _log.debug("hot_path", compiled=compiled.check())
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(start, snapshot))
    except (TallygateError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        logs.drain()
    return 0


async def _serve(start: Start, snapshot: Snapshot) -> None:
    gateway = Gateway(start.config, snapshot, start.workers)
    await gateway.open()
    # What exists now lives as long as the process: leave it out of every collection to come. And
    # collect rarely: requests leave no cycles behind, so the default only walks live objects.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_GC_THRESHOLD)
    client, http2 = snapshot.settings.gateway.client, snapshot.settings.gateway.http2
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
            streams=http2.max_streams,
            stream_window=http2.stream_window,
            connection_window=http2.connection_window,
        ),
        refuse=gateway.refuse,
        event=gateway.client_event,
        h2c=http2.h2c,
    )
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    loop.add_signal_handler(signal.SIGUSR1, gateway.leave)
    loop.add_signal_handler(signal.SIGHUP, gateway.config.reload)
    gateway.on_fatal = stop.set
    try:
        if start.connected:
            await _until_connected(gateway, stop)
        if gateway.fatal is None and not stop.is_set():
            await _listen(server, gateway, start)
            await stop.wait()
            await _leave(server, gateway, start)
            await server.drain(snapshot.settings.gateway.drain_ms / 1000)
    finally:
        await server.close()
        await gateway.close()
        _log.info("stopped")
    if gateway.fatal is not None:
        raise gateway.fatal


async def _until_connected(gateway: Gateway, stop: asyncio.Event) -> None:
    """The supervisor loses its patience if that takes too long."""
    while not (gateway.connected or stop.is_set()):  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(_CONNECTED_POLL_S)


async def _listen(server: HttpServer, gateway: Gateway, start: Start) -> None:
    for listener in start.listeners:
        if listener.kind == HTTPS and gateway.tls is None:
            # Never plain text where somebody expects TLS.
            raise TallygateError("a socket for https, and no gateway.tls: name certificate and key")
        await server.listen(listener.sock, gateway.tls if listener.kind == HTTPS else None)
    if start.ready_fd >= 0:
        os.write(start.ready_fd, b"1")
        os.close(start.ready_fd)


async def _leave(server: HttpServer, gateway: Gateway, start: Start) -> None:
    """Accepts no more. What waits is left to whoever has the sockets, or accepted when nobody has.

    A worker whose place was taken is stopped by SIGTERM alone; before the whole gateway stops, the
    supervisor has said so, and refuses new connections. It cannot when it was killed.
    """
    orphaned = start.parent and os.getppid() != start.parent
    if orphaned:
        gateway.leave()
        for listener in start.listeners:
            listener.refuse_new()
    if gateway.leaving:
        await asyncio.sleep(_HANDSHAKE_S)
        end = clock.monotonic() + _QUEUE_S
        while clock.monotonic() < end and any(there.waiting for there in start.listeners):  # noqa: ASYNC110
            await asyncio.sleep(0)
    server.stop_accepting()


def _connections(snapshot: Snapshot) -> int:
    """Client connections to accept: what the file limit leaves beside stores and upstreams."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    upstreams = sum(upstream.max_connections for upstream in snapshot.upstreams.values())
    handshakes = HANDSHAKES if snapshot.settings.gateway.tls is not None else 0
    left = soft - upstreams - _RESERVED_FILES - handshakes
    if left < _FEW_FILES:
        _log.warning("few_files", connections=max(1, left), fix="raise the limit: ulimit -n")
    return max(1, min(_MAX_CONNECTIONS, left))
