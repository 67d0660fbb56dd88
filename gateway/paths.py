"""Paths that an upstream may read in another way than we do, and what becomes of them.

A request must never be matched as one path and served as another, cheaper one. Nothing is rewritten
to that end: a path is passed on as it was sent, or refused. Refused is what has no honest use (dot
segments in any spelling, control characters, what is no UTF-8), and what is ambiguous *here*: where
another reading of the path would have taken another route. `readings` are those of a path that is
spelled oddly; a `Lookalikes` knows the routes that a path could also be meant for where upstreams
ignore case, slashes at the end, empty segments, dots and spaces at the end of a segment, or `;…`.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Final
from urllib.parse import unquote_to_bytes

from core.policy import Route
from gateway.http.message import Request

# How often a path may be encoded over and over. Nobody means more than two.
_ROUNDS: Final = 3

_ENCODED: Final = re.compile(r"%[0-9A-Fa-f]{2}")
_MALFORMED: Final = re.compile(rb"%(?![0-9A-Fa-f]{2})")
_ENCODED_SLASH: Final = re.compile(rb"%2[Ff]|%5[Cc]")
_NOISE: Final = re.compile(r";|//|\./| /")
_CONTROL: Final = re.compile(r"[\x00-\x1f\x7f]")


class PathRefused(ValueError):
    """Not to be served. `reason` is a word for the log, the text a sentence for the client."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def is_plain(request: Request) -> bool:
    """Whether the path can be read in one way only: nearly all can."""
    path, odd = request.path, request.odd
    return "//" not in path and (not odd or ("/." not in path and not odd.strip(b".")))


def encoded_slash(raw: bytes) -> str:
    """The first slash in a path that is percent-encoded, as it stands there; empty for none."""
    found = _ENCODED_SLASH.search(raw)
    return found[0].decode() if found is not None else ""


def readings(raw: bytes) -> list[str]:
    """What an upstream may take a path for, as often as it decodes it; our own reading comes first.

    Raises:
        PathRefused: it may not be served, whatever its route.
    """
    if raw.startswith((b"//", b"/\\")):
        raise PathRefused(
            "leading-slashes", "The path begins with two slashes, which some read as a host."
        )
    if b"\\" in raw or b"#" in raw:
        raise PathRefused("bad-path", r"The path contains `\` or `#`; send them percent-encoded.")
    if _MALFORMED.search(raw):
        raise PathRefused(
            "bad-path", "The path has a `%` that two hexadecimal digits do not follow."
        )
    first = _decoded(raw)
    seen = [first]
    if _ENCODED_SLASH.search(raw):
        # Who splits before decoding has another path than who decodes before splitting.
        seen.append(_decoded(_ENCODED_SLASH.sub(lambda match: b"%25" + match[0][1:], raw)))
    again = first
    for _ in range(_ROUNDS):
        if not _ENCODED.search(again):
            break
        again = _decoded(again.encode())
        seen.append(again)
    else:
        if _ENCODED.search(again):
            raise PathRefused("bad-path", "The path is percent-encoded over and over.")
    for reading in tuple(seen):
        if "\\" in reading:
            seen.append(reading.replace("\\", "/"))
        if "?" in reading or "#" in reading:
            seen.append(re.split(r"[?#]", reading, maxsplit=1)[0])
    for reading in seen:
        if _CONTROL.search(reading):
            raise PathRefused("bad-path", "The path contains a control character.")
        if has_dot_segments(reading):
            raise PathRefused(
                "dot-segments",
                "The path contains `.` or `..` segments; send the resolved path.",
            )
    return list(dict.fromkeys(seen))


def _decoded(raw: bytes) -> str:
    try:
        # Strict, so that over-long forms of `/` and `.` are no UTF-8 either.
        return unquote_to_bytes(raw).decode()
    except UnicodeDecodeError:
        raise PathRefused("bad-path", "The path is not UTF-8.") from None


def has_dot_segments(path: str) -> bool:
    """Whether a segment is `.` or `..`, alone or before a `;`."""
    return "/." in path and any(
        part.partition(";")[0] in (".", "..") for part in path.split("/") if part[:1] == "."
    )


def folded(path: str) -> str:
    """One spelling of all that upstreams may take for the same path, a slash at its end apart."""
    if not path.isascii():
        path = unicodedata.normalize("NFKC", path)
    path = path.casefold()
    if path[-1:] in (".", " ") or _NOISE.search(path):
        parts = [part.partition(";")[0].rstrip(". ") for part in path.split("/")]
        path = "/" + "/".join(filter(None, parts))
        if not parts[-1] and len(path) > 1:
            path += "/"
    return path


# Each route is compared with all before it.
_folded_once = lru_cache(maxsize=4096)(folded)


class Lookalikes:
    """The routes before a prefix route that are below it, and serve or charge otherwise.

    A path that is spelled as such a route is spelled never gets here, as that route comes first;
    one that only looks like it would be charged as the prefix route and may be served as the other.
    """

    __slots__ = ("_in_lower_case", "_rows")

    def __init__(self, rows: Iterable[tuple[bool, str, frozenset[str], str]], lower: bool) -> None:
        """`lower` says that the routes are spelled as they are folded."""
        self._rows = tuple(rows)
        self._in_lower_case = lower

    @classmethod
    def of(cls, route: Route, earlier: Sequence[Route]) -> Lookalikes | None:
        """Those of a route, or None; `earlier` are the routes before it."""
        if not route.path.endswith("/*") or route.rules.answer is not None:
            return None
        stem = folded(route.path[:-1])
        rows = []
        lower = True
        for other in earlier:
            prefix = other.path.endswith("/*")
            spelled = other.path[:-1] if prefix else other.path
            start = _folded_once(spelled)
            if (prefix and start == stem) or not f"{start}/".startswith(stem):
                continue
            if (other.host and route.host and other.host != route.host) or _same(other, route):
                continue
            methods = other.methods | {"HEAD"} if "GET" in other.methods else other.methods
            lower = lower and start == spelled
            if not prefix:
                start = start.rstrip("/")
            rows.append((prefix, start, methods, other.host.lower()))
        return cls(rows, lower) if rows else None

    def hit_plain(self, path: str, method: str, host: str) -> bool:
        """`hit`, for a path that `is_plain`: nearly none is spelled so that it could be one."""
        if (
            self._in_lower_case
            and path.islower()
            and path[-1] != "/"
            and ("." not in path or (path[-1] != "." and "./" not in path))
        ):
            return False
        return self.hit(path, method, host)

    def hit(self, path: str, method: str, host: str) -> bool:
        """Whether a path that matched the route may be meant for another. `host` is in lower case,
        without a port."""
        path = folded(path)
        exact = path.rstrip("/")
        for prefix, start, methods, wanted in self._rows:
            if (
                (path.startswith(start) if prefix else exact == start)
                and (not methods or method in methods)
                and (not wanted or wanted == host)
            ):
                return True
        return False


def _same(one: Route, other: Route) -> bool:
    """Whether both do the same with whatever they match."""
    return one == dataclasses.replace(
        other, name=one.name, path=one.path, host=one.host, methods=one.methods
    )
