"""A request as its client sent it, and what all answers share.

A header is a pair of bytes, the name in lower case.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Final
from urllib.parse import unquote_to_bytes

Header = tuple[bytes, bytes]

# Bytes of a path that mean the same to everybody, wherever they stand. A dot may make a segment
# that is none; all others that are missing here are looked at one by one (gateway/paths.py).
PLAIN: Final = bytes(byte for byte in range(0x21, 0x7F) if byte not in b"%\\;#?.")

# Statuses that never have a body (RFC 9110 sections 15.3.5 and 15.4.5).
NO_BODY: Final = frozenset((204, 304))

# By status; a phrase says nothing that the number does not, so unknown ones have none.
STATUS_LINES: Final[dict[int, bytes]] = {
    status: b"HTTP/1.1 %d \r\n" % status for status in range(100, 600)
} | {
    status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode())
    for status in HTTPStatus
}


class Request:
    """What a client asked.

    Attributes:
        method: as sent; one that llhttp knows.
        raw_path: as sent, without the query; of an absolute target, its path. `*` for OPTIONS *.
        odd: those bytes of it that are not `PLAIN`; nearly always none.
        path: `raw_path` percent-decoded; bytes that are no UTF-8 become U+FFFD.
        query: as sent, without the question mark.
        headers: in the order they came, fields of one name apart.
        version: "1.0", "1.1" or "2".
        scheme: "http" or "https", as the client spoke to us.
        peer: IP address of the other end of the connection, as text.
        body_length: 0 for none, -1 for one of unknown length.
    """

    __slots__ = (
        "body_length",
        "headers",
        "method",
        "odd",
        "path",
        "peer",
        "query",
        "raw_path",
        "scheme",
        "version",
    )

    def __init__(
        self,
        method: str,
        target: bytes,
        headers: list[Header],
        *,
        version: str = "1.1",
        scheme: str = "http",
        peer: str = "127.0.0.1",
        body_length: int = 0,
    ) -> None:
        self.method = method
        raw, _, self.query = target.partition(b"?")
        self.raw_path = raw
        self.odd = odd = raw.translate(None, PLAIN)
        if odd and b"%" in odd:
            raw = unquote_to_bytes(raw)
        self.path = raw.decode("utf-8", "replace")
        self.headers = headers
        self.version = version
        self.scheme = scheme
        self.peer = peer
        self.body_length = body_length

    def header(self, name: bytes) -> bytes | None:
        """The first field of this (lower-case) name."""
        for key, value in self.headers:
            if key == name:
                return value
        return None
