"""Fields that want to pass for something else: hop-by-hop names, forwarding claims, keys."""

from __future__ import annotations

from tests.hardening.rows import HOST, KEY, Refused, Relayed, post, req, row, told
from tests.support.http1 import Answer
from tests.support.recorder import Seen

SECTION = "Hop by hop"
_LINE = b"GET /echo HTTP/1.1"


def _forwarding_is_ours(seen: Seen, answer: Answer) -> None:
    assert seen.get("x-forwarded-for") == ["127.0.0.1"]
    assert seen.get("x-forwarded-proto") == ["http"]
    assert seen.get("x-forwarded-host") == [HOST.decode()]
    assert len(seen.get("host")) == 1
    assert len(seen.get("x-request-id")) == 1
    for name in ("forwarded", "x-real-ip", "x-forwarded-port", "x-forwarded-server"):
        assert not seen.get(name)


row(
    SECTION, "`Connection` that names what the gateway sets itself",
    Relayed("set all the same", _forwarding_is_ours),
    {
        name: req(_LINE, b"Connection: " + name.encode(), b"X-Forwarded-For: 203.0.113.1")
        for name in (
            *("X-Forwarded-For", "x-forwarded-host", "Host", "X-Request-Id", "X-Forwarded-Proto"),
            "close-not, X-Forwarded-For, Host",
        )
    },
)  # fmt: skip


def _credentials_stay(seen: Seen, answer: Answer) -> None:
    assert seen.get("authorization") == ["Basic dTpw"]


row(
    SECTION, "`Connection: Authorization` beside credentials of the application's own",
    Relayed("they stay: naming them may not take them away", _credentials_stay),
    req(_LINE, b"Authorization: Basic dTpw", b"Connection: Authorization"),
)  # fmt: skip
row(
    SECTION, "`Connection` that names framing",
    Relayed("the framing stays", body=b"abc"),
    {
        "length": post(b"Connection: Content-Length", b"Content-Length: 3", body=b"abc"),
        "coding": post(
            b"Connection: Transfer-Encoding, keep-alive", b"Transfer-Encoding: chunked",
            body=b"3\r\nabc\r\n0\r\n\r\n",
        ),
    },
)  # fmt: skip


def _hop_gone(seen: Seen, answer: Answer) -> None:
    for name in (
        *("connection", "keep-alive", "proxy-connection", "proxy-authorization", "te", "trailer"),
        *("upgrade", "http2-settings", "x-hop"),
    ):
        assert not seen.get(name), name
    assert seen.get("x-end") == ["1"]


row(
    SECTION, "hop-by-hop fields, and what `Connection` names", Relayed("removed", _hop_gone),
    {
        "all": req(
            _LINE, b"Connection: keep-alive, X-Hop", b"Keep-Alive: timeout=9", b"X-Hop: 1",
            b"Proxy-Connection: keep-alive", b"Proxy-Authorization: Basic x", b"TE: trailers",
            b"Trailer: x", b"X-End: 1",
        ),
        "two fields": req(
            _LINE, b"Connection: keep-alive", b"X-Hop: 1", b"connection: x-HOP", b"X-End: 1"
        ),
        "many names": req(
            _LINE, b"Connection: " + b",".join(b"x%d" % n for n in range(900)) + b",X-Hop",
            b"X-Hop: 1", b"X-End: 1",
        ),
    },
)  # fmt: skip
row(
    SECTION, "`Upgrade` to anything but websocket, h2c included",
    Relayed("ignored: answered as if it were not there", _hop_gone),
    {
        "foo": req(_LINE, b"Upgrade: foo/2", b"Connection: Upgrade", b"X-End: 1"),
        "h2c": req(
            _LINE, b"Upgrade: h2c", b"Connection: Upgrade, HTTP2-Settings",
            b"HTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA", b"X-End: 1",
        ),
        "TLS": req(_LINE, b"Upgrade: TLS/1.2", b"Connection: Upgrade", b"X-End: 1"),
        "no Connection": req(_LINE, b"Upgrade: h2c", b"X-End: 1"),
        "POST": req(
            b"POST /echo HTTP/1.1", b"Upgrade: foo", b"Connection: Upgrade", b"X-End: 1",
            b"Content-Length: 3", body=b"abc",
        ),
    },
)  # fmt: skip

