"""The upstream request head, byte for byte."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.forwarded import TrustedProxies
from gateway.http.errors import BadRequest
from gateway.http.message import Request
from gateway.proxy.headers import check_headers, connection_tokens
from gateway.proxy.request import RequestRules, drop_parameters
from gateway.proxy.rewrite import strip_prefix
from gateway.proxy.target import parse_target


def request(
    *headers: tuple[bytes, bytes],
    method: str = "GET",
    raw_path: bytes = b"/x",
    query: bytes = b"",
    peer: str = "192.0.2.1",
    scheme: str = "http",
    hosts: tuple[bytes, ...] = (b"api.example",),
    version: str = "1.1",
) -> Request:
    named = [(b"host", host) for host in hosts]
    target = raw_path + (b"?" + query if query else b"")
    return Request(method, target, [*named, *headers], peer=peer, scheme=scheme, version=version)


def fields(rules: RequestRules, *headers: tuple[bytes, bytes], **options: Any) -> list[bytes]:
    compiled = rules.head(request(*headers, **options), b"id-1").fields
    assert compiled.endswith(b"\r\n\r\n")
    return compiled[:-4].split(b"\r\n")


def test_the_whole_head() -> None:
    head = RequestRules().head(request((b"accept", b"*/*"), query=b"a=1"), b"id-1")

    assert head.to(parse_target("http://10.0.0.1:9000/base/")) == (
        b"GET /base/x?a=1 HTTP/1.1\r\n"
        b"host: 10.0.0.1:9000\r\n"
        b"accept: */*\r\n"
        b"x-forwarded-for: 192.0.2.1\r\n"
        b"x-forwarded-proto: http\r\n"
        b"x-forwarded-host: api.example\r\n"
        b"x-request-id: id-1\r\n"
        b"\r\n"
    )


def test_hop_by_hop_fields_and_those_connection_names_are_removed() -> None:
    left = fields(
        RequestRules(drop_headers=(b"X-Api-Key",)),
        (b"connection", b"close, X-Hop , host, content-length"),
        (b"x-hop", b"1"),
        (b"x-hopper", b"1"),
        (b"keep-alive", b"1"),
        (b"proxy-authorization", b"1"),
        (b"te", b"trailers"),
        (b"trailer", b"x"),
        (b"upgrade", b"h2c"),
        (b"expect", b"100-continue"),
        (b"x-api-key", b"secret"),
        (b"content-length", b"3"),
        method="POST",
    )
    names = [line.partition(b":")[0] for line in left]
    assert names == [
        b"x-hopper",
        b"x-forwarded-for",
        b"x-forwarded-proto",
        b"x-forwarded-host",
        b"x-request-id",
        b"content-length",
    ]


def test_a_strangers_forwarding_fields_are_replaced() -> None:
    left = fields(
        RequestRules(trusted=TrustedProxies(["10.0.0.0/8"])),
        (b"x-forwarded-for", b"1.1.1.1"),
        (b"x-forwarded-proto", b"https"),
        (b"x-real-ip", b"1.1.1.1"),
        (b"forwarded", b"for=1.1.1.1"),
    )
    assert left[:3] == [
        b"x-forwarded-for: 192.0.2.1",
        b"x-forwarded-proto: http",
        b"x-forwarded-host: api.example",
    ]
    assert b"1.1.1.1" not in b"".join(left)


def test_a_trusted_proxys_forwarding_fields_are_continued() -> None:
    left = fields(
        RequestRules(trusted=TrustedProxies(["10.0.0.0/8"])),
        (b"x-forwarded-for", b"1.1.1.1"),
        (b"x-forwarded-for", b"10.0.0.9"),
        (b"x-forwarded-proto", b"https"),
        (b"forwarded", b"for=1.1.1.1"),
        peer="10.0.0.1",
    )
    assert left[:4] == [
        b"x-forwarded-for: 1.1.1.1, 10.0.0.9, 10.0.0.1",
        b"x-forwarded-proto: https",
        b"forwarded: for=1.1.1.1, for=10.0.0.1;proto=http",
        b"x-forwarded-host: api.example",
    ]


@pytest.mark.parametrize(
    ("forwarded", "chain"),
    [
        ([b"for=1.1.1.1"], b"1.1.1.1, 10.0.0.1"),
        ([b"for=1.1.1.1;proto=https, for=10.0.0.9"], b"1.1.1.1, 10.0.0.9, 10.0.0.1"),
        ([b"for=1.1.1.1", b'For="[2001:DB8::1]:80"'], b"1.1.1.1, 2001:db8::1, 10.0.0.1"),
        ([b'for=1.1.1.1:80, for="_x", by=y'], b"1.1.1.1, unknown, unknown, 10.0.0.1"),
    ],
)
def test_a_trusted_proxy_that_sends_only_forwarded(forwarded: list[bytes], chain: bytes) -> None:
    rules = RequestRules(trusted=TrustedProxies(["10.0.0.0/8"]))
    headers = [(b"forwarded", value) for value in forwarded]
    left = fields(rules, *headers, peer="10.0.0.1")
    assert [line for line in left if line.startswith(b"x-forwarded-for")] == [
        b"x-forwarded-for: " + chain
    ]
    assert left[0].endswith(b", for=10.0.0.1;proto=http")


@pytest.mark.parametrize(
    ("sent", "kept"), [(b"mine", b"mine"), (b"", b"id-1"), (b"x" * 129, b"id-1")]
)
def test_a_usable_request_id_is_kept(sent: bytes, kept: bytes) -> None:
    head = RequestRules().head(request((b"x-request-id", sent)), b"id-1")
    assert head.request_id == kept
    assert head.fields.count(b"x-request-id: " + kept + b"\r\n") == 1


@pytest.mark.parametrize(
    ("headers", "length"),
    [
        ([], 0),
        ([(b"content-length", b"0")], 0),
        ([(b"content-length", b"17")], 17),
        ([(b"transfer-encoding", b"Chunked")], -1),
    ],
)
def test_body_framing(headers: list[tuple[bytes, bytes]], length: int) -> None:
    assert RequestRules().head(request(*headers)).body_length == length


@pytest.mark.parametrize(
    "headers",
    [
        [(b"content-length", b"1"), (b"content-length", b"2")],
        [(b"content-length", b"1"), (b"transfer-encoding", b"chunked")],
        [(b"content-length", b"-1")],
        [(b"content-length", b"1e3")],
        [(b"content-length", b"9" * 40)],
        [(b"transfer-encoding", b"gzip, chunked")],
        [(b"transfer-encoding", b"chunked"), (b"transfer-encoding", b"chunked")],
        [(b"x", b"a\r\nevil: 1")],
        [(b"x", b"a\nevil: 1")],
        [(b"x\r", b"a")],
        [(b"host", b"api.example")],
        [(b"host", b"other")],
    ],
)
def test_unsafe_requests_are_refused(headers: list[tuple[bytes, bytes]]) -> None:
    with pytest.raises(BadRequest):
        RequestRules().head(request(*headers))


@pytest.mark.parametrize(
    "hosts",
    [
        [],
        [b""],
        [b"", b"h"],
        [b"h", b""],
        [b"h, h"],
        [b"h h"],
        [b"u@h"],
        [b"h/x"],
        [b"h\t"],
        [b"h", b"u@h"],
    ],
)
def test_a_request_names_exactly_one_host(hosts: list[bytes]) -> None:
    rules = RequestRules()
    asked = request(hosts=tuple(hosts))
    for _ in range(2):
        with pytest.raises(BadRequest, match="Host"):
            rules.head(asked)


def test_hosts_that_may_be() -> None:
    rules = RequestRules()
    for host in (b"h", b"h:80", b"[::1]:8080", b"my_host.example.", b"192.0.2.1"):
        head = rules.head(request(hosts=(host,)))
        assert b"x-forwarded-host: " + host + b"\r\n" in head.fields


@pytest.mark.parametrize("hosts", [(), (b"",)])
def test_http_1_0_may_leave_the_host_out(hosts: tuple[bytes, ...]) -> None:
    asked = request(hosts=hosts, version="1.0")
    assert b"x-forwarded-host: \r\n" in RequestRules().head(asked).fields


OURS = b"tg_live_abcdef"
KEYS = (b"authorization", b"X-Api-Key")


@pytest.mark.parametrize(
    ("header", "kept"),
    [
        ((b"authorization", b"Bearer " + OURS), False),
        ((b"authorization", b"bearer   " + OURS), False),
        ((b"authorization", OURS), False),
        ((b"authorization", b"Token " + OURS), False),
        ((b"authorization", b"Bearer eyJ0"), True),
        ((b"authorization", b"Basic dTpw"), True),
        ((b"x-api-key", OURS), False),
        ((b"x-api-key", b" " + OURS), False),
        ((b"x-api-key", b"theirs"), True),
        ((b"x-other", OURS), True),
    ],
)
def test_a_key_field_that_was_not_used_goes_only_with_a_key(
    header: tuple[bytes, bytes], kept: bool
) -> None:
    left = fields(RequestRules(key_headers=KEYS), header)
    assert (b": ".join(header) in left) is kept


def test_the_field_that_was_used_goes_whatever_it_holds() -> None:
    rules = RequestRules(drop_headers=(b"X-Api-Key",), key_headers=KEYS)
    left = fields(
        rules, (b"x-api-key", b"theirs"), (b"x-api-key", OURS), (b"authorization", b"Basic dTpw")
    )
    assert [line for line in left if line.startswith((b"x-api", b"auth"))] == [
        b"authorization: Basic dTpw"
    ]


def test_connection_removes_a_kept_key_field_too() -> None:
    headers = ((b"connection", b"x-api-key"), (b"x-api-key", b"theirs"))
    for order in (headers, headers[::-1]):
        left = fields(RequestRules(key_headers=KEYS), *order)
        assert b"x-api-key: theirs" not in left


@pytest.mark.parametrize(
    ("raw", "rest"),
    [
        (b"/weather/today", b"/today"),
        (b"/weather", b"/"),
        (b"/weather/", b"/"),
        (b"/weather//a%2Fb", b"//a%2Fb"),
        (b"/weatherman", b"/weatherman"),
        (b"/%77eather/%41", b"/%41"),
        (b"/w%65ath%65r", b"/"),
        (b"/%77", b"/%77"),
        (b"/other", b"/other"),
        (b"*", b"*"),
    ],
)
def test_the_prefix_goes_at_a_segment_boundary(raw: bytes, rest: bytes) -> None:
    assert strip_prefix(raw, b"/weather") == rest


def test_dropped_parameters_go_however_they_are_spelled() -> None:
    names = frozenset((b"api_key",))
    assert drop_parameters(b"a=%20&api_key=1&b&%61pi_key=2&api_keys=3", names) == (
        b"a=%20&b&api_keys=3"
    )


def test_parameters_that_may_hold_a_key_go_only_with_one() -> None:
    names = frozenset((b"key[]",))
    query = b"key[]=theirs&key%5B%5D=tg_live_1&key[]=tg%5Flive_2&a=tg_live_3"
    assert drop_parameters(query, frozenset(), names) == b"key[]=theirs&a=tg_live_3"


def test_options_asterisk_has_no_base() -> None:
    head = RequestRules().head(request(method="OPTIONS", raw_path=b"*"))
    assert head.to(parse_target("http://h/base")).startswith(b"OPTIONS * HTTP/1.1\r\nhost: h\r\n")


@pytest.mark.parametrize(
    ("url", "authority"),
    [
        ("http://h", b"h"),
        ("http://h:80/", b"h"),
        ("http://[::1]:81", b"[::1]:81"),
        ("https://h", b"h"),
        ("https://h:80", b"h:80"),
        ("unix:///run/a.sock", b"localhost"),
    ],
)
def test_targets(url: str, authority: bytes) -> None:
    assert parse_target(url).authority == authority


@pytest.mark.parametrize(
    "url", ["ftp://h", "h:80", "http://", "http://u@h", "http://h/?q", "unix://a/b", "unix:a"]
)
def test_unusable_targets(url: str) -> None:
    with pytest.raises(ValueError, match="upstream URL"):
        parse_target(url)


@pytest.mark.parametrize(
    ("name", "value"),
    [(b"", b"x"), (b"a b", b"x"), (b"a:", b"x"), (b"a", b"x\r\ny"), (b"a", b"\0"), (b"a", b"\x7f")],
)
def test_header_bytes_that_could_split_are_refused(name: bytes, value: bytes) -> None:
    with pytest.raises(BadRequest):
        check_headers([(name, value)])


def test_header_bytes_that_may_pass() -> None:
    check_headers([(b"ratelimit", b'"daily";r=1;t=2'), (b"x-a", b"\ttab \xe9")])


def test_connection_options() -> None:
    assert connection_tokens(b"Keep-Alive,, X-A ,HOST") == (b"keep-alive", b"x-a")
