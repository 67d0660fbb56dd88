"""The opening handshake (RFC 6455 section 4), on both sides of the gateway.

The client's key is passed on and the upstream's proof of it is checked, so both ends know that they
speak to each other. Of extensions only permessage-deflate is offered to the upstream: what others
would do to the frames is not known here, and so could not be checked.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from core.policy import WebSocket
from gateway.http.message import STATUS_LINES, Header, Request
from gateway.proxy.errors import BadUpstreamResponse
from gateway.proxy.request import RequestHead

_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
_DEFLATE: Final = b"permessage-deflate"
_KEY_BYTES: Final = 16
_SWITCH: Final = b"connection: Upgrade\r\nupgrade: websocket\r\n"


class HandshakeError(Exception):
    """Not a handshake that can be served: the status to answer with, and a sentence for it."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status = status
        self.code = code


class Handshake(NamedTuple):
    """What a client asks for. `extensions` are those that may be offered to the upstream."""

    key: bytes
    protocols: frozenset[bytes]
    extensions: bytes


def read(request: Request, rule: WebSocket) -> Handshake | None:
    """The handshake that a request is; None for one that is not, to be answered as any other.

    Raises:
        HandshakeError: it is one, and not well-formed or not wanted.
    """
    if request.method != "GET" or request.version != "1.1":
        return None
    fields: dict[bytes, list[bytes]] = {}
    for name, value in request.headers:
        if name in (b"connection", b"upgrade", b"origin") or name.startswith(b"sec-websocket-"):
            fields.setdefault(name, []).append(value)
    if b"websocket" not in _tokens(fields.get(b"upgrade", ())):
        return None
    options = _tokens(fields.get(b"connection", ()))
    if b"upgrade" not in options or b"close" in options:
        return None
    if fields.get(b"sec-websocket-version") != [b"13"]:
        raise HandshakeError(426, "websocket-version", "WebSocket version 13 is spoken here.")
    if request.body_length:
        raise HandshakeError(400, "websocket-body", "A WebSocket handshake has no body.")
    keys = fields.get(b"sec-websocket-key", [])
    if len(keys) != 1 or not _is_key(keys[0]):
        detail = "Sec-WebSocket-Key has to be 16 bytes in base64, once."
        raise HandshakeError(400, "websocket-key", detail)
    if rule.origins and any(o.lower() not in rule.origins for o in fields.get(b"origin", ())):
        detail = "WebSockets may not be opened from pages of this origin."
        raise HandshakeError(403, "origin", detail)
    offers = [
        offer.strip()
        for offer in b",".join(fields.get(b"sec-websocket-extensions", ())).split(b",")
        if _name(offer) == _DEFLATE
    ]
    return Handshake(
        keys[0],
        frozenset(_items(fields.get(b"sec-websocket-protocol", ()))),
        b", ".join(offers),
    )


def requested(head: RequestHead, shake: Handshake) -> RequestHead:
    """The head as the upstream gets it: it asks for the switch, and offers what is known here."""
    lines = [
        line
        for line in head.fields.removesuffix(b"\r\n").splitlines(keepends=True)
        if not line.startswith(b"sec-websocket-extensions:")
    ]
    if shake.extensions:
        lines.append(b"sec-websocket-extensions: %b\r\n" % shake.extensions)
    return head._replace(fields=b"%b%b\r\n" % (_SWITCH, b"".join(lines)), upgrade=True)


def agreed(headers: Iterable[Header], shake: Handshake) -> bool:
    """Whether messages may be compressed, by the headers of the upstream's 101.

    Raises:
        BadUpstreamResponse: it proves not to have understood, or takes what was not offered.
    """
    fields: dict[bytes, list[bytes]] = {}
    for name, value in headers:
        if name.startswith(b"sec-websocket-"):
            fields.setdefault(name, []).append(value)
    digest = hashlib.sha1(shake.key + _GUID, usedforsecurity=False).digest()
    if fields.get(b"sec-websocket-accept") != [base64.b64encode(digest)]:
        raise BadUpstreamResponse("101 without a fitting Sec-WebSocket-Accept")
    protocols = fields.get(b"sec-websocket-protocol", [])
    if len(protocols) > 1 or any(p.strip() not in shake.protocols for p in protocols):
        raise BadUpstreamResponse("101 with a subprotocol that was not offered")
    taken = [
        _name(part)
        for part in b",".join(fields.get(b"sec-websocket-extensions", ())).split(b",")
        if part.strip()
    ]
    if taken and (taken != [_DEFLATE] or not shake.extensions):
        raise BadUpstreamResponse("101 with an extension that was not offered")
    return bool(taken)


def answer(headers: Sequence[Header]) -> bytes:
    """The head of the 101 that the client gets; `headers` without those of one hop.

    Raises:
        BadUpstreamResponse: a field has a line break in it.
    """
    lines = [b"%b: %b\r\n" % pair for pair in headers]
    head = b"".join(lines)
    if head.count(b"\n") != len(lines) or head.count(b"\r") != len(lines):
        raise BadUpstreamResponse("a header field contains a line break")
    return b"%b%b%b\r\n" % (STATUS_LINES[101], _SWITCH, head)


def _items(values: Iterable[bytes]) -> list[bytes]:
    return [item for value in values for part in value.split(b",") if (item := part.strip())]


def _tokens(values: Iterable[bytes]) -> list[bytes]:
    return [item.lower() for item in _items(values)]


def _name(offer: bytes) -> bytes:
    return offer.partition(b";")[0].strip().lower()


def _is_key(value: bytes) -> bool:
    try:
        return len(base64.b64decode(value, validate=True)) == _KEY_BYTES
    except binascii.Error:
        return False
