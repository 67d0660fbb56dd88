"""The shapes of requests that are compared: what a client may legally ask of an application.

A shape is complete but for Host, the API key and the framing of its body, which differ by way.
"""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass
from itertools import count

Field = tuple[str, bytes]


@dataclass(frozen=True)
class Shape:
    """One request.

    `chunks` frames the body as chunked, with these sizes; a size of 0 is not a chunk.
    `volatile` names fields of the answer that differ between any two answers.
    """

    name: str
    method: str
    target: str
    fields: tuple[Field, ...] = ()
    body: bytes | None = None
    chunks: tuple[int, ...] = ()
    volatile: frozenset[bytes] = frozenset()

    def raw(self, *more: Field) -> bytes:
        """The request on the wire, with further fields before its own."""
        lines = [f"{self.method} {self.target} HTTP/1.1".encode("latin-1")]
        lines += [name.encode() + b": " + value for name, value in (*more, *self.fields)]
        body = self.body
        if body is None:
            return b"\r\n".join([*lines, b"", b""])
        if not self.chunks:
            lines.append(b"Content-Length: %d" % len(body))
            return b"\r\n".join([*lines, b"", body])
        lines.append(b"Transfer-Encoding: chunked")
        parts, at = [], 0
        for size in self.chunks:
            piece = body[at : at + size]
            at += size
            if piece:
                parts.append(b"%x\r\n%b\r\n" % (len(piece), piece))
        rest = body[at:]
        if rest:
            parts.append(b"%X\r\n%b\r\n" % (len(rest), rest))
        return b"\r\n".join([*lines, b"", b"".join(parts) + b"0\r\n\r\n"])


_numbers = count(1)
SHAPES: list[Shape] = []


def _add(
    method: str,
    target: str,
    *fields: tuple[str, str | bytes],
    body: bytes | None = None,
    chunks: tuple[int, ...] = (),
    volatile: tuple[str, ...] = (),
) -> None:
    pairs = tuple((n, v if isinstance(v, bytes) else v.encode("latin-1")) for n, v in fields)
    shown = target if len(target) < 48 else f"{target[:40]}..{len(target)}"
    SHAPES.append(
        Shape(
            f"{next(_numbers):03} {method} {shown}",
            method,
            target,
            pairs,
            body,
            chunks,
            frozenset(name.encode() for name in volatile),
        )
    )


BINARY = bytes(range(256)) * 3
LARGE = b"0123456789abcdef" * 20_000  # 320 kB: more than any buffer on the way

# Methods, with and without a body
for _method in ("GET", "POST", "PUT", "DELETE", "PATCH", "TRACE"):
    if _method != "TRACE":
        _add(_method, "/anything", body=b"")
        _add(_method, "/anything", body=b"plain")
        _add(_method, "/anything", body=b"plain", chunks=(2, 3))
    _add(_method, "/anything?show_env=1")
for _path in ("/get", "/post", "/put", "/patch", "/delete", "/nowhere", "/status/200"):
    for _method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
        if _path != "/nowhere" or _method != "DELETE":
            _add(_method, _path)  # mostly 405 with Allow
_add("HEAD", "/get", volatile=("content-length",))  # that of an echo
for _path in ("/post", "/bytes/5?seed=1", "/stream/3", "/image/png", "/status/404", "/html"):
    _add("HEAD", _path)
for _path in ("/get", "/anything", "/cookies", "/nowhere"):
    _add("OPTIONS", _path)
_add(
    "OPTIONS",
    "/anything",
    ("Access-Control-Request-Headers", "x-one, x-two"),
    ("Origin", "http://a"),
)
_add("PROPFIND", "/anything")
_add("PURGE", "/anything")

