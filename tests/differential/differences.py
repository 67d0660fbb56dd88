"""What the gateway changes on purpose, and the comparison that lets nothing else pass.

Each row is used by `compare`; a test fails when one is never needed, and when docs/differences.md
says something else.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple
from urllib.parse import urlparse, urlunparse

import brotlicffi

from tests.differential.shapes import Shape
from tests.support.http1 import Answer

Pairs = list[tuple[bytes, bytes]]


class Difference(NamedTuple):
    """`side` is `request` (as the application sees it) or `answer` (as the client does)."""

    key: str
    side: str
    field: str
    what: str
    why: str


TABLE = (
    Difference(
        "key", "request", "the API key's field", "removed",
        "a customer's secret is none of the application's business; `forward_key: true` keeps it",
    ),
    Difference(
        "host", "request", "Host", "the upstream's own authority",
        "routing is ours; what the client wrote is in X-Forwarded-Host",
    ),
    Difference(
        "forwarded", "request",
        "X-Forwarded-For, X-Forwarded-Proto, X-Forwarded-Host", "set to what is true",
        "a client's own claims are replaced; those of a trusted proxy are continued",
    ),
    Difference(
        "claims", "request",
        "Forwarded, X-Real-IP, X-Forwarded-Port, -Prefix, -Scheme, -Server, -Ssl", "removed",
        "claims of an untrusted client about who it is",
    ),
    Difference(
        "request-id", "request", "X-Request-Id", "added, or replaced if it is unusable",
        "one id for client, log and application; a client's own of up to 128 characters is kept",
    ),
    Difference(
        "request-hop", "request",
        "Connection, Keep-Alive, TE, Trailer, Upgrade, Proxy-*, and what Connection names",
        "removed",
        "they speak of one connection (RFC 9110 section 7.6.1)",
    ),
    Difference(
        "expect", "request", "Expect", "removed",
        "100-continue is answered by the gateway, when the body is wanted",
    ),
    Difference(
        "path", "request",
        "a path with dot segments, `//` at its start, a backslash, a control character, invalid "
        "escapes or invalid UTF-8", "refused with 400",
        "it could be charged as one path and served as another (docs/routes.md)",
    ),
    Difference(
        "limits", "answer",
        "RateLimit, RateLimit-Policy, X-RateLimit-Limit, -Remaining, -Reset",
        "added; an application's own are removed", "they tell what is left of the customer's plan",
    ),
    Difference(
        "answer-id", "answer", "X-Request-Id", "added; an application's own is removed",
        "the same id as in the request upstream",
    ),
    Difference(
        "answer-hop", "answer",
        "Connection, Keep-Alive, TE, Trailer, Upgrade, Proxy-*, and what Connection names",
        "removed",
        "they speak of one connection (RFC 9110 section 7.6.1)",
    ),
    Difference(
        "framing", "answer",
        "Content-Length, Transfer-Encoding", "a length in place of chunks, or chunks in place of "
        "the connection's end; a Content-Length that was given stays",
        "the body is the same; framing is of one connection",
    ),
)  # fmt: skip

KEY_FIELD = "X-Api-Key"
_LIMITS = re.compile(rb"ratelimit(-policy)?|x-ratelimit-(limit|remaining|reset)")
_HOP = frozenset(
    (
        *(b"connection", b"keep-alive", b"te", b"trailer", b"upgrade", b"proxy-authenticate"),
        *(b"proxy-authentication-info", b"proxy-authorization", b"proxy-connection"),
    )
)
_FRAMING = frozenset((b"content-length", b"transfer-encoding"))
_FORWARDED = ("X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host")
_CLAIMS = frozenset(
    (
        *("Forwarded", "X-Real-Ip", "X-Forwarded-Port", "X-Forwarded-Prefix"),
        *("X-Forwarded-Scheme", "X-Forwarded-Server", "X-Forwarded-Ssl"),
    )
)


class Comparison:
    """Compares pairs of answers and remembers which rows of the table were needed."""

    def __init__(self, direct_authority: str, gateway_authority: str) -> None:
        self.used: set[str] = set()
        self._direct = direct_authority
        self._gateway = gateway_authority

    def compare(self, shape: Shape, direct: Answer, through: Answer) -> None:
        """Fails on any difference that is not in the table."""
        assert through.status == direct.status
        self._framing(direct, through)
        assert through.trailers == direct.trailers
        same = self._bodies(shape, direct, through)
        if same and direct.get("content-length") and b"content-length" not in shape.volatile:
            assert through.get("content-length") == direct.get("content-length")
        skip = shape.volatile
        assert self._answer(through.fields, skip, ours=True) == self._answer(
            direct.fields, skip, ours=False
        )

    def _framing(self, direct: Answer, through: Answer) -> None:
        if self._framed(through) != self._framed(direct):
            self.used.add("framing")
        if through.framing != direct.framing:
            assert direct.framing in ("chunked", "close")
            assert through.framing in ("chunked", "length")

    @staticmethod
    def _framed(answer: Answer) -> Pairs:
        return [pair for pair in answer.fields if pair[0] in _FRAMING]

    def _answer(self, pairs: Pairs, skip: frozenset[bytes], ours: bool) -> Pairs:
        named = {
            token.strip().lower()
            for name, value in pairs
            if name == b"connection"
            for token in value.split(b",")
        }
        left: Pairs = []
        for name, value in pairs:
            if name in skip:
                value = b"(differs)"
            if name == b"date":
                assert re.fullmatch(rb"\w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT", value)
                value = b"(a date)"
            if name in _FRAMING:
                continue  # compared by itself: see above
            if _LIMITS.fullmatch(name):
                self.used.add("limits")
                assert not ours or value != b"theirs"
            elif name == b"x-request-id":
                self.used.add("answer-id")
                assert not ours or value != b"theirs"
            elif not ours and (name in _HOP or name in named):
                self.used.add("answer-hop")
            elif name != b"connection":
                left.append((name, value))
        return left

    def _bodies(self, shape: Shape, direct: Answer, through: Answer) -> bool:
        """Compares; False when they differ as intended, so that their lengths may as well."""
        if through.body == direct.body:
            return True
        seen, wanted = _echoes(through.body), _echoes(direct.body)
        assert seen, (direct.body[:300], through.body[:300])
        assert [self._normal(echo, shape, ours=True) for echo in seen] == [
            self._normal(echo, shape, ours=False) for echo in wanted
        ]
        return False

    def _normal(self, echo: dict[str, Any], shape: Shape, ours: bool) -> dict[str, Any]:
        fields: dict[str, str] = dict(echo.get("headers", {}))
        sent = {name.title() for name, _ in shape.fields}
        named = {
            token.strip().title()
            for name, value in shape.fields
            if name.lower() == "connection"
            for token in value.decode("latin-1").split(",")
        }
        if ours:
            self._check_ours(fields)
        for name in list(fields):
            if name in _FORWARDED:
                self._drop(fields, name, "forwarded")
            elif name in _CLAIMS:
                assert not ours, name
                self._drop(fields, name, "claims")
            elif name == "X-Request-Id":
                self._request_id(fields, kept="X-Request-Id" in sent)
            elif name.lower().encode() in _HOP or name in named:
                assert not ours, name
                self._drop(fields, name, "request-hop")
            elif name == "Expect":
                assert not ours, name
                self._drop(fields, name, "expect")
        result = {name: value for name, value in echo.items() if name not in ("headers", "origin")}
        # The scheme is the client's claim when nobody replaces it; and httpbin rebuilds the URL, an
        # empty `;` or `?` lost, where there is X-Forwarded-Proto.
        if "url" in result:
            result["url"] = urlunparse(("scheme", *urlparse(result["url"])[1:]))
        result["headers"] = fields
        return result

    def _check_ours(self, fields: dict[str, str]) -> None:
        """The intended differences that every request through the gateway shows."""
        assert KEY_FIELD not in fields
        self.used.add("key")
        if "Host" in fields:
            assert fields["Host"] == self._direct
            self.used.add("host")
        if "X-Forwarded-For" in fields:
            assert fields["X-Forwarded-For"] == "127.0.0.1"
            assert fields["X-Forwarded-Proto"] == "http"
            assert fields["X-Forwarded-Host"] == self._gateway
            assert 0 < len(fields["X-Request-Id"]) <= 128

    def _request_id(self, fields: dict[str, str], kept: bool) -> None:
        value = fields["X-Request-Id"]
        if not kept or value.startswith("req_") or len(value) > 128:
            self._drop(fields, "X-Request-Id", "request-id")

    def _drop(self, fields: dict[str, str], name: str, row: str) -> None:
        self.used.add(row)
        del fields[name]


def _echoes(body: bytes) -> list[dict[str, Any]]:
    """What httpbin says of the request it saw, when that is what the body is: once or in lines."""
    if body[:2] == b"\x1f\x8b":
        body = gzip.decompress(body)
    elif body[:1] == b"\x78":
        body = zlib.decompress(body)
    elif body[:1] == b"\x1b":
        body = brotlicffi.decompress(body)
    for texts in ([body], body.splitlines()):
        with contextlib.suppress(ValueError):
            values = [json.loads(text) for text in texts]
            if all(isinstance(value, dict) and "headers" in value for value in values):
                return values
    return []


def table() -> str:
    """The rows as the Markdown table of docs/differences.md."""
    lines = ["| seen by | field | what happens | why |", "|---|---|---|---|"]
    who = {"request": "application", "answer": "client"}
    lines += [f"| {who[d.side]} | {d.field} | {d.what} | {d.why} |" for d in TABLE]
    return "\n".join(lines)


Compare = Callable[[Shape], None]
