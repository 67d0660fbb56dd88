"""Lines and bytes of a head: what is a field, and what only looks like one."""

from __future__ import annotations

from tests.hardening.rows import HOST, KEY, Refused, Relayed, req, row
from tests.support.http1 import Answer
from tests.support.recorder import Seen

SECTION = "Head"
_BAD = Refused((400,))
_LINE = b"GET /echo HTTP/1.1"

row(
    SECTION, "a folded field (obs-fold)", _BAD,
    {
        "space": req(_LINE, b"X-A: b\r\n c"),
        "tab": req(_LINE, b"X-A: b\r\n\tc"),
        "empty value": req(_LINE, b"X-A:\r\n b"),
        "first": _LINE + b"\r\n X-A: b\r\nHost: %b\r\nX-API-Key: %b\r\n\r\n" % (HOST, KEY),
    },
)  # fmt: skip
row(
    SECTION, "a line that ends with LF or CR alone", _BAD,
    {
        "all LF": b"GET /echo HTTP/1.1\nHost: %b\nX-API-Key: %b\n\n" % (HOST, KEY),
        "request line": b"GET /echo HTTP/1.1\nHost: %b\r\nX-API-Key: %b\r\n\r\n" % (HOST, KEY),
        "a field": req(_LINE, b"X-A: b\nX-C: d"),
        "the end": b"GET /echo HTTP/1.1\r\nHost: %b\r\nX-API-Key: %b\r\n\n" % (HOST, KEY),
        "last field": b"GET /echo HTTP/1.1\r\nHost: %b\r\nX-API-Key: %b\n\r\n" % (HOST, KEY),
        "CR in a value": req(_LINE, b"X-A: b\rc"),
        "CR before a field": req(_LINE, b"X-A: b\rX-C: d"),
        "CR CR LF": req(_LINE, b"X-A: b\r"),
        "CR in a name": req(_LINE, b"X-\rA: b"),
        "CR first": req(_LINE, b"\rX-A: b"),
        "CR alone": b"GET /echo HTTP/1.1\rHost: %b\rX-API-Key: %b\r\r\n" % (HOST, KEY),
    },
)  # fmt: skip
row(
    SECTION, "a control character in a value", _BAD,
    {f"{byte:02x}": req(_LINE, b"X-A: b%cc" % byte) for byte in (0, 1, 7, 8, 11, 12, 27, 31, 127)},
)  # fmt: skip
row(
    SECTION, "a name with a character that no name may have", _BAD,
    {
        repr(bytes((byte,))): req(_LINE, b"X-%cA: b" % byte)
        for byte in b'\x00\x01\t "(),/;<=>?@[\\]{}\x7f\x80\xe9\xff'
    },
)  # fmt: skip
row(
    SECTION, "no colon, no name, space before the colon", _BAD,
    {
        "no colon": req(_LINE, b"nonsense"),
        "no name": req(_LINE, b": b"),
        "only a colon": req(_LINE, b":"),
        "space": req(_LINE, b"X-A : b"),
        "tab": req(_LINE, b"X-A\t: b"),
        "Host": b"GET /echo HTTP/1.1\r\nHost : %b\r\nX-API-Key: %b\r\n\r\n" % (HOST, KEY),
    },
)  # fmt: skip


def _bytes_kept(seen: Seen, answer: Answer) -> None:
    values = seen.get("x-odd")
    assert values
    assert all(f"x-odd: {value}\r\n".encode("latin-1") in seen.raw for value in values)


