"""What the embedded servers have in common: one process at a time in a data directory."""

from __future__ import annotations

import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import ClassVar, Self

from cli.embedded import process
from cli.embedded.datadir import Lock, secret
from core.errors import TallygateError

_PREDECESSOR_S = 30.0
_PORT_ATTEMPTS = 5


class EmbeddedServer(ABC):
    """One server process on 127.0.0.1; `data_dir` is made, and survives `stop()`.

    A subclass finds its binaries, prepares the directory, launches and stops.
    """

    title: ClassVar[str]

    def __init__(self, data_dir: Path, port: int) -> None:
        self.data_dir = data_dir.absolute()
        self.port = port
        self.process: subprocess.Popen[bytes] | None = None
        self._wanted_port = port
        self._password = ""

    @property
    def log(self) -> Path:
        return self.data_dir / f"{self.title.lower()}.log"

    @property
    def pid(self) -> int:
        """Process id while running.

        Raises:
            RuntimeError: not started.
        """
        if self.process is None:
            raise RuntimeError("the server is not running")
        return self.process.pid

    def start(self) -> Self:
        """Start and wait until it answers, its data recovered. Call from the main thread.

        Raises:
            TallygateError: no binaries, port in use, directory in use or of another version, or it
                did not come up.
        """
        binaries = self._find()
        self.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = Lock(self.data_dir / "server.lock")
        if not lock.acquire(_PREDECESSOR_S):
            raise TallygateError(
                f"a {self.title} still runs in {self.data_dir} (process {lock.holder()}), "
                f"{_PREDECESSOR_S:.0f} s after it should have stopped: stop it first"
            )
        try:
            self._password = secret(self.data_dir / "password")
            process.rotate(self.log)
            command = self._prepare(binaries)
            if self._wanted_port:
                process.require_free(process.LOOPBACK, self._wanted_port, "another port")
            for _ in range(1 if self._wanted_port else _PORT_ATTEMPTS):
                self.port = self._wanted_port or process.free_port()
                if self._launch(command, lock):
                    return self
                if "in use" not in process.tail(self.log):
                    break  # not a lost race for the port: another attempt would fail alike
            raise TallygateError(
                f"{self.title} did not start in {self.data_dir}: {process.last_line(self.log)}"
            )
        finally:
            lock.release()  # the server holds the same lock through its inherited descriptor

    def restart(self) -> subprocess.Popen[bytes]:
        """Start again after a crash, on the same port, so that clients find it. See `start`."""
        self._wanted_port = self.port
        started = self.start().process
        assert started is not None
        return started

    @abstractmethod
    def stop(self) -> None:
        """Stop cleanly, harder after a deadline. The data stays. Harmless when not running."""

    @abstractmethod
    def _find(self) -> Path:
        """The binary, or the directory of binaries. Raises TallygateError when there is none."""

    @abstractmethod
    def _prepare(self, binaries: Path) -> list[str]:
        """Make the directory ready; the command to launch, without what depends on the port."""

    @abstractmethod
    def _launch(self, command: list[str], lock: Lock) -> bool:
        """Start on `self.port` and wait; sets `process` and returns True once it answers."""

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
