"""Find the API key in a request: in one pass over its headers, then in the query string."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from urllib.parse import unquote_to_bytes

from core.secrets import KEY_START

_AUTHORIZATION = b"authorization"
_BEARER = b"bearer "
_KEY_START = KEY_START.encode()

Headers = Iterable[tuple[bytes, bytes]]


class Source:
    """Where a key was found, so that it can be taken out before the request goes on.

    Exactly one is set: `header`, a lower-case name, or `query`, the decoded name of a
    parameter.
    """

    __slots__ = ("header", "query")

    def __init__(self, header: bytes | None = None, query: bytes | None = None) -> None:
        self.header = header
        self.query = query

    def __repr__(self) -> str:
        return f"Source(header={self.header!r}, query={self.query!r})"


Found = tuple[bytes | None, Source | None]
_NOTHING: Found = (None, None)


class KeyExtractor:
    """Compiled from `gateway.key`: header names and a query parameter to look at.

    `authorization` means its Bearer credentials. A value that starts like one of our keys wins
    over one that does not, so a caller may send the upstream's own Bearer token beside a key in
    `x-api-key`; among equals the earlier header of the request wins.
    """

    __slots__ = ("_query", "_query_source", "_sources")

    def __init__(
        self,
        headers: Sequence[str] = ("authorization", "x-api-key"),
        query: str | None = None,
    ) -> None:
        self._sources = {
            name: Source(header=name) for name in (text.lower().encode() for text in headers)
        }
        self._query = query.encode() if query else b""
        self._query_source = Source(query=self._query)

    def extract(self, headers: Headers, query_string: bytes) -> Found:
        """The key and its source; `(None, None)` when the request carries none.

        `headers` are pairs of lower-case name and value, both bytes.
        """
        sources = self._sources
        other = _NOTHING
        for name, value in headers:
            if name in sources:
                if name != _AUTHORIZATION:
                    key = value.strip()
                elif value[:7].lower() == _BEARER:
                    key = value[7:].strip()
                else:
                    continue
                if key.startswith(_KEY_START):
                    return key, sources[name]
                if key and other is _NOTHING:
                    other = (key, sources[name])
        if self._query and query_string:
            key = self._from_query(query_string)
            if key.startswith(_KEY_START) or (key and other is _NOTHING):
                return key, self._query_source
        return other

    def _from_query(self, query_string: bytes) -> bytes:
        for part in query_string.split(b"&"):
            name, _, value = part.partition(b"=")
            if name != self._query:
                if b"%" not in name and b"+" not in name:
                    continue
                if unquote_to_bytes(name.replace(b"+", b" ")) != self._query:
                    continue
            return unquote_to_bytes(value) if b"%" in value else value
        return b""
