"""What the heads of requests and responses share: hop-by-hop fields, targets, byte checks.

A header is a pair of bytes, the name in lower case.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple
from urllib.parse import urlsplit

from gateway.http.errors import BadRequest
from gateway.http.message import Header

# RFC 9110 section 7.6.1, with the older names that RFC 2616 listed: meant for one connection only.
HOP_BY_HOP: Final = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authentication-info",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    )
)

# Of a response: never passed on as they come, or of interest by their presence.
RESPONSE_SPECIAL: Final = HOP_BY_HOP | {b"content-length", b"server"}

# Fields that `Connection` may not remove: they carry framing and routing, so naming them would let
# a sender change what the next hop reads.
_NOT_REMOVABLE: Final = frozenset((b"host", b"content-length", b"content-type", b"authorization"))

_TOKEN: Final = frozenset(
    b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
)
_VALUE_FORBIDDEN: Final = frozenset(range(32)) - {9} | {127}


class Target(NamedTuple):
    """One address of an upstream. `authority` is sent as Host; `base` is put before each path."""

    host: str
    port: int
    authority: bytes
    base: bytes


def parse_target(url: str) -> Target:
    """A target from `http://host[:port][/base]`.

    Raises:
        ValueError: not plain http, or with user, query or fragment.
    """
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        raise ValueError(f"{url!r}: an upstream URL looks like http://host:port")
    if parts.username is not None or parts.query or parts.fragment:
        raise ValueError(f"{url!r}: an upstream URL has no user, query or fragment")
    port = parts.port or 80
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    authority = host if port == 80 else f"{host}:{port}"
    base = parts.path.rstrip("/").encode("ascii")
    check_header(b"host", authority.encode("idna" if not authority.isascii() else "ascii"))
    return Target(parts.hostname, port, authority.encode("ascii"), base)


def connection_tokens(value: bytes) -> tuple[bytes, ...]:
    """The options of a Connection field, lower case."""
    return tuple(
        token
        for token in (part.strip().lower() for part in value.split(b","))
        if token and token not in _NOT_REMOVABLE
    )


def check_header(name: bytes, value: bytes) -> None:
    """Refuse what could end the field or the head early.

    Raises:
        BadRequest: the name is no token, or the value has a control character.
    """
    if not name or not _TOKEN.issuperset(name):
        raise BadRequest(f"header name {name!r} is not a token")
    if not _VALUE_FORBIDDEN.isdisjoint(value):
        raise BadRequest(f"header {name.decode()} has a control character in its value")


def check_headers(headers: Iterable[Header]) -> None:
    """`check_header` for all; for headers made of configured text, once when they are compiled."""
    for name, value in headers:
        check_header(name, value)
