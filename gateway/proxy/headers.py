"""What the heads of requests and responses share: hop-by-hop fields, byte checks.

A header is a pair of bytes, the name in lower case.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

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
