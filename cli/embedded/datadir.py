"""The data directory of `tallygate up`: its lock, its version, its secrets.

    VERSION            format number and Postgres major, one line
    up.lock            held by the running `tallygate up`; contains its process id
    key-pepper         what API key hashes are salted with
    demo-keys.json     the demo keys in clear, to print them again
    env.json           while it runs: where its stores are, for commands in another terminal
    postgres/ valkey/  one directory a server
    log/ metrics/      output of the processes; metrics of the running one

The directory itself is 0711: a Postgres that runs under another user id must reach its own part.
Every file that holds a secret is 0600.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import time
from pathlib import Path
from types import TracebackType

from core.errors import TallygateError

FORMAT = 1  # raise it when a new release cannot read what an older one wrote
_POLL_S = 0.05


class Lock:
    """An flock on a file. A child that inherits `fd` keeps it held until that child ends too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.fd = -1

    def try_acquire(self) -> bool:
        fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self.fd = fd
        return True

    def acquire(self, deadline_s: float) -> bool:
        """Poll for the lock; False when somebody still holds it after `deadline_s` seconds."""
        end = time.monotonic() + deadline_s
        while not self.try_acquire():
            if time.monotonic() >= end:
                return False
            time.sleep(_POLL_S)
        return True

    def note(self, text: str) -> None:
        """Replace the file's content: who holds the lock, for the error of the next one."""
        os.ftruncate(self.fd, 0)
        os.pwrite(self.fd, text.encode(), 0)

    def holder(self) -> str:
        """What the holder noted, empty when nothing."""
        try:
            return self.path.read_text().strip()
        except OSError:
            return ""

    def release(self) -> None:
        """Give up our hold. The lock itself stays while a child still has the descriptor."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class DataDir:
    """A locked data directory of the right version. Use as a context manager.

    Raises, on entering:
        TallygateError: locked by another `up`, of another version, not one of ours, not writable.
    """

    def __init__(self, path: Path, postgres_major: int) -> None:
        self.path = path.absolute()
        self._stamp = f"format {FORMAT}, Postgres {postgres_major}"
        self._lock = Lock(self.path / "up.lock")

    def __enter__(self) -> DataDir:
        try:
            self._prepare()
        except OSError as error:
            raise TallygateError(
                f"data directory {self.path}: {error.strerror}: choose another with --data-dir"
            ) from None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.release()

    def _prepare(self) -> None:
        version = self.path / "VERSION"
        if self.path.exists() and not self.path.is_dir():
            raise TallygateError(f"{self.path} is not a directory: choose another with --data-dir")
        if self.path.is_dir() and not version.exists():
            strangers = sorted({entry.name for entry in self.path.iterdir()} - {"up.lock"})
            if strangers:
                raise TallygateError(
                    f"{self.path} holds {strangers[0]!r} and is no data directory of tallygate: "
                    "choose an empty one with --data-dir"
                )
        self.path.mkdir(parents=True, exist_ok=True)
        self.path.chmod(0o711)
        if not self._lock.try_acquire():
            pid = self._lock.holder() or "unknown"
            raise TallygateError(
                f"data directory {self.path} is in use by another `tallygate up` (process {pid}): "
                "stop it, or choose another with --data-dir"
            )
        self._lock.note(f"{os.getpid()}\n")
        if not version.exists():
            write_private(version, self._stamp + "\n")
            return
        found = version.read_text().strip()
        if found != self._stamp:
            self._lock.release()
            raise TallygateError(
                f"data directory {self.path} is of another version (it has {found!r}, this "
                f"tallygate needs {self._stamp!r}): choose another with --data-dir, or remove it"
            )

    def secret(self, name: str) -> str:
        """The secret kept in file `name`, made on first use: 64 hexadecimal digits."""
        return secret(self.path / name)

    def fresh(self, name: str) -> Path:
        """A subdirectory that is empty now."""
        target = self.path / name
        if target.exists():
            shutil.rmtree(target)
        target.mkdir(mode=0o700)
        return target

    def directory(self, name: str) -> Path:
        """A subdirectory, made 0700 when missing."""
        target = self.path / name
        target.mkdir(mode=0o700, exist_ok=True)
        return target


def write_private(path: Path, text: str) -> None:
    """Write a 0600 file whole or not at all: a crash leaves the old content, or none."""
    temporary = path.with_name(path.name + ".new")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def secret(path: Path) -> str:
    """Read a secret, or make one of 64 hexadecimal digits and keep it 0600."""
    if not path.exists():
        write_private(path, secrets.token_hex(32) + "\n")
    return path.read_text().strip()
