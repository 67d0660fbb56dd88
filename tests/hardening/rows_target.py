"""What is asked for: targets, authorities, and paths that try to be another route."""

from __future__ import annotations

from tests.hardening.rows import HOST, Refused, Relayed, req, row
from tests.support.http1 import Answer
from tests.support.recorder import Seen

SECTION = "Target"
_BAD = Refused((400,))
_BAD_PATH = Refused((400,), closed=False)


def _get(target: bytes, *fields: bytes, host: bytes | None = HOST) -> bytes:
    return req(b"GET %b HTTP/1.1" % target, *fields, host=host)


def _own_host(seen: Seen, answer: Answer) -> None:
    """The upstream is told its own authority, and the truth about the client's."""
    assert seen.get("host")[0].startswith("127.0.0.1:")
    assert seen.get("x-forwarded-host") == [HOST.decode()]


row(
    SECTION, "an absolute target, its authority that of Host",
    Relayed("passed on as a path, to the route's upstream", _own_host),
    {
        "http": _get(b"http://" + HOST + b"/echo"),
        "upper": _get(b"HTTP://" + HOST + b"/echo"),
    },
)  # fmt: skip
row(
    SECTION, "an absolute target, its authority not that of Host", _BAD,
    {
        "other host": _get(b"http://other.example/echo"),
        "other port": _get(b"http://" + HOST + b":81/echo"),
        "an address": _get(b"http://@VICTIM@/echo"),
        "loopback": _get(b"http://127.0.0.1:1/echo"),
        "metadata": _get(b"http://169.254.169.254/latest/meta-data/"),
    },
)  # fmt: skip
row(
    SECTION, "an absolute target with user, without host, of another scheme, or not at all", _BAD,
    {
        text: _get(text.encode().replace(b"H", HOST))
        for text in (
            *("http://u@H/echo", "http://u:p@H/echo", "http:///echo", "http:/echo", "http:echo"),
            *("ftp://H/echo", "file:///etc/passwd", "gopher://@VICTIM@/_x", "://H/echo"),
            *("//", "http://H:x/echo", "http://[::1/echo", "echo", "H", "H:80", "*"),
        )
        if text != "//"
    },
)  # fmt: skip
row(
    SECTION, "a Host that points somewhere else (SSRF)",
    Relayed("only ever a name to match: the upstream is the route's"),
    {
        "victim": req(host=b"@VICTIM@"),
        "loopback": req(host=b"127.0.0.1:1"),
        "metadata": req(host=b"169.254.169.254"),
    },
)  # fmt: skip
row(
    SECTION, "`OPTIONS *`", Refused((404, 405), closed=False), req(b"OPTIONS * HTTP/1.1"),
    note="no route matches it",
)  # fmt: skip
row(
    SECTION, "a control character, a space or a byte above 0x7f in the target", _BAD,
    {
        f"{byte:02x}": _get(b"/echo/a%cb" % byte)
        for byte in (0, 1, 9, 11, 12, 13, 27, 31, 127, 128, 0xC3, 255)
    },
)  # fmt: skip
row(SECTION, "a fragment in the target", _BAD, _get(b"/echo#f"))


def _verbatim(seen: Seen, answer: Answer) -> None:
    assert seen.target.startswith("/echo")


for _target in (
    *(b"/echo??", b"/echo?a=%20&b=+;c", b"/echo/%41%25", b"/echo/a;p=1/b"),
    *(b"/echo/!$&'()*+,;=:@-._~", b'/echo/"<>[]^`{|}', b"/echo?http://x/?y"),
):
    row(
        SECTION, f"`{_target.decode()}`",
        Relayed("passed on byte for byte", _verbatim, target=_target.decode()),
        _get(_target),
    )  # fmt: skip
row(SECTION, "`/echo?`", Relayed("an empty query is dropped", target="/echo"), _get(b"/echo?"))
row(
    SECTION, "an escape that is none, of a control character, of a slash or backslash", _BAD_PATH,
    [_get(b"/echo/" + text) for text in (b"%zz", b"%", b"%4", b"%00", b"%0d%0a", b"%2F", b"%5c")],
    note="`encoded_slash: allow` passes the last two on, where they are the same route",
)  # fmt: skip
