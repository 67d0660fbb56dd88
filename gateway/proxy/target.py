"""Targets: the addresses of an upstream, and what the pool knows about each.

A `Target` is what a URL says. An `Endpoint` is one target in use: its connections and whether
requests go there. With `dns`, one URL has an endpoint for each address of its name.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple
from urllib.parse import urlsplit

from gateway.proxy.headers import check_header

if TYPE_CHECKING:
    from gateway.proxy.connection import UpstreamConnection

_PORTS: Final = {"http": 80, "https": 443}


class Target(NamedTuple):
    """One address of an upstream. `authority` is sent as Host; `base` is put before each path.

    `host` is what is connected to, a name or an address; `socket` the path of a unix socket
    instead. `server_name` is asked for and checked on TLS, and empty without TLS.
    """

    host: str
    port: int
    authority: bytes
    base: bytes
    server_name: str = ""
    socket: str = ""

    @property
    def label(self) -> str:
        """For people: where requests go."""
        if self.socket:
            return self.socket
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_target(url: str, server_name: str = "") -> Target:
    """A target from `http://host[:port][/base]`, `https://…` or `unix:///path`.

    `server_name` replaces the URL's host in TLS.

    Raises:
        ValueError: another scheme, or with user, query or fragment.
    """
    parts = urlsplit(url)
    if parts.scheme == "unix" and parts.path.startswith("/") and not parts.netloc:
        # There is no name to send: what curl and others do.
        return Target("", 0, b"localhost", b"", "", url[len("unix://") :])
    if parts.scheme not in _PORTS or not parts.hostname:
        raise ValueError(f"{url!r}: an upstream URL looks like http://host:port")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(f"{url!r}: an upstream URL has no user, query or fragment")
    port = parts.port or _PORTS[parts.scheme]
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    authority = host if port == _PORTS[parts.scheme] else f"{host}:{port}"
    base = parts.path.rstrip("/").encode("ascii")
    check_header(b"host", authority.encode("idna" if not authority.isascii() else "ascii"))
    name = (server_name or parts.hostname) if parts.scheme == "https" else ""
    return Target(parts.hostname, port, authority.encode("ascii"), base, name)


class Endpoint:
    """One target in use.

    Attributes:
        url: as the configuration has it; the label of its metrics.
        idle: connections ready for a request, most recently used last.
        conns: all connections, also those in use.
        opening: connections being opened.
        live: requests go here. Out of the rotation when not `healthy`, or `ejected`.
    """

    __slots__ = (
        "back_at",
        "conns",
        "current",
        "ejected",
        "ejections",
        "failures",
        "healthy",
        "idle",
        "live",
        "opening",
        "out_s",
        "probation",
        "target",
        "url",
        "weight",
    )

    def __init__(self, url: str, target: Target, weight: int = 1) -> None:
        self.url = url
        self.target = target
        self.weight = weight
        self.idle: list[UpstreamConnection] = []
        self.conns: set[UpstreamConnection] = set()
        self.opening = 0
        self.live = True
        self.healthy = True
        self.ejected = False
        self.failures = 0  # in a row
        self.ejections = 0  # in a row, without enough of a good time between them
        self.probation = False  # back from an ejection, and nothing has succeeded yet
        self.back_at = 0.0
        self.out_s = 0.0
        self.current = 0  # of the weighted turn

    @property
    def usable(self) -> bool:
        return self.healthy and not self.ejected

    @property
    def load(self) -> int:
        """Connections in use or being opened for a request."""
        return len(self.conns) - len(self.idle) + self.opening

    def __repr__(self) -> str:
        return f"Endpoint({self.target.label})"
