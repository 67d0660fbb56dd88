"""Paths that want to be served as another route, at the price of this one."""

from __future__ import annotations

from tests.hardening.rows import Path, req, row

SECTION = "Path"


def _paths(*targets: str) -> dict[str, bytes]:
    return {
        target: req(b"GET %b HTTP/1.1" % target.encode("latin-1"), b"X-Path: 1")
        for target in targets
    }


row(
    SECTION, "another spelling of a path by RFC 3986: dot segments, escapes that need not be",
    Path("400, or the route and the price of the plain spelling", same=True),
    _paths(
        *("/paid/dear", "/paid/%64ear", "/p%61id/d%65ar", "/paid/dear?", "/paid/dear?x=/../cheap"),
        *("/paid/./dear", "/paid/x/../dear", "/x/../paid/dear", "/../paid/dear", "/./paid/dear"),
        *("/paid/%2e/dear", "/paid/x/%2e%2e/dear", "/paid/x/%2E%2E/dear", "/paid/x/.%2e/dear"),
        *("/paid/x/%2e./dear", "/paid/x/..%2fdear", "/paid/x%2f..%2fdear", "/paid/dear/."),
        *("/paid/dear/x/..", "/paid/cheap/../../paid/dear", "/%70%61%69%64/%64%65%61%72"),
    ),
)  # fmt: skip
row(
    SECTION, "`%2F` for a slash", Path("the route of the decoded path, or 400", same=True),
    _paths("/paid%2Fdear", "/paid%2fdear", "/%70aid%2fdear"),
)  # fmt: skip
row(
    SECTION, "what some servers take for the same path: `//`, another case, a dot, slash, `;`, "
    "backslash, space or NUL at the end or in between, escapes twice",
    Path("400, or the route and the price of the plain spelling", same=True),
    _paths(
        *("//paid/dear", "/paid//dear", "///paid///dear", "/paid/dear/", "/paid/dear//"),
        *("/PAID/DEAR", "/paid/Dear", "/Paid/dear", "/paid/dear.", "/paid/dear%2e", "/paid/dear.."),
        *("/paid/dear%20", "/paid/dear;x=1", "/paid;x/dear", "/paid/dear%3bx", "/paid/dear%00"),
        *("/paid\\dear", "/paid%5cdear", "/paid/x%5c..%5cdear", "/paid/x\\..\\dear"),
        *("/paid/%252e%252e/dear", "/paid/%2564ear", "/paid%252fdear", "/paid/d%C1%A5ar"),
        *("/paid/x/..;/dear", "/paid/.;/dear", "/paid/dear%ff", "/paid/dear%3f", "/paid/dear%23"),
        *("/paid/%u0064ear", "/paid/x/%c0%ae%c0%ae/dear", "/paid/dear/%2e%2e;/"),
    ),
)  # fmt: skip
row(
    SECTION, "the same where no other reading of it takes another route",
    Path("passed on byte for byte", same=False),
    _paths(
        *("/paid/Cheap/A7", "/paid/a//b", "/paid/cheap/", "/paid/v1./x", "/paid/map;v=1"),
        *("/paid/100%25", "/paid/what%3F", "/paid/dear.json", "/paid/dearer", "/paid/%41"),
    ),
)  # fmt: skip
