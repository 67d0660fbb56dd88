"""Where one request ends and the next begins: the tricks of request smuggling."""

from __future__ import annotations

from tests.hardening.rows import Refused, Relayed, post, req, row
from tests.support.http1 import Answer
from tests.support.recorder import Seen

SECTION = "Framing"
_SMUGGLED = b"GET /smuggled HTTP/1.1\r\nHost: x\r\n\r\n"
_BAD = Refused((400,))
_CODING = Refused((400, 501))
# A body that is found to be broken was maybe admitted before, where it came in a later packet.
_BROKEN = Refused((400,), may_count=True)
_CHUNKED = b"Transfer-Encoding: chunked"

row(
    SECTION, "Content-Length and Transfer-Encoding, in either order", _BAD,
    {
        "CL.TE": post(b"Content-Length: 6", _CHUNKED, body=b"0\r\n\r\nG"),
        "TE.CL": post(_CHUNKED, b"Content-Length: 4", body=b"5c\r\n" + _SMUGGLED + b"0\r\n\r\n"),
        "CL 0": post(_CHUNKED, b"Content-Length: 0", body=b"0\r\n\r\n"),
        "TE.TE.CL": post(_CHUNKED, b"Content-Length: 3", _CHUNKED, body=b"0\r\n\r\n"),
    },
)  # fmt: skip
row(
    SECTION, "more than one Content-Length, equal or not, also as a list", _BAD,
    {
        "different": post(b"Content-Length: 3", b"Content-Length: 39", body=b"abc" + _SMUGGLED),
        "same": post(b"Content-Length: 3", b"Content-Length: 3", body=b"abc"),
        "apart": post(b"Content-Length: 3", b"X-A: b", b"content-length: 0", body=b"abc"),
        "list": post(b"Content-Length: 3, 3", body=b"abc"),
        "list of different": post(b"Content-Length: 3, 5", body=b"abcde"),
    },
)  # fmt: skip
row(
    SECTION, "a Content-Length that is not digits only, or is beyond 64 bits", _BAD,
    {
        text: post(b"Content-Length: " + text.encode("latin-1"), body=b"abc")
        for text in (
            *("+3", "-3", "-0", "0x3", "3a", "3 3", "3;", "3.0", "3e0", "\xb2", "", "three", "1_0"),
            *("18446744073709551616", "18446744073709551619", "9" * 40, '"3"', "3\x0b", "3\x00"),
        )
    },
)  # fmt: skip
row(
    SECTION, "a Content-Length with spaces around it or leading zeros",
    Relayed("read as the number that it is", target="/echo", body=b"abc"),
    {
        "spaces": post(b"Content-Length:   3  ", body=b"abc"),
        "tab": post(b"Content-Length:\t3\t", body=b"abc"),
        "zeros": post(b"Content-Length: 0003", body=b"abc"),
        "no space": post(b"Content-Length:3", body=b"abc"),
    },
)  # fmt: skip
row(
    SECTION, "a Transfer-Encoding other than `chunked`, or twice", _CODING,
    {
        text: post(b"Transfer-Encoding: " + text.encode("latin-1"), body=b"3\r\nabc\r\n0\r\n\r\n")
        for text in (
            *("xchunked", "chunkedx", "chunked, identity", "identity", "identity, chunked"),
            *("chunked, chunked", "gzip", "gzip, chunked", "chunked;q=1", '"chunked"', "chunked,"),
            *(",chunked", "cow", "", "chunked\x0b", "\x0bchunked", "chunked\x00", "ch\xfcnked"),
            *("chunk", "c hunked", "chunked chunked", "identity, chunked, identity"),
        )
    }
    | {
        "two fields": post(_CHUNKED, _CHUNKED, body=b"0\r\n\r\n"),
        "identity first": post(b"Transfer-Encoding: identity", _CHUNKED, body=b"0\r\n\r\n"),
        "identity last": post(_CHUNKED, b"Transfer-Encoding: identity", body=b"0\r\n\r\n"),
        "with a length": post(b"Transfer-Encoding: cow", b"Content-Length: 3", body=b"abc"),
        "in 1.0": req(b"POST /echo HTTP/1.0", _CHUNKED, body=b"3\r\nabc\r\n0\r\n\r\n"),
    },
)  # fmt: skip
row(
    SECTION, "Transfer-Encoding written oddly: space before the colon, folded, split", _BAD,
    {
        "space": post(b"Transfer-Encoding : chunked", body=b"0\r\n\r\n"),
        "tab": post(b"Transfer-Encoding\t: chunked", body=b"0\r\n\r\n"),
        "folded": post(b"Transfer-Encoding:\r\n chunked", body=b"0\r\n\r\n"),
        "leading": post(b"X-A: b\r\n Transfer-Encoding: chunked", body=b"0\r\n\r\n"),
        "bare CR": post(b"X: y\rTransfer-Encoding: chunked", body=b"0\r\n\r\n"),
        "bare LF": post(b"X: y\nTransfer-Encoding: chunked", body=b"0\r\n\r\n"),
        "NUL": post(b"Transfer-Encoding\x00: chunked", body=b"0\r\n\r\n"),
    },
)  # fmt: skip
row(
    SECTION, "`chunked` in other letters or with spaces around it",
    Relayed("read as chunked, passed on as `chunked`", body=b"abc"),
    {
        "upper": post(b"Transfer-Encoding: CHUNKED", body=b"3\r\nabc\r\n0\r\n\r\n"),
        "mixed": post(b"tRANSFER-eNCODING: Chunked", body=b"3\r\nabc\r\n0\r\n\r\n"),
        "spaces": post(b"Transfer-Encoding:  \t chunked", body=b"3\r\nabc\r\n0\r\n\r\n"),
    },
)  # fmt: skip
row(
    SECTION, "`chunked` with spaces after it", _BROKEN,
    post(b"Transfer-Encoding: chunked \t ", body=b"3\r\nabc\r\n0\r\n\r\n"),
    note="legal, but llhttp is stricter",
)  # fmt: skip


