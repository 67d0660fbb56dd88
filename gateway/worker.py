"""One gateway worker: a process with one event loop behind a listening socket of its own.

Workers share the port through SO_REUSEPORT (Granian sets it), so the kernel spreads connections
and a worker that dies takes only its own with it.
"""

from __future__ import annotations

import asyncio
import gc
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

# Connections one worker serves at once; beyond that the kernel queues.
_BACKPRESSURE = 65_536
_BACKLOG = 2_048
_GC_THRESHOLD = (20_000, 20, 100)
# Granian's default of 400 KiB is what a slow reader costs; our pieces are at most 64 KiB.
_WRITE_BUFFER = 128 * 1024


def run(config: Path, listen: Address | None) -> int:
    """Runs one worker until SIGTERM or SIGINT; the exit status."""
    try:
        snapshot = load(config)
        settings = snapshot.settings
        logs.configure(settings.log.level, settings.log.format, "gateway")
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(config, snapshot, listen or settings.gateway.listen))
    except (TallygateError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        logs.drain()
    return 0


async def _serve(path: Path, snapshot: Snapshot, listen: Address) -> None:
    gateway = Gateway(path, snapshot)
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
        http1_settings=HTTP1Settings(header_read_timeout=10_000, max_buffer_size=_WRITE_BUFFER),
        backlog=_BACKLOG,
        backpressure=_BACKPRESSURE,
        websockets=False,
        log_level=LogLevels.error,
        log_dictconfig=logs.GRANIAN_LOGGING,
    )
    server.workers_kill_timeout = max(1, snapshot.settings.gateway.drain_ms // 1000)
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, server.stop)
    loop.add_signal_handler(signal.SIGHUP, gateway.config.reload)
    try:
        await server.serve()
    finally:
        await gateway.close()
        _log.info("stopped")
