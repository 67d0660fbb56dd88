"""Cross-origin resource sharing (the Fetch standard): who may read an answer in a browser.

A preflight is answered here, without a key and without a charge: browsers send no key with it. All
other answers of the route get the fields, refusals too, as a page could otherwise not read why.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from core.rules import Cors
from gateway.http.message import Header, Request

# What a page may read of every answer, beside what the route names.
EXPOSED: Final = (
    "ratelimit",
    "ratelimit-policy",
    "retry-after",
    "x-ratelimit-limit",
    "x-ratelimit-remaining",
    "x-ratelimit-reset",
    "x-request-id",
    "x-tallygate-overage",
    "x-tallygate-warning",
)
# Of an upstream's answer: ours stand alone, or a browser would see two and refuse both.
REPLACED: Final = frozenset(
    (
        b"access-control-allow-origin",
        b"access-control-allow-credentials",
        b"access-control-allow-methods",
        b"access-control-allow-headers",
        b"access-control-expose-headers",
        b"access-control-max-age",
    )
)

_VARY: Final = (b"vary", b"origin")
_VARY_PREFLIGHT: Final = (
    b"vary",
    b"origin, access-control-request-method, access-control-request-headers",
)
_NAMES: Final = re.compile(rb"[\t ,A-Za-z0-9!#$%&'*+.^_`|~-]{1,2048}")
_LABELS: Final = re.compile(r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*")


class CorsRules:
    """Compiled once a route. `key_headers` are the fields a key may come in."""

    __slots__ = (
        "_answer",
        "_any",
        "_below",
        "_credentials",
        "_exact",
        "_headers",
        "_preflight",
    )

    def __init__(self, cors: Cors, key_headers: Sequence[str]) -> None:
        self._any = "*" in cors.origins
        self._exact = frozenset(origin for origin in cors.origins if "*" not in origin)
        # https://*.example.com: what comes before the labels, and what after them.
        self._below = tuple(
            (start, end)
            for start, star, end in (origin.partition("*") for origin in cors.origins)
            if star and end
        )
        self._credentials = cors.credentials
        credentials = [(b"access-control-allow-credentials", b"true")] if cors.credentials else []
        expose = ", ".join(dict.fromkeys((*EXPOSED, *cors.expose)))
        self._answer: list[Header] = [
            *credentials,
            (b"access-control-expose-headers", expose.encode()),
        ]
        # `*` would leave Authorization out, and means nothing with credentials: repeat what is
        # asked for instead.
        headers = cors.headers or (*key_headers, "content-type", "x-request-id")
        self._headers = b"" if "*" in headers else ", ".join(headers).encode()
        self._preflight: list[Header] = [
            *credentials,
            (b"access-control-allow-methods", ", ".join(cors.methods).encode()),
            (b"access-control-max-age", b"%d" % cors.max_age_s),
        ]

    def allowed(self, origin: bytes) -> bool:
        """Whether a page of this origin may read answers."""
        text = origin.decode("latin-1").lower()
        return (
            self._any
            or text in self._exact
            or any(
                text.startswith(start)
                and text.endswith(end)
                and _LABELS.fullmatch(text[len(start) : len(text) - len(end)]) is not None
                for start, end in self._below
            )
        )

    def fields(self, request: Request) -> list[Header]:
        """What an answer to a request gets; ours alone, without the upstream's `REPLACED`."""
        if self._any:
            return [(b"access-control-allow-origin", b"*"), *self._answer]
        origin = request.header(b"origin")
        if origin is None or not self.allowed(origin):
            return [_VARY]
        return [(b"access-control-allow-origin", origin), *self._answer, _VARY]

    def preflight(self, request: Request) -> list[Header]:
        """The fields of the answer to a preflight; without those that allow for other origins."""
        origin = request.header(b"origin") or b""
        if not self.allowed(origin):
            return [_VARY_PREFLIGHT]
        fields = [
            (b"access-control-allow-origin", b"*" if self._any else origin),
            *self._preflight,
            _VARY_PREFLIGHT,
        ]
        headers = self._headers
        if not headers:
            asked = request.header(b"access-control-request-headers") or b""
            headers = asked if _NAMES.fullmatch(asked) else b""
        if headers:
            fields.append((b"access-control-allow-headers", headers))
        return fields


def asked_method(request: Request) -> str:
    """The method that a preflight asks for; empty where the request is none."""
    if request.method != "OPTIONS":
        return ""
    method = request.header(b"access-control-request-method")
    if method is None or request.header(b"origin") is None:
        return ""
    text: str = method.decode("latin-1").strip()
    return text