def _plain_chunks(seen: Seen, answer: Answer) -> None:
    assert b";" not in seen.raw.partition(b"\r\n\r\n")[2]
    assert b"smuggled" not in seen.raw


row(
    SECTION, "chunk extensions", Relayed("dropped; the data goes on", _plain_chunks, body=b"abc"),
    {
        "name": post(_CHUNKED, body=b"3;x\r\nabc\r\n0\r\n\r\n"),
        "value": post(_CHUNKED, body=b"3;x=y\r\nabc\r\n0;last\r\n\r\n"),
        "quoted": post(_CHUNKED, body=b'3;x="a;b"\r\nabc\r\n0\r\n\r\n'),
    },
)  # fmt: skip
row(
    SECTION, "chunk extensions that hide a line end or never stop", _BROKEN,
    {
        "LF": post(_CHUNKED, body=b"3;x\nabc\r\n0\r\n\r\n"),
        "LF then size": post(_CHUNKED, body=b"2;\nxx\r\n4c\r\n0\r\n\r\n" + _SMUGGLED),
        "CR": post(_CHUNKED, body=b"3;x\rabc\r\n0\r\n\r\n"),
        "quoted LF": post(_CHUNKED, body=b'3;x="\n"\r\nabc\r\n0\r\n\r\n'),
        "NUL": post(_CHUNKED, body=b"3;x=\x00\r\nabc\r\n0\r\n\r\n"),
        "100 kB": post(_CHUNKED, body=b"3;" + b"x" * 100_000 + b"\r\nabc\r\n0\r\n\r\n"),
    },
)  # fmt: skip
row(
    SECTION, "a chunk size that is no plain hexadecimal number, or beyond 64 bits", _BROKEN,
    {
        text: post(_CHUNKED, body=text.encode("latin-1") + b"\r\nabc\r\n0\r\n\r\n")
        for text in (
            *("-3", "+3", "0x3", "g", "", " 3", "\t3", "3 3", "3.", "\xb3", "3\x00", "x", ";"),
            *("10000000000000003", "fffffffffffffffff3", "F" * 30),
        )
    },
)  # fmt: skip
row(
    SECTION, "chunks without the CR LF that ends a size or the data", _BROKEN,
    {
        "size LF": post(_CHUNKED, body=b"3\nabc\r\n0\r\n\r\n"),
        "size CR": post(_CHUNKED, body=b"3\rabc\r\n0\r\n\r\n"),
        "size CR CR LF": post(_CHUNKED, body=b"3\r\r\nabc\r\n0\r\n\r\n"),
        "data LF": post(_CHUNKED, body=b"3\r\nabc\n0\r\n\r\n"),
        "data CR": post(_CHUNKED, body=b"3\r\nabc\r0\r\n\r\n"),
        "data none": post(_CHUNKED, body=b"3\r\nabc0\r\n\r\n"),
        "data longer": post(_CHUNKED, body=b"3\r\nabcdef\r\n0\r\n\r\n"),
        "data shorter": post(_CHUNKED, body=b"5\r\nabc\r\n0\r\n\r\n" + _SMUGGLED),
        "last LF": post(_CHUNKED, body=b"3\r\nabc\r\n0\n\n"),
        "end LF": post(_CHUNKED, body=b"3\r\nabc\r\n0\r\n\n"),
    },
)  # fmt: skip


