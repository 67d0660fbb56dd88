"""What a header block of HTTP/2 asks (RFC 9113 section 8), as strictly as HTTP/1.1 is read.

A request leaves for its upstream as HTTP/1.1: whatever could mean something else there than it
does here is refused. A block that is malformed costs its own stream, never the connection.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from gateway.http.message import Header, Request
from gateway.http.target import TargetError, parse_target

if TYPE_CHECKING:
    from gateway.http.server import Limits

# Those that llhttp knows, so that a method means the same on every protocol.
METHODS: Final = frozenset(
    b"DELETE GET HEAD POST PUT CONNECT OPTIONS TRACE COPY LOCK MKCOL MOVE PROPFIND PROPPATCH SEARCH"
    b" UNLOCK BIND REBIND UNBIND ACL REPORT MKACTIVITY CHECKOUT MERGE M-SEARCH NOTIFY SUBSCRIBE"
    b" UNSUBSCRIBE PATCH PURGE MKCALENDAR LINK UNLINK SOURCE QUERY".split()
)

_PSEUDO: Final = frozenset((b":method", b":scheme", b":path", b":authority"))
# Section 8.2.2: they speak of a connection, and HTTP/2 has its own ways to.
CONNECTION_FIELDS: Final = frozenset(
    (b"connection", b"keep-alive", b"proxy-connection", b"transfer-encoding", b"upgrade")
)
_NOTED: Final = CONNECTION_FIELDS | {b"cookie", b"content-length", b"expect", b"host", b"te"}

_NAME_BYTES: Final = b"!#$%&'*+-.^_`|~0123456789abcdefghijklmnopqrstuvwxyz"
_VALUE_BYTES: Final = bytes((9, *range(32, 127), *range(128, 256)))
_PATH_BYTES: Final = bytes((*range(33, 35), *range(36, 127), *range(128, 256)))
_AUTHORITY_BYTES: Final = bytes(byte for byte in range(33, 127) if byte not in b'"#/<>?@\\^`{|}')


class Refused(Exception):
    """The request cannot be served: how to answer it."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        self.status = status
        self.code = code
        self.detail = detail


def _malformed(detail: str) -> Refused:
    return Refused(400, "bad-request", detail)


class Head:
    """A request and what its head says to this hop: whether the client waits for 100 Continue,
    and whether it calls by gRPC.
    """

    __slots__ = ("expects", "grpc", "request")

    def __init__(self, request: Request, expects: bool, grpc: bool) -> None:
        self.request = request
        self.expects = expects
        self.grpc = grpc


def read_head(
    block: Iterable[Header], *, ended: bool, limits: Limits, scheme: str, peer: str
) -> Head:
    """The request in a header block; `ended` when no body follows it.

    Raises:
        Refused: it is malformed, or more than is served.
    """
    pseudo: dict[bytes, bytes] = {}
    headers: list[Header] = []
    size = 0
    for name, value in block:
        size += len(name) + len(value) + 4  # as it would be on a line of HTTP/1.1
        if name[:1] == b":":
            if headers or name in pseudo or name not in _PSEUDO:
                raise _pseudo_refused(name)
            pseudo[name] = value
        else:
            headers.append((name, value))
    if size > limits.head:
        raise Refused(431, "header-too-large", "The header fields are too large.")
    if len(headers) > limits.fields:
        raise Refused(431, "too-many-fields", f"There are over {limits.fields} header fields.")
    check_fields(headers)
    method = pseudo.get(b":method", b"")
    path = pseudo.get(b":path", b"")
    if method == b"CONNECT":
        raise Refused(501, "bad-target", "This is no forward proxy: CONNECT is not served.")
    if not method or not path or pseudo.get(b":scheme") not in (b"http", b"https"):
        raise _malformed("A request has a :method, a :scheme of http or https, and a :path.")
    if method not in METHODS:
        raise Refused(501, "method-unknown", "The method is none that is known here.")
    if len(path) > limits.target:
        raise Refused(414, "target-too-long", f"The URL is longer than {limits.target} bytes.")
    if path[:1] != b"/" and path != b"*":
        raise Refused(400, "bad-target", "The request target is no path; send an absolute path.")
    if path.translate(None, _PATH_BYTES):
        raise Refused(400, "bad-target", "The :path has bytes that no URL has.")
    noted = _Noted(pseudo.get(b":authority"))
    headers = [pair for pair in headers if pair[0] not in _NOTED or noted.keep(*pair)]
    noted.finish(headers)
    try:
        target = parse_target(method.decode(), path, noted.host or b"")
    except TargetError as error:
        raise Refused(error.status, "bad-target", str(error)) from None
    length = 0
    if not ended:
        length = -1 if noted.length is None else noted.length
    elif noted.length:
        raise _malformed("A body was announced and none was sent.")
    request = Request(
        method.decode(),
        target,
        headers,
        version="2",
        scheme=scheme,
        peer=peer,
        body_length=length,
    )
    return Head(request, noted.expects and not ended, _is_grpc(method, headers))


