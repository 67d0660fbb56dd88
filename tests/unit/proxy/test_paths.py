"""A request is never matched as one path and served as another one."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.config import loads
from gateway.http.message import Request
from gateway.matching import Matcher, Refusal
from gateway.paths import PathRefused, folded, is_plain, readings
from gateway.runtime import Runtime

CONFIG = """
upstreams: {api: {urls: ["http://127.0.0.1:9"]}}
meters: {credits: {unit: credit}}
plans: {free: {limits: {rate: {rate: 5/s}}}}
routes:
  - {match: {path: /api/search}, upstream: api, meters: {credits: 5}, name: search}
  - {match: {path: /api/heavy/*}, upstream: api, meters: {credits: 9}, name: heavy}
  - {match: {path: /api/same}, upstream: api, name: same}
  - {match: {path: /api/write, methods: [POST]}, upstream: api, meters: {credits: 2}, name: write}
  - {match: {path: /git/*}, upstream: api, encoded_slash: allow, name: git}
  - {match: {path: /api/*}, upstream: api, name: api}
  - {match: {path: /closed/*}, respond: {status: 403}, name: closed}
  - {match: {path: /*}, upstream: api, name: all}
"""
MATCHER = Matcher(Runtime(loads(CONFIG, env={}), {}))


def matched(raw: str, method: str = "GET") -> str:
    """The route's name, or why there is none."""
    request = Request(method, raw.encode("latin-1"), [(b"host", b"h")])
    try:
        return MATCHER.match(request, "r").route.name
    except Refusal as refusal:
        return f"{refusal.problem.status} {refusal.reason}"


@pytest.mark.parametrize(
    ("raw", "route"),
    [
        ("/api/search", "search"),
        ("/api/sea%72ch", "search"),  # encoded without need: decoded by everybody
        ("/api/x", "api"),
        ("/api/v1.0/.well-known", "api"),
        ("/api/file.json", "api"),
        ("/api/caf%C3%A9", "api"),
        ("/api/a%20b", "api"),
        ("/api/100%25", "api"),
        ("/api/a%3Fb", "api"),
        ("/api/a;v=1", "api"),
        ("/api/Upper/Case/", "api"),
        ("/api/searches", "api"),
        ("/api/a//b", "api"),
        ("/api/same/", "api"),  # served and charged alike, whichever it is
        ("/api/heavy", "api"),  # a prefix does not match itself
        ("/api/heavy/a/../b", "400 dot-segments"),
        ("/git/projects/group%2Frepo/issues", "git"),
        ("/git/domain%5Cuser", "git"),
        ("/git/x%252e%252e", "git"),
    ],
)
def test_what_can_be_read_in_one_way_is_passed_on(raw: str, route: str) -> None:
    assert matched(raw) == route


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        # Dot segments, in every spelling, wherever they lead.
        ("/api/./search", "dot-segments"),
        ("/api/x/..", "dot-segments"),
        ("/api/x/%2e%2E/search", "dot-segments"),
        ("/api/x/.%2e/search", "dot-segments"),
        ("/api/..;/search", "dot-segments"),
        ("/api/..;a=b/search", "dot-segments"),
        ("/api/%252e%252e/search", "dot-segments"),
        ("/git/..%2Fsearch", "dot-segments"),
        ("/git/..%5Csearch", "dot-segments"),
        ("/api/..%3Fx", "dot-segments"),
        # What is no path in one encoding.
        ("/api/%00", "bad-path"),
        ("/api/a%0d%0ab", "bad-path"),
        ("/api/%7f", "bad-path"),
        ("/api/%2500", "bad-path"),
        ("/api/%c0%ae%c0%ae/search", "bad-path"),
        ("/api/%ff", "bad-path"),
        ("/api/%e9", "bad-path"),
        ("/api/%", "bad-path"),
        ("/api/%zz", "bad-path"),
        ("/api/%u002e", "bad-path"),
        ("/api/%252525252541", "bad-path"),
        ("/api\\search", "bad-path"),
        ("/api/x#y", "bad-path"),
        ("//api/search", "leading-slashes"),
        ("//evil.example/api/search", "leading-slashes"),
        # Encoded slashes, where no route allows them.
        ("/api/a%2Fb", "encoded-slash"),
        ("/api/a%5cb", "encoded-slash"),
        # Looks like a path that is charged otherwise.
        ("/api/Search", "ambiguous-path"),
        ("/API/search", "ambiguous-path"),
        ("/api/search/", "ambiguous-path"),
        ("/api/search.", "ambiguous-path"),
        ("/api/search%20", "ambiguous-path"),
        ("/api//search", "ambiguous-path"),
        ("/api/search;v=1", "ambiguous-path"),
        ("/api/search%3Bv=1", "ambiguous-path"),
        ("/api/search%3Fv=1", "ambiguous-path"),
        ("/api/search%23v", "ambiguous-path"),
        ("/api/sea%2572ch", "ambiguous-path"),
        ("/api/HEAVY/x", "ambiguous-path"),
        ("/api/heavy./x", "ambiguous-path"),
        ("/api/heavy;/x", "ambiguous-path"),
        ("/api//heavy/x", "ambiguous-path"),
        ("/Closed/x", "ambiguous-path"),
        ("/api/%EF%BD%93earch", "ambiguous-path"),  # a full-width s
        # The slash is part of what makes it another route.
        ("/api/search%252F", "ambiguous-path"),
    ],
)
def test_what_could_be_served_as_another_path_is_refused(raw: str, why: str) -> None:
    assert matched(raw) == f"400 {why}"


def test_only_routes_that_take_the_method_are_looked_like() -> None:
    assert matched("/api/Write", "POST") == "400 ambiguous-path"
    assert matched("/api/Write", "GET") == "api"


def test_no_route_is_told_before_a_bad_path_is() -> None:
    closed = Matcher(
        Runtime(
            loads(CONFIG.replace("/*}, upstream: api, name: all", "/z}, upstream: api"), env={}), {}
        )
    )
    with pytest.raises(Refusal) as caught:
        closed.match(Request("GET", b"/nowhere//x", [(b"host", b"h")]), "r")
    assert caught.value.problem.status == 404
    with pytest.raises(Refusal) as caught:
        closed.match(Request("GET", b"/nowhere/%00", [(b"host", b"h")]), "r")
    assert caught.value.problem.status == 400


@pytest.mark.parametrize(
    ("raw", "plain"),
    [
        (b"/a/b.c/.d", False),
        (b"/a/b.c", True),
        (b"/a/b~c@d:e!$&'()*+,=-_", True),
        (b"/a//b", False),
        (b"/a%20b", False),
        (b"/a;b", False),
        (b"/a\xff", False),
        (b"/a\x00", False),
        (b"*", True),
    ],
)
def test_plain_paths(raw: bytes, plain: bool) -> None:
    assert is_plain(Request("GET", raw, [])) == plain


def test_our_reading_comes_first() -> None:
    assert readings(b"/a%2Fb%2520")[0] == "/a/b%20"


@pytest.mark.parametrize(
    ("path", "one"),
    [
        ("/A/B", "/a/b"),
        ("/a/b/", "/a/b/"),
        ("/a//b", "/a/b"),
        ("/a./b. ", "/a/b"),
        ("/a;x=1/b;y", "/a/b"),
        ("/", "/"),
        ("//", "/"),
        ("/;x", "/"),
        ("/a/;x", "/a/"),
    ],
)
def test_folding(path: str, one: str) -> None:
    assert folded(path) == one


def test_a_long_path_of_oddities_takes_no_time() -> None:
    """Linear: with anything worse these would not end."""
    for piece in ("%2541", ".", "%2e", "/", ";", "%5C", "a%3F", "%25"):
        raw = ("/api/" + piece * (16_000 // len(piece))).encode()
        try:
            for reading in readings(raw):
                folded(reading)
        except PathRefused:
            pass


# Upstreams as there are some: each makes of a raw path the one that it serves.


def _resolve(path: str) -> str:
    kept: list[str] = []
    for part in path.split("/")[1:]:
        if part == "..":
            del kept[-1:]
        elif part != ".":
            kept.append(part)
    return "/" + "/".join(kept)


def nginx(raw: str) -> str:
    return _resolve(re.sub("/+", "/", unquote(raw, errors="replace")))


def servlet(raw: str) -> str:
    path = re.sub(";[^/]*", "", raw)
    return _resolve(re.sub("/+", "/", unquote(path, errors="replace")))


def express(raw: str) -> str:
    return unquote(raw, errors="replace").lower().rstrip("/")


def windows(raw: str) -> str:
    path = unquote(raw, errors="replace").replace("\\", "/")
    return _resolve("/".join(part.rstrip(". ") or part for part in path.split("/"))).lower()


def twice(raw: str) -> str:
    return nginx(unquote(raw, errors="replace"))


def as_url(raw: str) -> str:
    return _resolve(re.sub(r"^//[^/]*", "", raw))


UPSTREAMS = (nginx, servlet, express, windows, twice, as_url)
PIECES = st.sampled_from(
    [
        "/", "//", "/.", "/..", ".", "..", ";", ";a=b", "%2e", "%2E", "%2f", "%2F", "%5c", "\\",
        "%25", "%252e", "%252f", "%2500", "%00", "%20", " ", "%3b", "%3f", "%23", "%c0%ae", "%73",
        "%2573", "api", "API", "/api", "search", "Search", "/search", "heavy", "/heavy/", "x", "s",
        "earch", "git", "/git/",
    ]
)  # fmt: skip


@settings(max_examples=1500, deadline=None)
@given(st.sampled_from(["/", "/api", "/api/", "/git/", "//"]), st.lists(PIECES, max_size=6))
def test_no_spelling_makes_an_upstream_serve_what_was_not_charged(
    start: str, pieces: list[str]
) -> None:
    raw = start + "".join(pieces)
    route = matched(raw)
    if route.startswith("4"):
        return
    for upstream in UPSTREAMS:
        served = upstream(raw)
        found = MATCHER._runtime.router.match(served, "GET", "")
        name = found.route.name if found is not None else ""
        # Only `api` and `all` are cheap; what is below them is not to be had for their price.
        if name in ("search", "heavy", "closed"):
            assert route == name, f"{raw!r} is {served!r} to {upstream.__name__}"