row(
    SECTION, "odd but legal values: empty, tabs, latin-1, UTF-8, repeated",
    Relayed("passed on byte for byte, in their order", _bytes_kept),
    {
        "empty": req(_LINE, b"X-Odd:"),
        "latin-1": req(_LINE, b"X-Odd: caf\xe9 \xff\x80"),
        "tab": req(_LINE, b"X-Odd: a\tb"),
        "twice": req(_LINE, b"X-Odd: a", b"x-oDD: b", b"X-Odd:"),
    },
)  # fmt: skip
row(
    SECTION, "an empty line before the request",
    Relayed("skipped, as RFC 9112 section 2.2 asks"),
    {"one": b"\r\n" + req(), "two": b"\r\n\r\n" + req()},
)  # fmt: skip
row(
    SECTION, "no Host, several, an empty one, or one that is no host",
    Refused((400,), closed=False),
    {
        "none": req(host=None),
        "two": req(_LINE, b"Host: b.example"),
        "two alike": req(_LINE, b"Host: " + HOST),
    }
    | {
        text: req(host=text.encode("latin-1"))
        for text in (
            *("", "a b", "a/b", "a,b", "user@a", "a?b", "a#b", "a\\b", "a\tb", "<a>", '"a"'),
            *("caf\xe9.example", "a\x00b", "http://a", "a:b:c", "a:x", "[::1", "a]", "::1"),
        )
    },
)  # fmt: skip
row(
    SECTION, "a Host with a port, an IPv6 literal, or an underscore",
    Relayed("taken as it is"),
    [req(host=text) for text in (b"a.example:8080", b"[::1]", b"[2001:db8::1]:80", b"a_b.example")],
)  # fmt: skip
row(
    SECTION, "HTTP/1.0 without Host", Relayed("served, connection closed", kept=False),
    req(b"GET /echo HTTP/1.0", host=None),
)  # fmt: skip
row(
    SECTION, "HTTP/0.9, or a version that is none", Refused((400, 501, 505)),
    {
        "0.9": b"GET /echo\r\n\r\n",
        "0.9 with fields": b"GET /echo\r\nHost: %b\r\nX-API-Key: %b\r\n\r\n" % (HOST, KEY),
    }
    | {
        text: req(f"GET /echo {text}".encode())
        for text in (
            *("HTTP/0.9", "HTTP/2.0", "HTTP/2", "HTTP/3.0", "HTTP/1.2", "HTTP/1.10", "HTTP/11"),
            *("HTTP/1", "HTTP/1.", "HTTP/.1", "HTTP/01.1", "http/1.1", "Http/1.1", "XTTP/1.1"),
            *("HTTP/1.1x", "HTTP/1.1 x", "HTTP /1.1", "HTTP/ 1.1", "HTTPS/1.1"),
            *("ICE/1.0", "HTTP/-1.1", "HTTP/9.9", ""),
        )
    }
    | {
        "SOURCE ICE": req(b"SOURCE /echo ICE/1.0"),
        "DESCRIBE RTSP": req(b"DESCRIBE /echo RTSP/1.0"),
    },
)  # fmt: skip
row(
    SECTION, "the HTTP/2 preface where h2c is off", Refused((400, 505)),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00",
)  # fmt: skip
row(
    SECTION, "two spaces in the request line", Relayed("read as one (RFC 9112 section 3)"),
    {"before": req(b"GET  /echo HTTP/1.1"), "after": req(b"GET /echo  HTTP/1.1")},
)  # fmt: skip
row(
    SECTION, "RTSP/1.0 where HTTP/1.0 should stand",
    Relayed("read as HTTP/1.0, which llhttp does not tell apart", kept=False),
    req(b"GET /echo RTSP/1.0"),
)  # fmt: skip
row(
    SECTION, "other white space in the request line, or another protocol", Refused((400, 501)),
    {
        "tab": req(b"GET\t/echo\tHTTP/1.1"),
        "leading": req(b" GET /echo HTTP/1.1"),
        "trailing": req(b"GET /echo HTTP/1.1 "),
        "in the target": req(b"GET /ec ho HTTP/1.1"),
        "VT": req(b"GET\x0b/echo HTTP/1.1"),
        "no target": req(b"GET HTTP/1.1"),
        "empty target": req(b"GET  HTTP/1.1"),
        "nothing": b"\x00\r\n\r\n",
        "TLS": b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03" + b"\x00" * 40,
        "SSH": b"SSH-2.0-OpenSSH_9.6\r\n",
    },
)  # fmt: skip
row(
    SECTION, "a method in lower case, or one that is no method of HTTP", Refused((400, 405, 501)),
    {
        text: req(f"{text} /echo HTTP/1.1".encode("latin-1"))
        for text in ("get", "Get", "BREW", "GETX", "G@T", "GE\x00T", "G\xc9T", "X" * 5000, "M-POST")
    },
)  # fmt: skip
row(
    SECTION, "CONNECT", Refused((400, 405, 501)),
    {
        "authority": req(b"CONNECT @VICTIM@ HTTP/1.1"),
        "path": req(b"CONNECT /echo HTTP/1.1"),
        "own": req(b"CONNECT " + HOST + b" HTTP/1.1"),
    },
    note="no tunnel is ever opened",
)  # fmt: skip


def _no_key(seen: Seen, answer: Answer) -> None:
    assert KEY not in seen.raw
    assert b"tg_live_" not in seen.raw


row(
    SECTION, "TRACE", Relayed("like any method; the key is not in what is echoed", _no_key),
    req(b"TRACE /echo HTTP/1.1"),
)  # fmt: skip
row(
    SECTION, "`Expect` other than 100-continue", Refused((417,)),
    [
        req(b"POST /echo HTTP/1.1", b"Expect: " + text, b"Content-Length: 3", body=b"abc")
        for text in (b"200-ok", b"100-continue, x", b"x=y")
    ],
)  # fmt: skip


def _no_expect(seen: Seen, answer: Answer) -> None:
    assert not seen.get("expect")


row(
    SECTION, "`Expect: 100-continue`",
    Relayed("answered here, and only when the body is wanted", _no_expect, body=b"abc"),
    {
        name: req(
            b"POST /echo HTTP/1.1", b"%b: %b" % (name.encode(), value),
            b"Content-Length: 3", body=b"abc",
        )
        for name, value in (("Expect", b"100-continue"), ("expect", b"100-Continue"))
    },
)  # fmt: skip
