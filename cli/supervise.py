"""Keeps the processes of `tallygate up` alive, and stops them in order.

A child writes to its own log file, not to a pipe of ours: when we are killed it can still write
while it drains. We follow those files and repeat each line with the child's name in front.
Everything runs on the main thread's event loop, because a child's death signal is tied to the
thread that forked it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import time
from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cli.embedded import process
from core.errors import TallygateError

_POLL_S = 0.05
_FIRST_BACKOFF_S = 0.5
_MAX_BACKOFF_S = 10.0
_SETTLED_S = 30.0  # a child that lived this long starts again with the first backoff
_HURRIED_S = 1.0
_LOG_LIMIT = 16 * 1024 * 1024

# name of the child, one line without its newline
Say = Callable[[str, str], None]


@dataclass(eq=False)
class Child:
    """One supervised process.

    `launch` starts it and returns it, on first start and on each restart; it may raise
    `TallygateError`. Signals: `stop_signal` asks it to end, `kill_signal` follows after
    `deadline_s` seconds or in a hurry. `show_log`: repeat its output.
    """

    name: str
    launch: Callable[[], subprocess.Popen[bytes]]
    log: Path
    show_log: bool = True
    stop_signal: int = signal.SIGTERM
    kill_signal: int = signal.SIGKILL
    deadline_s: float = 35.0
    restart: bool = False  # set once it is known to work: before that its end ends `up`
    popen: subprocess.Popen[bytes] | None = None
    restarts: int = 0
    stopping: bool = field(default=False, init=False)
    offset: int = field(default=0, init=False)
    watcher: asyncio.Task[None] | None = field(default=None, init=False)

    def end(self) -> str | None:
        """How it ended, e.g. `exited with status 1`; None while it runs."""
        status = self.popen.poll() if self.popen is not None else None
        if status is None:
            return None
        if status < 0:
            return f"was ended by {signal.Signals(-status).name}"
        return f"exited with status {status}"


class Supervisor:
    """Starts children, restarts those that die, stops them in the order asked for."""

    def __init__(self, say: Say) -> None:
        self._say = say
        self._children: list[Child] = []
        self._hurry = asyncio.Event()
        self._failed: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    def hurry(self) -> None:
        """Stop waiting politely: what still runs is killed a second later."""
        self._hurry.set()

    def start(self, child: Child) -> Child:
        """Launch the child, unless it already runs, and watch it from now on."""
        child.offset = child.log.stat().st_size if child.log.exists() else 0
        if child.popen is None:
            child.popen = child.launch()
        child.watcher = asyncio.create_task(self._watch(child))
        self._children.append(child)
        return child

    async def ready(self, child: Child, url: str, deadline_s: float) -> None:
        """Poll until `url` answers 200; from then on the child is restarted when it dies.

        Raises:
            TallygateError: it ended first, or did not answer in time.
        """
        end = time.monotonic() + deadline_s
        while not await answers(url):
            if child.popen is not None and child.popen.poll() is not None:
                await asyncio.sleep(2 * _POLL_S)  # let the watcher repeat its last words
                raise TallygateError(f"{child.name} {child.end()} before it was ready")
            if time.monotonic() >= end:
                raise TallygateError(
                    f"{child.name} did not answer {url} within {deadline_s:.0f} s; its output is "
                    f"in {child.log}"
                )
            await asyncio.sleep(_POLL_S)
        child.restart = True

    async def failure(self) -> str:
        """Wait for a child that must not be restarted to end; says which and how."""
        return await asyncio.shield(self._failed)

    async def stop(self, children: Sequence[Child] | None = None) -> None:
        """Stop one after the other, each with its own deadline; all, newest first, by default."""
        for child in list(reversed(self._children)) if children is None else children:
            await self._stop(child)

    async def _stop(self, child: Child) -> None:
        child.stopping = True
        running = child.popen
        if running is not None and running.poll() is None:
            running.send_signal(child.stop_signal)
            if not await self._ended(running, child.deadline_s):
                if not self._hurry.is_set():
                    self._say(
                        "up", f"{child.name} did not stop in {child.deadline_s:.0f} s: killing it"
                    )
                running.send_signal(child.kill_signal)
                if not await self._ended(running, 5.0):
                    running.kill()
                    running.wait()
        if child.watcher is not None:
            child.watcher.cancel()
            await asyncio.gather(child.watcher, return_exceptions=True)
            self._follow(child)

    async def _ended(self, running: subprocess.Popen[bytes], deadline_s: float) -> bool:
        end = time.monotonic() + deadline_s
        hurried = False
        while running.poll() is None:
            if self._hurry.is_set() and not hurried:
                hurried, end = True, min(end, time.monotonic() + _HURRIED_S)
            if time.monotonic() >= end:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    async def _watch(self, child: Child) -> None:
        backoff = _FIRST_BACKOFF_S
        while True:
            started = time.monotonic()
            while child.end() is None:
                self._follow(child)
                await asyncio.sleep(_POLL_S)
            self._follow(child)
            if child.stopping:
                return
            if not child.restart:
                if not self._failed.done():
                    self._failed.set_result(f"{child.name} {child.end()}")
                return
            if time.monotonic() - started >= _SETTLED_S:
                backoff = _FIRST_BACKOFF_S
            why = f"{child.name} {child.end()}"
            while True:
                self._say("up", f"{why}; starting it again in {backoff:g} s (log: {child.log})")
                await asyncio.sleep(backoff)
                backoff = min(2 * backoff, _MAX_BACKOFF_S)
                try:
                    child.popen = child.launch()
                    child.restarts += 1
                    break
                except TallygateError as error:
                    why = f"{child.name} did not start: {error}"

    def _follow(self, child: Child) -> None:
        """Repeat the complete lines that were added to the log; shorten it when it is long."""
        try:
            size = child.log.stat().st_size
        except FileNotFoundError:
            return
        if child.show_log and size > child.offset:
            with child.log.open("rb") as file:
                file.seek(child.offset)
                added = file.read(_LOG_LIMIT)
            whole = added[: added.rfind(b"\n") + 1]
            child.offset += len(whole)
            for line in whole.decode(errors="replace").splitlines():
                self._say(child.name, line)
        if size > _LOG_LIMIT:
            # The child appends to this very file, so it is shortened in place; what the child
            # writes in the instant between the copy and the cut is lost.
            child.log.with_suffix(".log.1").write_bytes(child.log.read_bytes())
            os.truncate(child.log, 0)
            child.offset = 0


async def answers(url: str, timeout_s: float = 2.0) -> bool:
    """Whether a GET of an `http://host:port/path` URL answers 200 within the time-out."""
    address, _, path = url.removeprefix("http://").partition("/")
    host, _, port = address.rpartition(":")
    request = f"GET /{path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"
    try:
        async with asyncio.timeout(timeout_s):
            reader, writer = await asyncio.open_connection(host.strip("[]"), int(port))
            try:
                writer.write(request.encode())
                status = await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False
    return status.split(b" ")[1:2] == [b"200"]


def find_own_packages(env: MutableMapping[str, str]) -> None:
    """Make `python -m gateway` find ours, and not a folder `gateway` where the user happens to be.

    Ours go last, so that a PYTHONPATH of the user's wins.
    """
    root = str(Path(__file__).resolve().parent.parent)
    given = env.get("PYTHONPATH")
    env["PYTHONPATH"] = f"{given}{os.pathsep}{root}" if given else root
    env["PYTHONSAFEPATH"] = "1"


def command(
    name: str, argv: Sequence[str], env: dict[str, str], log_dir: Path
) -> Callable[[], subprocess.Popen[bytes]]:
    """A `launch` for a process of ours, its output in `log_dir/name.log`."""

    def launch() -> subprocess.Popen[bytes]:
        return process.spawn(
            argv, death_signal=signal.SIGTERM, log=log_dir / f"{name}.log", env=env
        )

    return launch
