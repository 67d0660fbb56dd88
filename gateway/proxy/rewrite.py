"""What a route's rules make of header fields and paths; compiled once a route.

All that a rule writes was checked when the configuration was loaded. What it copies from a request
are bytes that the parser let pass as part of a path or a field, and both servers refuse a line
break in a field once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Final, NamedTuple
from urllib.parse import unquote_to_bytes

from core.rules import HeaderRules, Rewrite, Template
from gateway.forwarded import TrustedProxies
from gateway.http.errors import BadRequest
from gateway.http.message import Header, Request

# RFC 3986's reg-name, IP-literal and port. No comma: X-Forwarded-Host is read as a list.
HOST_BYTES: Final = (
    b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~!$&'()*+;=%:[]"
)


class Facts(NamedTuple):
    """What variables are filled in from. `query` is what of it may be shown."""

    request: Request
    request_id: bytes
    trusted: TrustedProxies
    route: str = ""
    plan: str = ""
    subscription: str = ""
    query: bytes = b""


def _host(facts: Facts) -> bytes:
    host = facts.request.header(b"host") or b""
    return b"" if host.translate(None, HOST_BYTES) else host


def _uri(facts: Facts) -> bytes:
    raw = facts.request.raw_path
    return b"%b?%b" % (raw, facts.query) if facts.query else raw


_VARIABLES: Final[Mapping[str, Callable[[Facts], bytes]]] = {
    "client_ip": lambda facts: facts.trusted.client_ip(
        facts.request.peer, facts.request.headers
    ).encode(),
    "host": _host,
    "path": lambda facts: facts.request.raw_path,
    "plan": lambda facts: facts.plan.encode(),
    "request_id": lambda facts: facts.request_id,
    "route": lambda facts: facts.route.encode(),
    "scheme": lambda facts: facts.request.scheme.encode(),
    "subscription": lambda facts: facts.subscription.encode(),
    "uri": _uri,
}


class Fields:
    """Header fields whose values may hold variables, in their order."""

    __slots__ = ("_parts", "_plain")

    def __init__(self, fields: Iterable[tuple[str, Template]]) -> None:
        self._parts = [
            (name.encode(), [text.encode() for text in parts[::2]], parts[1::2])
            for name, parts in fields
        ]
        plain = [(name, texts[0]) for name, texts, variables in self._parts if not variables]
        self._plain = plain if len(plain) == len(self._parts) else None

    def of(self, facts: Facts) -> list[Header]:
        """The fields for one request."""
        if self._plain is not None:
            return self._plain
        known: dict[str, bytes] = {}
        fields = []
        for name, texts, variables in self._parts:
            value = texts[0]
            for variable, text in zip(variables, texts[1:], strict=True):
                if variable not in known:
                    known[variable] = _VARIABLES[variable](facts)
                value += known[variable] + text
            fields.append((name, value))
        return fields


class HeaderEdits:
    """A `HeaderRules`, compiled: what goes, and what comes instead."""

    __slots__ = ("dropped", "fields")

    def __init__(self, rules: HeaderRules) -> None:
        self.dropped = frozenset(name.encode() for name in rules.dropped)
        self.fields = Fields(rules.fields)


def path_edit(
    strip: str = "", add: str = "", rewrite: Rewrite | None = None
) -> Callable[[bytes], bytes] | None:
    """What makes the path that goes upstream of the one that came; None keeps it.

    `strip` and `add` are prefixes; `rewrite` says all of it. The bytes of the path stay as they
    were sent. What is returned raises BadRequest where what is left would not be read alike by
    everybody.
    """
    if rewrite is not None:
        return _Rewriting(rewrite)
    prefix, added = strip.rstrip("/").encode(), add.encode()

    cut, below = len(prefix), prefix + b"/"

    def edit(raw: bytes) -> bytes:
        if prefix:
            if not added and raw.startswith(below) and raw[cut + 1 : cut + 2] != b"/":
                return raw[cut:]  # nearly always so
            raw = strip_prefix(raw, prefix)
            if raw[1:2] == b"/":
                # Who resolves it as a reference takes what follows for a host, and serves the rest.
                raise BadRequest("the path begins with two slashes once its prefix is gone")
        return added + raw if added else raw

    return edit if prefix or added else None


class _Rewriting:
    __slots__ = ("_pattern", "_result")

    def __init__(self, rewrite: Rewrite) -> None:
        self._pattern = tuple(
            (b"", part[1:-1]) if part.startswith("{") else (part.encode(), "")
            for part in rewrite.pattern
        )
        self._result = rewrite.result

    def __call__(self, raw: bytes) -> bytes:
        """Linear in the path: each segment is looked at once."""
        pattern = self._pattern
        segments = raw[1:].split(b"/")
        rest = pattern[-1][1].endswith("...")
        if len(segments) < len(pattern) or (len(segments) > len(pattern) and not rest):
            return raw
        taken: dict[str, bytes] = {}
        for (text, name), segment in zip(pattern, segments, strict=False):
            if name.endswith("..."):
                break
            if name:
                if not segment:
                    return raw
                taken[name] = segment
            elif segment != text and unquote_to_bytes(segment) != text:
                return raw
        if rest:
            taken[pattern[-1][1][:-3]] = b"/".join(segments[len(pattern) - 1 :])
        made = b"".join(
            taken[part] if index % 2 else part.encode() for index, part in enumerate(self._result)
        )
        if made[1:2] == b"/" or _has_dots(made):
            raise BadRequest("the path has two slashes or dots where it was rewritten")
        return made


def _has_dots(raw: bytes) -> bool:
    return any(
        unquote_to_bytes(part.partition(b";")[0]) in (b".", b"..") for part in raw.split(b"/")
    )


def strip_prefix(raw: bytes, prefix: bytes) -> bytes:
    """`raw` without `prefix`, which is decoded and ends without a slash, at a segment boundary.

    The rest keeps its spelling. A path that does not start with the prefix is returned unchanged.
    """
    if raw.startswith(prefix):
        cut = len(prefix)
    else:
        cut = _encoded_cut(raw, prefix)
        if cut < 0:
            return raw
    rest = raw[cut:]
    if not rest:
        return b"/"
    return rest if rest[:1] == b"/" else raw


def _encoded_cut(raw: bytes, prefix: bytes) -> int:
    """How much of `raw` spells `prefix` when some of it is percent-encoded; -1 when none does."""
    at = 0
    for byte in prefix:
        if raw[at : at + 1] == b"%":
            if unquote_to_bytes(raw[at : at + 3]) != bytes((byte,)):
                return -1
            at += 3
        elif raw[at : at + 1] == bytes((byte,)):
            at += 1
        else:
            return -1
    return at
