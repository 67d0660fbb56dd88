"""What a route does to requests and answers beside counting them, in the compiled form that the hot
path reads.

`core.config.rules` parses and validates these. Names of header fields are in lower case.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Final

# Of a body: no limit. Larger than every length that HTTP/1.1 can announce here.
UNLIMITED: Final = sys.maxsize

# Text and names of variables by turns, text first: `("a=", "client_ip", "")`.
Template = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class HeaderRules:
    """Fields named in `dropped` go, then `fields` are appended. What is set is in both."""

    dropped: frozenset[str]
    fields: tuple[tuple[str, Template], ...]


@dataclass(frozen=True, slots=True)
class Rewrite:
    """Segments of a path, and what becomes of them.

    `pattern` has an entry a segment: its decoded text, or a name in braces that takes one segment
    whole; `{name...}`, as the last one, takes all that are left, be it none. `result` is text and
    names by turns, the text as it is sent.
    """

    pattern: tuple[str, ...]
    result: Template


@dataclass(frozen=True, slots=True)
class Cors:
    """Who may read answers in a browser. `origins` may hold `*`, and `https://*.example.com`.

    `headers` are those a request may bring: all of them where it holds `*`.
    """

    origins: tuple[str, ...]
    methods: tuple[str, ...]
    headers: tuple[str, ...]
    expose: tuple[str, ...]
    credentials: bool
    max_age_s: int


@dataclass(frozen=True, slots=True)
class StaticAnswer:
    """An answer that is given without an upstream."""

    status: int
    fields: tuple[tuple[str, Template], ...]
    body: bytes


@dataclass(frozen=True, slots=True)
class RouteRules:
    """`host` is sent upstream: empty is the upstream's own, unless `preserve_host` keeps the
    client's. `max_body` is in bytes. `answer` is there on routes without an upstream.
    """

    request: HeaderRules | None = None
    response: HeaderRules | None = None
    add_prefix: str = ""
    rewrite: Rewrite | None = None
    host: str = ""
    preserve_host: bool = False
    cors: Cors | None = None
    answer: StaticAnswer | None = None
    max_body: int = UNLIMITED
    encoded_slash: bool = False


NO_RULES: Final = RouteRules()
