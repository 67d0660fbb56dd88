"""What is about a connection rather than one request: limits, time, order, and answers."""

from __future__ import annotations

from tests.hardening.rows import Refused, Relayed, post, req, row, told

SECTION = "Limits and time"
_LINE = b"GET /echo HTTP/1.1"

row(
    SECTION, "request line and fields together over 64 KiB (`gateway.client.max_head`)",
    Refused((431,)),
    {
        "one field": req(_LINE, b"X-A: " + b"a" * 70_000),
        "an endless one": req(_LINE, b"X-A: " + b"a" * 300_000),
        "many": req(_LINE, *(b"X-%d: %b" % (n, b"a" * 700) for n in range(100))),
        "a name": req(_LINE, b"X" * 70_000 + b": a"),
    },
)  # fmt: skip
row(
    SECTION, "more than 128 fields (`max_fields`)", Refused((431,)),
    {
        "129": req(_LINE, *(b"X-%d: a" % n for n in range(127))),
        "10000": req(_LINE, *(b"a: b" for n in range(10_000))),
    },
)  # fmt: skip
row(
    SECTION, "128 fields, or a field of 60 kB", Relayed("passed on"),
    {
        "128": req(_LINE, *(b"X-%d: a" % n for n in range(126))),
        "60 kB": req(_LINE, b"X-A: " + b"a" * 60_000),
    },
)  # fmt: skip
row(
    SECTION, "path and query over 16 KiB (`max_url`)", Refused((414, 431)),
    {
        "path": req(b"GET /echo/" + b"a" * 17_000 + b" HTTP/1.1"),
        "query": req(b"GET /echo?" + b"a" * 30_000 + b" HTTP/1.1"),
        "endless": req(b"GET /" + b"a" * 200_000 + b" HTTP/1.1"),
    },
)  # fmt: skip
_SMALL = b"POST /small/x HTTP/1.1"
_CHUNKED = b"Transfer-Encoding: chunked"
row(
    SECTION, "a body over the route's `max_body`, announced or not",
    Refused((413,), closed=False, may_count=True),
    {
        "length": req(_SMALL, b"Content-Length: 1025", body=b"x" * 1025),
        "length only": req(_SMALL, b"Content-Length: 999999999999", body=b"x"),
        "expect": req(_SMALL, b"Content-Length: 1025", b"Expect: 100-continue"),
        "chunks": req(_SMALL, _CHUNKED, body=b"401\r\n" + b"x" * 1025 + b"\r\n0\r\n\r\n"),
        "many": req(_SMALL, _CHUNKED, body=b"1\r\nx\r\n" * 1100 + b"0\r\n\r\n"),
        "a large one": req(_SMALL, _CHUNKED, body=b"ffffffff\r\n" + b"x" * 100_000),
    },
    note="before the application sees any of it",
)  # fmt: skip
row(
    SECTION, "a body of just that size", Relayed("passed on", target="/small/x", body=b"x" * 1024),
    {
        "length": req(_SMALL, b"Content-Length: 1024", body=b"x" * 1024),
        "chunks": req(_SMALL, _CHUNKED, body=b"400\r\n" + b"x" * 1024 + b"\r\n0\r\n\r\n"),
    },
)  # fmt: skip
row(
    SECTION, "a body without data: chunk extensions or trailers over 64 KiB",
    Refused((400,), may_count=True),
    {
        "extension": post(b"Transfer-Encoding: chunked", body=b"3;" + b"x" * 100_000),
        "trailer": post(
            b"Transfer-Encoding: chunked", body=b"3\r\nabc\r\n0\r\nX-A: " + b"a" * 100_000
        ),
    },
)  # fmt: skip
told(
    SECTION, "a head or a body that comes slowly, or stops (slowloris)",
    "408 after `head_timeout` from its first byte, or `body_timeout` between two pieces of a body; "
    "nothing is passed on of a head, and of a body no end",
    "test_slow_clients_are_let_go",
)  # fmt: skip
told(
    SECTION, "a connection that sends nothing, or nothing more",
    "closed after `head_timeout`, or `idle_timeout`", "test_slow_clients_are_let_go",
)  # fmt: skip
told(
    SECTION, "a client that sends request upon request and reads no answer",
    "no further one is begun until it reads: bounded memory; closed after `idle_timeout`",
    "test_unread_answers_are_bounded",
)  # fmt: skip
told(
    SECTION, "a client that sends request upon request ahead of a slow answer",
    "some 64 KiB are read; the rest waits in its own buffers",
    "test_what_is_sent_ahead_of_a_slow_answer_is_bounded",
)  # fmt: skip
told(
    SECTION, "a large body with a request that is refused",
    "the answer can be read: what still comes is read and dropped for a moment",
    "test_a_refusal_can_be_read_while_the_body_is_sent",
)  # fmt: skip

_ORDER = "Order"
told(
    _ORDER, "requests sent ahead (pipelining)", "answered one after the other, in their order",
    "test_requests_sent_ahead_are_answered_in_order",
)  # fmt: skip
told(
    _ORDER, "requests after one that is malformed", "never executed: 400, connection closed",
    "test_nothing_after_an_error_is_executed",
)  # fmt: skip
told(
    _ORDER, "requests after `Connection: close`, or after one of HTTP/1.0", "never executed",
    "test_nothing_after_close_is_executed",
)  # fmt: skip
told(
    _ORDER, "a request in pieces, cut at any byte", "the same as in one piece",
    "test_a_request_cut_at_any_byte_is_the_same",
)  # fmt: skip
told(
    _ORDER, "`Expect: 100-continue` with a request that is refused",
    "refused without 100; the body that comes all the same is no request",
    "test_a_body_that_was_not_asked_for_is_no_request",
)  # fmt: skip
told(
    _ORDER, "a client that goes away within the body", "the application sees no complete request",
    "test_a_body_that_is_cut_is_never_complete",
)  # fmt: skip

_ANSWER = "Answers of the application"
told(
    _ANSWER, "a line break, NUL or control character in a field (response splitting)",
    "502; nothing of it reaches the client", "test_an_answer_that_would_split_is_not_passed_on",
)  # fmt: skip
told(
    _ANSWER, "framing, hop-by-hop and limit fields in it", "replaced by the gateway's own",
    "test_fields_of_an_answer_that_are_ours",
)  # fmt: skip