def read_trailers(block: Iterable[Header], limits: Limits) -> list[Header]:
    """The trailer fields in a header block.

    Raises:
        Refused: they are malformed, or too many.
    """
    trailers = [(name, value) for name, value in block]
    if len(trailers) > limits.fields:
        raise Refused(431, "too-many-fields", "There are too many trailer fields.")
    check_fields(trailers)
    if any(name in CONNECTION_FIELDS for name, _ in trailers):
        raise _malformed("A trailer field speaks of a connection.")
    return trailers


def check_fields(headers: list[Header]) -> None:
    """Names are lower-case tokens; no value can end its field or its line.

    Raises:
        Refused: one is not.
    """
    names = [name for name, _ in headers]
    values = [value for _, value in headers]
    if b"" in names or b"".join(names).translate(None, _NAME_BYTES):
        raise _malformed("The name of a header field is no lower-case token.")
    if b"".join(values).translate(None, _VALUE_BYTES):
        raise _malformed("A header field has a control character in its value.")
    for value in values:
        if value and (value[0] in b" \t" or value[-1] in b" \t"):
            raise _malformed("The value of a header field begins or ends with white space.")


class _Noted:
    """Fields that say something to this hop, as they come by."""

    __slots__ = ("_cookies", "expects", "host", "length")

    def __init__(self, authority: bytes | None) -> None:
        self.host = authority
        self.length: int | None = None
        self.expects = False
        self._cookies: list[bytes] = []
        if authority is not None and (not authority or authority.translate(None, _AUTHORITY_BYTES)):
            raise _malformed("The :authority is no host.")

    def keep(self, name: bytes, value: bytes) -> bool:
        """Whether the field is passed on as it is."""
        if name in CONNECTION_FIELDS:
            raise _malformed(f"HTTP/2 has no {name.decode()} field.")
        if name == b"cookie":
            self._cookies.append(value)
            return False
        if name == b"host":
            if self.host is not None and value.lower() != self.host.lower():
                raise _malformed("Host and :authority name different hosts.")
            self.host = value
            return False
        if name == b"te":
            if value.lower() != b"trailers":
                raise _malformed("Nothing but trailers can be asked for with TE.")
        elif name == b"expect":
            if value.lower() != b"100-continue":
                raise Refused(
                    417, "expectation-failed", "Nothing but 100-continue can be expected."
                )
            self.expects = True
        elif name == b"content-length":
            # The library compares it with the body, and refuses what is no number.
            if self.length is not None:
                raise _malformed("There is more than one Content-Length.")
            self.length = int(value)
        return True

    def finish(self, headers: list[Header]) -> None:
        if self.host is None:
            raise _malformed("A request has to name its host: send :authority.")
        headers.insert(0, (b"host", self.host))
        if self._cookies:
            # Section 8.2.3: split for compression, one field for everybody else.
            headers.append((b"cookie", b"; ".join(self._cookies)))


def _is_grpc(method: bytes, headers: list[Header]) -> bool:
    """gRPC itself, not gRPC-Web, which is HTTP like any other."""
    if method != b"POST":
        return False
    for name, value in headers:
        if name == b"content-type":
            kind = value.partition(b";")[0].strip().lower()
            return kind == b"application/grpc" or kind.startswith(b"application/grpc+")
    return False


def _pseudo_refused(name: bytes) -> Refused:
    if name == b":protocol":
        return Refused(501, "bad-target", "Extended CONNECT is not served.")
    return _malformed("The pseudo-header fields are not those of a request.")