# Bodies
_JSON = json.dumps({"a": [1, 2.5, None, "é"], "b": {"c": True}}).encode()
_add("POST", "/post", ("Content-Type", "application/json"), body=_JSON)
_add("POST", "/post", ("Content-Type", "application/json"), body=_JSON, chunks=(1, 1, 1))
_add("POST", "/post", ("Content-Type", "application/json"), body=b"{broken")
_FORM = ("Content-Type", "application/x-www-form-urlencoded")
_add("POST", "/post", _FORM, body=b"a=1&b=2&b=3&c=%C3%A9&d=x+y")
_add("POST", "/post", _FORM, body=b"")
_add("PUT", "/put", _FORM, body=b"&&=&a&=b")
_MULTIPART = (
    b'--frontier\r\nContent-Disposition: form-data; name="field"\r\n\r\nvalue\r\n'
    b'--frontier\r\nContent-Disposition: form-data; name="file"; filename="a.bin"\r\n'
    b"Content-Type: application/octet-stream\r\n\r\n" + BINARY + b"\r\n--frontier--\r\n"
)
_MULTI = ("Content-Type", "multipart/form-data; boundary=frontier")
_add("POST", "/post", _MULTI, body=_MULTIPART)
_add("POST", "/post", _MULTI, body=_MULTIPART, chunks=(100, 7, 300))
_add("POST", "/post", ("Content-Type", "application/octet-stream"), body=BINARY)
_add("POST", "/post", ("Content-Encoding", "gzip"), body=gzip.compress(b"zipped" * 50, mtime=0))
_add("POST", "/post", ("Content-Encoding", "deflate"), body=zlib.compress(b"deflated" * 50))
_add("POST", "/post", ("Content-Type", "text/plain; charset=utf-8"), body="žluťoučký".encode())
for _size in (1, 8191, 8192, 65_535, 65_536, 65_537, 131_072):
    _add("POST", "/post", body=b"s" * _size)
_add("POST", "/post", body=LARGE)
_add("POST", "/post", body=LARGE, chunks=(1, 65_536, 100_000))
_add("POST", "/post", body=LARGE, chunks=(4096,) * 70)
_add("POST", "/post", body=b"x" * 300, chunks=(1,) * 300)
_add("PUT", "/put", body=BINARY, chunks=(255, 1, 256))
_add("POST", "/post", body=b"GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n")
_add("POST", "/post", body=b"0\r\n\r\nGET /smuggled HTTP/1.1\r\n\r\n")
_add("POST", "/post", body=b"5\r\nhello\r\n0\r\n\r\n", chunks=(3,))
_add("POST", "/post", ("Expect", "100-continue"), body=b"waits for nobody")
_add("POST", "/status/500", body=b"ignored by the application")
_add("POST", "/redirect-to?url=/get&status_code=307", body=b"ignored")

# Answers: encodings, ranges, redirects, images, streams
for _path in ("/gzip", "/deflate", "/brotli"):
    _add("GET", _path)
    _add("GET", _path, ("Accept-Encoding", "gzip, deflate, br;q=0.5, *;q=0"))
for _range in (
    *("bytes=0-9", "bytes=10-", "bytes=-5", "bytes=99-200", "bytes=200-300", "bytes=5-2"),
    *("bytes=0-0", "bytes=0-1,5-6", "items=0-1", "nonsense", ""),
):
    _add("GET", "/range/100", ("Range", _range))
_add("GET", "/range/1000?chunk_size=10")
_add("GET", "/range/1000?chunk_size=1", ("If-Range", '"other"'), ("Range", "bytes=1-2"))
_add("GET", "/range/102400?chunk_size=1024")
for _path in (
    *("/redirect/1", "/redirect/3", "/relative-redirect/2", "/absolute-redirect/2"),
    "/redirect-to?url=http://example.com/%3Fa%3D1%26b%3D2",
    "/redirect-to?url=/a%20b%C3%A9&status_code=308",
    "/redirect-to?url=//other.example/&status_code=303",
):
    _add("GET", _path)
for _status in (
    *(200, 201, 202, 203, 204, 205, 206, 207, 208, 226, 300, 301, 302, 303, 304, 305, 307, 308),
    *(400, 401, 402, 403, 404, 405, 406, 407, 408, 409, 410, 411, 412, 413, 414, 415, 416, 417),
    *(418, 421, 422, 423, 424, 425, 426, 428, 429, 431, 451, 500, 501, 502, 503, 504, 505, 507),
    *(508, 510, 511, 299, 399, 499, 599),
):
    _add("GET", f"/status/{_status}")
for _status in (200, 204, 304, 404, 500):
    _add("HEAD", f"/status/{_status}")
    _add("POST", f"/status/{_status}", body=b"with a body")
for _path in (
    *("/html", "/robots.txt", "/deny", "/encoding/utf8", "/xml", "/json", "/ip", "/user-agent"),
    *("/image/png", "/image/jpeg", "/image/webp", "/image/svg", "/links/5/0", "/links/3"),
    *("/forms/post", "/base64/SGVsbG8gd29ybGQ=", "/base64/!", "/static/favicon.ico", "/"),
):
    _add("GET", _path)
for _accept in ("image/webp", "image/*", "text/plain", "image/svg+xml;q=0.1, image/png"):
    _add("GET", "/image", ("Accept", _accept))
