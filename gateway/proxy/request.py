"""The request as the upstream gets it: its path and its header fields, as bytes.

A `RequestRules` is compiled once per route. The path's percent-encoding is passed on byte for byte:
what a router decodes to match is never what is forwarded.

Of an absolute target (`GET http://a/b`) the path alone arrives here; its authority was that of
Host. `/a?` and `/a` leave alike, as `/a`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from core.rules import UNLIMITED
from core.secrets import KEY_START
from gateway.forwarded import TrustedProxies, forwarded_nodes
from gateway.http.errors import BadRequest, PayloadTooLarge
from gateway.http.message import Header, Request
from gateway.proxy.headers import HOP_BY_HOP, connection_tokens
from gateway.proxy.rewrite import Facts, HeaderEdits
from gateway.proxy.target import Target

_FORWARDED: Final = frozenset(
    (
        b"forwarded",
        b"x-forwarded-for",
        b"x-forwarded-host",
        b"x-forwarded-port",
        b"x-forwarded-prefix",
        b"x-forwarded-proto",
        b"x-forwarded-scheme",
        b"x-forwarded-server",
        b"x-forwarded-ssl",
        # Not of the family by name, but upstreams believe it just the same.
        b"x-real-ip",
    )
)
# Fields that say something to this hop, or are rewritten.
_READ: Final = _FORWARDED | {
    b"host",
    b"connection",
    b"content-length",
    b"transfer-encoding",
    b"x-request-id",
}
# `expect` is answered here: 100 is sent when the body is first asked for.
_DROPPED: Final = (HOP_BY_HOP | {b"expect", b"http2-settings"}) - _READ

_IDENTITY: Final = b"accept-encoding: identity\r\n"

# What a client may not say after its body, where some upstreams would take it for a header.
NOT_IN_TRAILERS: Final = _READ | _DROPPED | {b"cookie", b"x-api-key"}

_KEY_START: Final = KEY_START.encode()

# RFC 3986's reg-name or IP-literal, and port. No comma: X-Forwarded-Host is read as a list.
_HOST: Final = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+;=%-]+|\[[0-9A-Fa-fv:.]+\])(?::[0-9]*)?\Z")

_PROTO: Final = {
    "http": b"x-forwarded-proto: http\r\n",
    "https": b"x-forwarded-proto: https\r\n",
}

# A request id longer than this is replaced: it ends up in every log line on the way.
MAX_REQUEST_ID: Final = 128


class RequestHead(NamedTuple):
    """A compiled request. `body_length` is -1 when the length is unknown (chunked), 0 for none.

    `host` is sent instead of the target's; `max_body` still has to be enforced where the length is
    unknown.
    """

    method: bytes
    path: bytes
    fields: bytes
    body_length: int
    request_id: bytes
    host: bytes = b""
    max_body: int = UNLIMITED
    upgrade: bool = False  # the answer may be 101

    def to(self, target: Target) -> bytes:
        """The head as sent to `target`, with the empty line that ends it."""
        return b"%b %b%b HTTP/1.1\r\nhost: %b\r\n%b" % (
            self.method,
            target.base if self.path != b"*" else b"",
            self.path,
            self.host or target.authority,
            self.fields,
        )


class RequestRules:
    """How requests of one route are rewritten.

    Args:
        path: what becomes of the path; None keeps it.
        drop_headers: names never forwarded, such as that of the field the API key was read from.
        key_headers: further names a key may be read from: a field of such a name is forwarded
            unless it holds a key, so that the upstream's own credentials pass beside ours.
        drop_query: query parameters (decoded names) never forwarded.
        key_query: query parameters forwarded unless they hold a key.
        trusted: peers whose X-Forwarded-* and Forwarded fields are believed and continued.
        identity: the upstream is asked for bodies without compression, which are read here.
        edits: fields that go and that come, as the route says.
        route: its name.
        host: sent as Host; empty is the target's, `preserve_host` the client's.
        max_body: bytes a body may have.
    """

    __slots__ = (
        "_drop_query",
        "_dropped",
        "_edits",
        "_host",
        "_identity",
        "_key_headers",
        "_key_query",
        "_last_host",
        "_max_body",
        "_path_edit",
        "_preserve_host",
        "_route",
        "_special",
        "_trusted",
    )

    def __init__(
        self,
        *,
        path: Callable[[bytes], bytes] | None = None,
        drop_headers: Collection[bytes] = (),
        key_headers: Collection[bytes] = (),
        drop_query: Collection[str] = (),
        key_query: Collection[str] = (),
        trusted: TrustedProxies | None = None,
        edits: HeaderEdits | None = None,
        route: str = "",
        host: str = "",
        preserve_host: bool = False,
        max_body: int = UNLIMITED,
        identity: bool = False,
    ) -> None:
        if identity:
            drop_headers = (*drop_headers, b"accept-encoding")
        self._identity = [_IDENTITY] if identity else []
        self._path_edit = path
        self._edits = edits
        self._route = route
        self._host = host.encode()
        self._preserve_host = preserve_host
        self._max_body = max_body
        self._dropped = _DROPPED | frozenset(name.lower() for name in drop_headers)
        if edits is not None:
            self._dropped |= edits.dropped
        self._key_headers = frozenset(name.lower() for name in key_headers) - self._dropped
        self._special = _READ | self._dropped | self._key_headers
        self._drop_query = frozenset(name.encode() for name in drop_query)
        self._key_query = frozenset(name.encode() for name in key_query)
        self._trusted = trusted or TrustedProxies(())
        self._last_host = b""  # the last one found good: checking costs more than comparing

    def head(
        self,
        request: Request,
        request_id: bytes = b"",
        plan: str = "",
        subscription: str = "",
    ) -> RequestHead:
        """Compile the head of one request.

        `request_id` is sent as X-Request-Id unless the client sent a usable one, which is kept.
        `plan` and `subscription` are for fields that name them.

        Raises:
            BadRequest: contradictory framing, not exactly one Host (RFC 9112 section 3.2), or
                bytes that could end a field early.
            PayloadTooLarge: it announces more of a body than the route allows.
        """
        lines = self._identity.copy()
        special: list[Header] = []
        rules = self._special
        for pair in request.headers:
            if pair[0] in rules:
                special.append(pair)
            else:
                lines.append(b"%b: %b\r\n" % pair)
        host: bytes | None = None
        length = b""
        chunked = False
        dropped = self._dropped
        named: tuple[bytes, ...] = ()
        forwarded: list[Header] = []
        for name, value in special:
            if name in dropped:
                continue
            if name == b"host":
                if host is not None:
                    raise BadRequest("more than one Host")
                if value != self._last_host:
                    self._check_host(value)
                host = value
            elif name == b"content-length":
                if length and length != value:
                    raise BadRequest("contradictory content lengths")
                length = value
            elif name == b"transfer-encoding":
                if chunked or value.strip().lower() != b"chunked":
                    raise BadRequest("the only transfer encoding understood is chunked")
                chunked = True
            elif name == b"x-request-id":
                if 0 < len(value) <= MAX_REQUEST_ID and value.isascii() and b"\t" not in value:
                    request_id = value
            elif name == b"connection":
                named += connection_tokens(value)
            elif name in _FORWARDED:
                forwarded.append((name, value))
            elif name in self._key_headers and _KEY_START not in value:
                lines.append(b"%b: %b\r\n" % (name, value))
        if named:
            gone = frozenset(named)  # thousands fit into a head
            lines = [line for line in lines if line.partition(b":")[0] not in gone]
        if not host:
            if request.version != "1.0":
                raise BadRequest("a request has to name its Host")
            host = b""
        peer = request.peer
        if forwarded and self._trusted.trusts(peer):
            lines += continued(forwarded, peer, host, request.scheme)
        else:
            lines += (
                b"x-forwarded-for: %b\r\n" % peer.encode("ascii"),
                _PROTO[request.scheme],
                b"x-forwarded-host: %b\r\n" % host,
            )
        if request_id:
            lines.append(b"x-request-id: %b\r\n" % request_id)
        if self._edits is not None:
            facts = Facts(request, request_id, self._trusted, self._route, plan, subscription)
            lines += [b"%b: %b\r\n" % pair for pair in self._edits.fields.of(facts)]
        body_length = 0
        if request.body_length < 0:
            chunked = True  # over HTTP/2 no field says so
        if length or chunked:
            body_length = _framing(lines, length, chunked)
            if body_length > self._max_body:
                raise PayloadTooLarge(f"a body of {body_length} bytes")
        fields = b"".join(lines)
        # Each line brought one CR and one LF: any other came from inside a value.
        if fields.count(b"\n") != len(lines) or fields.count(b"\r") != len(lines):
            raise BadRequest("a header field contains a line break")
        method, path, fields = request.method.encode("ascii"), self._path(request), fields + b"\r\n"
        if not body_length and not self._preserve_host:
            return RequestHead(method, path, fields, 0, request_id, self._host)
        to = host if self._preserve_host else self._host
        return RequestHead(method, path, fields, body_length, request_id, to, self._max_body)

    def _check_host(self, host: bytes) -> None:
        if not _HOST.match(host):
            raise BadRequest("the value of Host is no host")
        self._last_host = host

    def _path(self, request: Request) -> bytes:
        raw = request.raw_path
        if self._path_edit is not None:
            raw = self._path_edit(raw)
        query = request.query
        if query and (self._drop_query or self._key_query):
            query = drop_parameters(query, self._drop_query, self._key_query)
        return b"%b?%b" % (raw, query) if query else raw


def _framing(lines: list[bytes], length: bytes, chunked: bool) -> int:
    """Append the field that frames the body; returns its length, -1 for chunked."""
    if chunked:
        if length:
            raise BadRequest("both Content-Length and Transfer-Encoding")
        lines.append(b"transfer-encoding: chunked\r\n")
        return -1
    if not length.isdigit() or len(length) > 18:
        raise BadRequest("invalid content length")
    lines.append(b"content-length: %b\r\n" % length)
    return int(length)


def continued(forwarded: list[Header], peer: str, host: bytes, scheme: str) -> list[bytes]:
    """The forwarding lines when a trusted proxy sent some: its chain, with the peer appended.

    X-Forwarded-Proto and -Host describe the first hop, so the proxy's values win over ours. Where
    it sends only Forwarded (RFC 7239), X-Forwarded-For is made from that; Forwarded itself is
    continued where it is used, never introduced.
    """
    chain: dict[bytes, list[bytes]] = {}
    for name, value in forwarded:
        chain.setdefault(name, []).append(value)
    nodes = chain.get(b"forwarded")
    if b"x-forwarded-for" not in chain:
        chain[b"x-forwarded-for"] = forwarded_nodes(nodes) if nodes else []
    chain[b"x-forwarded-for"].append(peer.encode("ascii"))
    chain.setdefault(b"x-forwarded-proto", [scheme.encode("ascii")])
    chain.setdefault(b"x-forwarded-host", [host])
    if nodes:
        node = f'"[{peer}]"' if ":" in peer else peer
        nodes.append(f"for={node};proto={scheme}".encode("ascii"))
    return [b"%b: %b\r\n" % (name, b", ".join(values)) for name, values in chain.items()]


def drop_parameters(
    query: bytes, names: frozenset[bytes], key_names: frozenset[bytes] = frozenset()
) -> bytes:
    """`query` without the parameters of these (decoded) names; all else byte for byte.

    Those in `key_names` go only when their value holds a key of ours.
    """
    kept = []
    for part in query.split(b"&"):
        name, _, value = part.partition(b"=")
        decoded = unquote_to_bytes(name.replace(b"+", b" "))
        if decoded in names or (decoded in key_names and _KEY_START in unquote_to_bytes(value)):
            continue
        kept.append(part)
    return b"&".join(kept)
