"""Reload without a restart: a changed file is validated whole, then swapped in by one assignment.

A file that is not valid changes nothing: the snapshot in force stays, and the refusal is reported.
The file is polled rather than watched: stat sees what inotify misses, such as the symlink swap of
a mounted Kubernetes ConfigMap, or a network file system.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable
from functools import reduce
from pathlib import Path

from core.config.loader import load
from core.config.snapshot import Snapshot
from core.errors import ConfigError

_log = logging.getLogger(__name__)

# None is a file that is gone.
Signature = tuple[int, int, int, int] | None
_NEVER = (-1, -1, -1, -1)  # what no stat answers

# Read once at start by the process that owns the socket, pool, hash or directory behind them.
RESTART_SETTINGS = (
    "gateway.listen",
    "gateway.workers",
    "control.listen",
    "redis.url",
    "postgres.url",
    "postgres.pool",
    "secrets.key_pepper",
    "telemetry.metrics_dir",
)


def restart_needed(old: Snapshot, new: Snapshot) -> list[str]:
    """Paths of settings that differ and take effect only after a restart, in file order."""

    def value(snapshot: Snapshot, path: str) -> object:
        settings: object = snapshot.settings
        return reduce(getattr, path.split("."), settings)

    return [path for path in RESTART_SETTINGS if value(old, path) != value(new, path)]


class ConfigWatcher:
    """Holds the snapshot in force. `current` is a plain attribute: reading it is the whole cost.

    `on_reload(old, new)` is called after a swap, `on_refused(error)` after a file was refused;
    both on the thread of `run` or `reload`. What they raise is logged and does not stop watching.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        snapshot: Snapshot,
        *,
        on_reload: Callable[[Snapshot, Snapshot], object] | None = None,
        on_refused: Callable[[ConfigError], object] | None = None,
        interval_s: float = 0.5,
    ) -> None:
        self.current = snapshot
        self._path = Path(path)
        self._on_reload = on_reload
        self._on_refused = on_refused
        self._interval_s = interval_s
        # Not the stat of now: the file may have changed since the snapshot was loaded.
        self._done: Signature = _NEVER
        self._refused = False
        self._generation = 0

    async def run(self) -> None:
        """Poll until cancelled. A change is loaded once two polls in a row see it the same, so
        that a file caught half-written by an editor is not taken for the whole.
        """
        pending: Signature = _NEVER
        while True:
            seen = await asyncio.to_thread(self._signature)
            if seen == self._done:
                pending = _NEVER
            elif seen != pending:
                pending = seen
            else:
                generation = self._generation
                result = await asyncio.to_thread(self._load)
                # A reload() that ran meanwhile read the file later than we did; look again.
                if generation == self._generation:
                    self._done = seen
                    # The same text again is no news, unless it mends a refused file.
                    if (
                        self._refused
                        or isinstance(result, ConfigError)
                        or result.digest != self.current.digest
                    ):
                        self._apply(result)
                pending = _NEVER
            await asyncio.sleep(self._interval_s)

    def reload(self) -> bool:
        """Read the file now, changed or not (SIGHUP). True if it was accepted; never raises."""
        self._generation += 1
        self._done = self._signature()
        return self._apply(self._load())

    def _signature(self) -> Signature:
        """Identity of the file's content as stat tells it, through symlinks; None if it is gone."""
        try:
            stat = self._path.stat()
        except OSError:
            return None
        return stat.st_mtime_ns, stat.st_size, stat.st_ino, stat.st_dev

    def _load(self) -> Snapshot | ConfigError:
        try:
            return load(self._path)
        except ConfigError as error:
            return error
        except Exception as error:  # a bug in validation must not take the gate down
            _log.exception("loading %s failed", self._path)
            return ConfigError(str(self._path), [f"cannot be loaded: {type(error).__name__}"])

    def _apply(self, result: Snapshot | ConfigError) -> bool:
        self._refused = isinstance(result, ConfigError)
        try:
            if isinstance(result, ConfigError):
                if self._on_refused is not None:
                    self._on_refused(result)
                return False
            old, self.current = self.current, result
            if self._on_reload is not None:
                self._on_reload(old, result)
        except Exception:
            _log.exception("a callback for %s failed", self._path)
        return not self._refused