for _path in (
    *("/stream/1", "/stream/20", "/stream/100", "/bytes/0?seed=1", "/bytes/1?seed=1"),
    *("/bytes/65535?seed=2", "/bytes/65536?seed=3", "/bytes/65537?seed=4", "/bytes/102400?seed=5"),
    *("/stream-bytes/1?seed=1", "/stream-bytes/102400?seed=1&chunk_size=1000"),
    *("/stream-bytes/500?seed=7&chunk_size=1", "/stream-bytes/0?seed=7"),
    *("/drip?duration=0.2&numbytes=5&delay=0.05", "/drip?duration=0.1&numbytes=1000&code=206"),
    *("/drip?numbytes=0", "/delay/0.2", "/drip?duration=0.2&numbytes=4&code=500"),
):
    _add("GET", _path)
_add("POST", "/delay/0.1", body=b"slow")

# Conditional requests and caching
_add("GET", "/etag/abc")
_add("GET", "/etag/abc", ("If-None-Match", '"abc"'))
_add("GET", "/etag/abc", ("If-None-Match", 'W/"abc", "def"'))
_add("GET", "/etag/abc", ("If-None-Match", "*"))
_add("GET", "/etag/abc", ("If-Match", '"other"'))
_add("GET", "/etag/abc", ("If-Match", "*"))
_add("GET", "/cache/60")
_add("GET", "/cache", volatile=("last-modified", "etag"))
_add("GET", "/cache", ("If-Modified-Since", "Tue, 15 Nov 1994 12:45:26 GMT"))

# Cookies
_add("GET", "/cookies", ("Cookie", "a=1; b=2; c=x%3Dy"))
_add("GET", "/cookies", ("Cookie", "a=1"), ("Cookie", "b=2"))
_add("GET", "/cookies", ("Cookie", ""))
_add("GET", "/cookies", ("Cookie", 'q="quoted; value"; =none; novalue'))
_add("GET", "/cookies/set?one=1&two=2&three=3")
_add("GET", "/cookies/set/name/a%20value%3Bwith")
_add("GET", "/cookies/delete?one&two", ("Cookie", "one=1; two=2"))
_add("GET", "/response-headers?Set-Cookie=a%3D1&Set-Cookie=b%3D2&Set-Cookie=a%3D3")

# Fields of answers
_add("GET", "/response-headers?X-Empty=&X-Twice=1&X-Twice=2&X-twice=3")
_add("GET", "/response-headers?X-Long=" + "v" * 6000)
_add("GET", "/response-headers?X-Latin=%C3%A9")
_add("GET", "/response-headers?Server=its-own&Via=1.1+cache&Warning=199+-+x")
_add("GET", "/response-headers?Content-Type=text/x-odd;+charset=%22q%22")
_add("GET", "/response-headers?Vary=*&Link=%3C/a%3E;rel=next&Link=%3C/b%3E;rel=prev")
_add("GET", "/response-headers?X-Request-Id=theirs&RateLimit=theirs&X-RateLimit-Limit=7")
_add("GET", "/response-headers?Retry-After=5&Age=3&Allow=GET")
_add("GET", "/response-headers?Proxy-Authenticate=Basic&WWW-Authenticate=Bearer")
_add("GET", "/response-headers?" + "&".join(f"X-N{n}={n}" for n in range(60)))