def _no_trailer_in_head(seen: Seen, answer: Answer) -> None:
    assert not seen.get("x-trailed")
    assert b"evil" not in seen.raw.partition(b"\r\n\r\n")[0]
    assert len(seen.get("host")) == 1
    assert seen.get("transfer-encoding") == ["chunked"]
    names = {name for name, _ in seen.trailers}
    assert names <= {b"x-trailed"}, "framing and routing fields are never trailers"


row(
    SECTION, "trailers, also such as may only stand in a head",
    Relayed("never become fields of the head", _no_trailer_in_head, body=b"abc"),
    {
        "plain": post(
            _CHUNKED, b"Trailer: X-Trailed", body=b"3\r\nabc\r\n0\r\nX-Trailed: 1\r\n\r\n"
        ),
        "framing": post(
            _CHUNKED,
            body=b"3\r\nabc\r\n0\r\nHost: evil\r\nAuthorization: evil\r\nForwarded: evil\r\n\r\n",
        ),
        "key": post(_CHUNKED, body=b"3\r\nabc\r\n0\r\nX-API-Key: evil\r\nConnection: evil\r\n\r\n"),
    },
)  # fmt: skip
row(
    SECTION, "framing fields and malformed lines in trailers", _BROKEN,
    {
        "no colon": post(_CHUNKED, body=b"3\r\nabc\r\n0\r\nnonsense\r\n\r\n"),
        "space": post(_CHUNKED, body=b"3\r\nabc\r\n0\r\nX-A : b\r\n\r\n"),
        "folded": post(_CHUNKED, body=b"3\r\nabc\r\n0\r\nX-A: b\r\n c\r\n\r\n"),
        "LF": post(_CHUNKED, body=b"3\r\nabc\r\n0\r\nX-A: b\n\r\n"),
        "NUL": post(_CHUNKED, body=b"3\r\nabc\r\n0\r\nX-A: \x00\r\n\r\n"),
        "length": post(_CHUNKED, body=b"3\r\nabc\r\n0\r\nContent-Length: 40\r\n\r\n"),
        "coding": post(_CHUNKED, body=b"3\r\nabc\r\n0\r\nTransfer-Encoding: chunked\r\n\r\n"),
        "endless": post(_CHUNKED, body=b"3\r\nabc\r\n0\r\n" + b"X-A: b\r\n" * 20_000 + b"\r\n"),
    },
)  # fmt: skip
row(
    SECTION, "a body with GET, HEAD, DELETE or OPTIONS",
    Relayed("framed like any other", body=_SMUGGLED),
    {
        method: req(
            f"{method} /echo HTTP/1.1".encode(), b"Content-Length: %d" % len(_SMUGGLED),
            body=_SMUGGLED,
        )
        for method in ("GET", "HEAD", "DELETE", "OPTIONS")
    },
)  # fmt: skip
row(
    SECTION, "a request in the body of a request that is refused (401)",
    Refused((401,), closed=False),
    {
        "length": req(
            b"POST /echo HTTP/1.1", b"Content-Length: %d" % len(_SMUGGLED),
            body=_SMUGGLED, key=b"tg_live_wrong",
        ),
        "chunked": req(
            b"POST /echo HTTP/1.1", _CHUNKED,
            body=b"%x\r\n%b\r\n0\r\n\r\n" % (len(_SMUGGLED), _SMUGGLED), key=b"tg_live_wrong",
        ),
    },
    note="the body is read and dropped, or the connection closed",
)  # fmt: skip
