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
from core.errors import ConfigError, TallygateError
from core.policy import changed_meters

_log = logging.getLogger(__name__)

# None is a file that is gone.
Signature = tuple[int, int, int, int] | None
_NEVER = (-1, -1, -1, -1)  # what no stat answers

# Read once at start by the process that owns the socket, pool, hash, cache or directory behind
# them. Attribute paths: a duration's ends in _ms, which its key in the file does not.
RESTART_SETTINGS = (
    "gateway.listen",
    "gateway.tls.listen",
    "gateway.http2.h2c",
    "gateway.http2.max_streams",
    "gateway.http2.stream_window",
    "gateway.http2.connection_window",
    "gateway.workers",
    "gateway.key_cache.size",
    "gateway.key_cache.ttl_ms",
    "gateway.key_cache.negative_ttl_ms",
    "gateway.admission.max_batch",
    "gateway.admission.max_in_flight",
    "gateway.drain_ms",
    "gateway.drain_delay_ms",
    "gateway.outage.spool_dir",
    "gateway.outage.spool_max",
    "control.listen",
    "reconciler.batch",
    "redis.url",
    "redis.timeout_ms",
    "postgres.url",
    "postgres.pool",
    "postgres.timeout_ms",
    "secrets.key_pepper",
    "telemetry.metrics_dir",
)


def restart_needed(old: Snapshot, new: Snapshot) -> list[str]:
    """Paths of settings that differ and take effect only after a restart, in file order."""

    def value(snapshot: Snapshot, path: str) -> object:
        settings: object = snapshot.settings
        # A section that is left out altogether has no settings.
        return reduce(lambda section, name: getattr(section, name, None), path.split("."), settings)

    return [
        path.removesuffix("_ms")
        for path in RESTART_SETTINGS
        if value(old, path) != value(new, path)
    ]


def plans_removed(old: Snapshot, new: Snapshot) -> list[str]:
    """Plans that `new` lacks; subscriptions that still name one are refused (403)."""
    return sorted(old.plans.keys() - new.plans.keys())


class ConfigWatcher:
    """Holds the snapshot in force. `current` is a plain attribute: reading it is the whole cost.

    `on_reload(old, new)` is called before a swap and may refuse it by raising, so it must either
    take over all of `new` or raise and leave everything as it was. `on_refused(error)` is called
    after a file was refused, by whomever; what it raises is logged. Both are called on the thread
    of `run` or `reload`, and neither stops the watching.
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
        refusal = result if isinstance(result, ConfigError) else self._take(result)
        self._refused = refusal is not None
        if refusal is None:
            return True
        if self._on_refused is not None:
            try:
                self._on_refused(refusal)
            except Exception:
                _log.exception("reporting the refusal of %s failed", self._path)
        return False

    def _take(self, new: Snapshot) -> ConfigError | None:
        """Swaps `new` in unless it cannot follow the one in force; then why."""
        old = self.current
        changes = changed_meters(old.meters, new.meters)
        if changes:
            return ConfigError(new.source, changes)
        if self._on_reload is not None:
            try:
                self._on_reload(old, new)
            except ConfigError as error:
                return error
            except TallygateError as error:
                return ConfigError(new.source, [f"cannot be applied: {error}"])
            except Exception as error:
                _log.exception("applying %s failed", self._path)
                reason = f"{type(error).__name__}: {error}"
                return ConfigError(new.source, [f"cannot be applied: {reason}"])
        self.current = new
        return None