# Fields of requests
for _fields in (
    [("X-Empty", "")],
    [("X-Twice", "1"), ("X-Other", "-"), ("X-Twice", "2"), ("x-twice", "1")],
    [("x-CaSe", "MiXed"), ("ACCEPT", "*/*")],
    [("X-Long", "v" * 7000)],
    [("X-Latin", b"caf\xe9 \xff")],
    [("X-Utf8", "žluť".encode())],
    [("X-Spaces", "  a \t b  ")],
    [("X-Punctuation", "!#$%&'()*+,-./:;<=>?@[\\]^_`{|}~\"")],
    [("X-!#$%&'*+.^`|~9", "odd name")],
    [("X-Tab", "a\tb")],
    [("User-Agent", "x" * 1000)],
    [("Accept", "text/html"), ("Accept", "text/plain;q=0.5")],
    [("Accept-Language", "de, en;q=0.8"), ("Accept-Charset", "utf-8")],
    [("Referer", "http://example.com/a?b#c"), ("Origin", "null")],
    [("Authorization", "Basic dXNlcjpwYXNz")],
    [("Authorization", "Bearer somebody-elses-token")],
    [("Authorization", 'Digest username="u", realm="r", nonce="n", uri="/", response="0"')],
    [("Via", "1.0 fred, 1.1 p.example"), ("Max-Forwards", "3")],
    [("Cache-Control", "no-cache"), ("Pragma", "no-cache")],
    [("X-Forwarded-For", "203.0.113.9"), ("X-Forwarded-Proto", "https")],
    [("Forwarded", "for=203.0.113.9;proto=https"), ("X-Real-IP", "203.0.113.9")],
    [("X-Forwarded-Host", "evil.example"), ("X-Forwarded-Port", "1")],
    [("X-Request-Id", "given-by-the-client")],
    [("X-Request-Id", "x" * 300)],
    [("TE", "trailers"), ("Connection", "TE")],
    [("Connection", "X-Hop, keep-alive"), ("X-Hop", "1"), ("X-End", "2")],
    [("Keep-Alive", "timeout=5"), ("Connection", "keep-alive")],
    [("Proxy-Connection", "keep-alive"), ("Proxy-Authorization", "Basic eA==")],
    [("Upgrade", "foo/2"), ("Connection", "upgrade")],
    [("Traceparent", "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01")],
    [(f"X-N{n}", str(n)) for n in range(60)],
    [("If-Unmodified-Since", "not a date"), ("Date", "Tue, 15 Nov 1994 08:12:31 GMT")],
    [("Content-Type", "application/json")],
    [("DNT", "1"), ("Sec-Fetch-Mode", "cors"), ("Priority", "u=1, i")],
):
    _add("GET", "/anything?show_env=1", *_fields)
    _add("POST", "/anything?show_env=1", *_fields, body=b"and a body", chunks=(4,))
_add("GET", "/basic-auth/user/pass", ("Authorization", "Basic dXNlcjpwYXNz"))
_add("GET", "/basic-auth/user/pass", ("Authorization", "Basic d3Jvbmc6cGFzcw=="))
_add("GET", "/basic-auth/user/pass")
_add("GET", "/hidden-basic-auth/user/pass")
_add("GET", "/bearer", ("Authorization", "Bearer opaque"))
_add("GET", "/bearer")

# URLs
for _target in (
    *(
        "/anything/a%20b",
        "/anything/%C3%A9",
        "/anything/%c3%a9",
        "/anything/a%2Fb",
        "/anything/a%2fb",
    ),
    *("/anything/a;params=1", "/anything/a;p=1;q=2/b;r", "/anything//double", "/anything/a//b///c"),
    *("/anything?", "/anything/?", "/anything??", "/anything?a?b", "/anything?a=1?b=2"),
    *("/anything?a", "/anything?a=", "/anything?=a", "/anything?&&", "/anything?a=1&a=2&a"),
    *(
        "/anything?a=%20&b=+&c=%2B",
        "/anything?%C3%A9=%E2%82%AC",
        "/anything?a=%00",
    ),
    *("/anything/%25", "/anything/%2525", "/anything/%7Euser", "/anything/~user", "/anything/%41"),
    *(
        "/anything/a:b@c",
        "/anything/!$&'()*+,;=",
        "/anything/a|b",
        "/anything/%5Cb",
        '/anything/"q"',
    ),
    *("/anything?a=[1]&b={2}", "/anything?a=b;c=d", "/anything?a=b%26c=d", "/anything?a=%zz"),
    *("/anything?a=%0d%0aX:1",),
    *(
        "/anything/...",
        "/anything/.hidden",
        "/anything/a..b",
        "/anything/trailing/",
        "/anything/a.",
    ),
    *("/anything/" + "s" * 3000, "/anything?q=" + "q" * 6000, "/anything/" + "a/" * 500),
    *("/anything?http://x.example/", "/anything/http://x.example/", "/Anything", "/ANYTHING"),
    *("/anything/%F0%9F%98%80?%F0%9F%98%80", "/anything?x-api-key=not-a-key", "/anything?a#b"),
):
    if "#" not in _target:  # a fragment is not part of a request
        _add("GET", _target)
_add("POST", "/anything?a=1&b=%20;c", body=b"q")
_add("GET", "/links/10/3")

# Paths that are refused, as they have no honest reading: see docs/routes.md.
REFUSED = (
    *("/anything/%00", "/anything/%zz", "/anything/%", "/anything/%a", "/anything/a%0d%0ab"),
    *("/anything/../get", "/anything/%2e%2e/get", "//anything", "/anything/a\\b", "/anything/%ff"),
)
