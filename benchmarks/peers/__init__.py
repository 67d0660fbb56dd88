"""What Tallygate is compared with: each peer is a proxy in front of the same upstream.

A peer serves every path of the upstream (`/1k`, `/64k`), admitting it, and the same below
`/rejected`, where its limit is used up. Envoy as a bare proxy has no limit.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.stack import Stack

SIZES = {1: "/1k", 64: "/64k"}  # KiB of the answer -> path


@dataclass(frozen=True)
class Target:
    """Where a client sends its requests to; keys in turn, each connection from another one on."""

    port: int
    path: str
    keys: tuple[str, ...] = ()


@dataclass
class Peer:
    """A running proxy: what to ask it, and the processes whose CPU time and memory count."""

    name: str
    title: str
    port: int
    pids: list[int]
    admitted: tuple[str, ...] = ()
    rejected: tuple[str, ...] = ()
    rejected_prefix: str = ""
    limits: bool = True  # it can reject
    uses_redis: bool = True
    version: str = ""

    def target(self, *, rejected: bool, size: int, keys: int | None = None) -> Target:
        """`keys`: as many customers at most."""
        found = (self.rejected if rejected else self.admitted)[:keys]
        prefix = self.rejected_prefix if rejected else ""
        return Target(self.port, prefix + SIZES[size], found)


@dataclass(frozen=True)
class Site:
    """What a peer is started with."""

    stack: Stack
    folder: Path
    cleanup: ExitStack = field(repr=False)

    @property
    def redis(self) -> tuple[int, str]:
        """Port and password of the Redis server that all share."""
        parts = urlsplit(self.stack.valkey_url)
        return parts.port or 6379, parts.password or ""

    @property
    def keys(self) -> tuple[str, ...]:
        """The same customers for everyone: what is not Tallygate takes any key."""
        return tuple(self.stack.keys["four_limits"])


Start = Callable[[Site], Peer]