row(
    "Forwarding", "claims of a peer that is no trusted proxy",
    Relayed("replaced by what is true", _forwarding_is_ours),
    {
        "for": req(_LINE, b"X-Forwarded-For: 203.0.113.1, 10.0.0.1"),
        "several": req(_LINE, b"X-Forwarded-For: 1.1.1.1", b"x-forwarded-for: 2.2.2.2"),
        "proto": req(_LINE, b"X-Forwarded-Proto: https", b"X-Forwarded-Host: evil.example"),
        "rest": req(
            _LINE, b"Forwarded: for=1.1.1.1;host=evil", b"X-Real-IP: 1.1.1.1",
            b"X-Forwarded-Port: 1", b"X-Forwarded-Server: evil",
        ),
    },
)  # fmt: skip


def _id_is_ours(seen: Seen, answer: Answer) -> None:
    ids = seen.get("x-request-id")
    assert len(ids) == 1
    assert ids[0].startswith("req_")
    assert answer.get("x-request-id") == ids


row(
    "Forwarding", "an X-Request-Id that cannot be repeated safely",
    Relayed("replaced by one of ours", _id_is_ours),
    {
        "long": req(_LINE, b"X-Request-Id: " + b"x" * 129),
        "latin-1": req(_LINE, b"X-Request-Id: caf\xe9"),
        "tab": req(_LINE, b"X-Request-Id: a\tb"),
        "empty": req(_LINE, b"X-Request-Id:"),
    },
)  # fmt: skip


def _no_key(seen: Seen, answer: Answer) -> None:
    assert KEY not in seen.raw
    assert b"tg_live" not in seen.raw.replace(b"%5F", b"_").replace(b"%5f", b"_")


row(
    "Key", "the key in a header field, wherever it stands and however often",
    Relayed("never sent upstream", _no_key),
    {
        "x-api-key": req(),
        "bearer": req(_LINE, b"Authorization: Bearer " + KEY, key=None),
        "bearer, odd case": req(_LINE, b"aUTHORIZATION: bEARER " + KEY, key=None),
        "both": req(_LINE, b"Authorization: Bearer " + KEY),
        "twice": req(_LINE, b"X-API-Key: " + KEY),
        "spaces": req(_LINE, b"X-API-Key:  \t" + KEY + b"  ", key=None),
        "named": req(_LINE, b"Connection: X-API-Key"),
        "beside a foreign token": req(_LINE, b"Authorization: Bearer foreign"),
    },
)  # fmt: skip
for _query, _left in (
    (b"api_key=" + KEY, ""),
    (b"a=1&api_key=" + KEY + b"&b=2", "?a=1&b=2"),
    (b"api%5Fkey=" + KEY, ""),
    (b"%61%70%69%5f%6b%65%79=" + KEY, ""),
    (b"api_key=" + KEY + b"&api_key=" + KEY, ""),
    (b"api_key=@KEYPERCENT@", ""),
):
    row(
        "Key", f"`?{_query.decode()}`",
        Relayed("the parameter is removed", _no_key, target=f"/echo{_left}"),
        req(b"GET /echo?%b HTTP/1.1" % _query, key=None),
    )  # fmt: skip
row(
    "Key", "the key in a header field and in the query", Relayed("both removed", _no_key),
    req(b"GET /echo?api_key=@KEY@ HTTP/1.1"),
)  # fmt: skip
row(
    "Key", "no key, an unknown one, one with bytes that no key has",
    Refused((401,), closed=False),
    {
        "none": req(key=None),
        "unknown": req(key=b"tg_live_" + b"x" * 30),
        "empty": req(key=b""),
        "latin-1": req(key=b"tg_live_\xff\xfe"),
        "long": req(key=b"tg_live_" + b"x" * 5000),
        "another scheme": req(_LINE, b"Authorization: Basic " + KEY, key=None),
    },
)  # fmt: skip
told(
    "Forwarding", "Forwarded and X-Forwarded-* of a trusted proxy",
    "continued; read from the right, so that a client cannot write its own address",
    "test_a_trusted_proxy_is_believed_and_continued",
)  # fmt: skip
