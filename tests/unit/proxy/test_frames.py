"""Frames found in a stream: a compact conformance set for RFC 6455 section 5."""

from __future__ import annotations

import random
import struct

import pytest
from websockets.protocol import State
from websockets.server import ServerProtocol

from gateway.proxy.websocket.frames import Cut, FrameReader, close_frame, cuts

TEXT, BINARY, CONTINUATION, CLOSE, PING, PONG = 1, 2, 0, 8, 9, 10
KEY = b"\x11\x22\x33\x44"


def frame(
    opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, mask: bool = True
) -> bytes:
    """One frame, well-formed unless asked otherwise."""
    first = (0x80 if fin else 0) | rsv << 4 | opcode
    bit, size = (0x80 if mask else 0), len(payload)
    if size < 126:
        head = bytes((first, bit | size))
    elif size < 65_536:
        head = bytes((first, bit | 126)) + struct.pack(">H", size)
    else:
        head = bytes((first, bit | 127)) + struct.pack(">Q", size)
    if not mask:
        return head + payload
    return head + KEY + bytes(byte ^ KEY[n % 4] for n, byte in enumerate(payload))


def reader(**options: object) -> FrameReader:
    return FrameReader(**{"masked": True, **options})  # type: ignore[arg-type]


SHAPES = [
    frame(TEXT, b"hello"),
    frame(BINARY, b""),
    frame(PING, b"?" * 125),
    frame(TEXT, b"a" * 126, fin=False) + frame(PONG) + frame(CONTINUATION, b"b" * 65_536),
    frame(BINARY, b"c" * 65_535),
    frame(BINARY, fin=False) + frame(CONTINUATION, fin=False) + frame(CONTINUATION, b"end"),
]
PAYLOAD = 5 + 0 + 125 + 126 + 65_536 + 65_535 + 3


@pytest.mark.parametrize("seed", range(20))
def test_however_it_is_cut_up_all_of_it_is_passed_on_and_counted_once(seed: int) -> None:
    stream, chance = b"".join(SHAPES), random.Random(seed)
    under_test, passed, messages, payload = reader(), b"", 0, 0
    at = 0
    while at < len(stream):
        size = chance.choice((1, 2, 3, 7, 130, 4096, 70_000))
        fed = under_test.feed(stream[at : at + size])
        at += size
        passed, messages, payload = (
            passed + fed.data,
            messages + fed.messages,
            payload + fed.payload,
        )
        assert len(stream[:at]) - len(passed) < 131  # a header, or a control frame
    assert under_test.error is None
    assert under_test.left == 0
    assert passed == stream
    assert (messages, payload) == (5, PAYLOAD)


def test_what_is_passed_on_ends_between_frames_unless_a_data_frame_is_under_way() -> None:
    under_test = reader()
    assert under_test.feed(frame(TEXT, b"hello")[:4]).data == b""
    whole = frame(TEXT, b"hello")
    assert under_test.feed(whole[4:8]).data == whole[:8]
    assert under_test.left == 3
    assert under_test.feed(whole[8:] + frame(PING, b"x")[:5]).data == whole[8:]
    assert under_test.left == 0


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (frame(TEXT, b"x", mask=False), 1002),
        (frame(TEXT, b"x", rsv=1), 1002),
        (frame(TEXT, b"x", rsv=2), 1002),
        (frame(TEXT, b"x", rsv=4), 1002),
        (frame(PING, b"x", rsv=4), 1002),
        (frame(3, b"x"), 1002),
        (frame(7), 1002),
        (frame(11), 1002),
        (frame(15), 1002),
        (frame(PING, b"x" * 126), 1002),
        (frame(PING, fin=False), 1002),
        (frame(CLOSE, b"", fin=False), 1002),
        (frame(CONTINUATION, b"x"), 1002),
        (frame(TEXT, fin=False) + frame(TEXT), 1002),
        (frame(TEXT, fin=False) + frame(CONTINUATION) + frame(CONTINUATION), 1002),
        (b"\x81\xfe\x00\x7d" + KEY, 1002),  # 125 in two bytes
        (b"\x81\xff" + struct.pack(">Q", 65_535) + KEY, 1002),
        (b"\x81\xff" + struct.pack(">Q", 2**63) + KEY, 1002),
        (frame(CLOSE, b"\x03"), 1002),
        *((frame(CLOSE, struct.pack(">H", bad)), 1002) for bad in (0, 999, 1004, 1005, 1006, 1015)),
        *((frame(CLOSE, struct.pack(">H", bad)), 1002) for bad in (1016, 2999, 5000, 65_535)),
        (frame(CLOSE, b"\x03\xe8\xff\xfe"), 1007),
    ],
)
def test_what_breaks_the_protocol_is_not_passed_on(sent: bytes, code: int) -> None:
    good = frame(TEXT, b"good")
    for size in (1, 1000):
        under_test = reader()
        stream, passed = good + sent + frame(TEXT, b"after"), b""
        for at in range(0, len(stream), size):
            passed += under_test.feed(stream[at : at + size]).data
        assert under_test.error is not None
        assert under_test.error.code == code
        assert passed.startswith(good)
        assert (good + sent).startswith(passed)


def test_a_server_must_not_mask() -> None:
    assert reader(masked=False).feed(frame(TEXT, b"x", mask=False)).messages == 1
    under_test = reader(masked=False)
    assert under_test.feed(frame(TEXT, b"x")).data == b""
    assert under_test.error is not None


def test_where_compression_was_agreed_on_the_first_frame_may_say_that_it_is_used() -> None:
    under_test = reader(compressed=True)
    sent = frame(TEXT, b"x", rsv=4, fin=False) + frame(CONTINUATION, b"y") + frame(TEXT, b"z")
    assert under_test.feed(sent).messages == 2
    assert under_test.error is None
    for bad in (frame(TEXT, b"x", rsv=2), frame(PING, b"x", rsv=4)):
        under_test = reader(compressed=True)
        under_test.feed(bad)
        assert under_test.error is not None
    under_test.feed(frame(TEXT, b"x", fin=False) + frame(CONTINUATION, rsv=4))
    assert under_test.error is not None


def test_a_message_may_have_so_many_bytes_in_all_its_fragments() -> None:
    under_test = reader(max_message=10)
    assert under_test.feed(frame(TEXT, b"x" * 10) + frame(PING, b"y" * 100)).messages == 1
    parts = frame(TEXT, b"x" * 6, fin=False) + frame(CONTINUATION, b"x" * 5)
    assert under_test.feed(parts).data == parts[: 6 + 6]
    assert under_test.error is not None
    assert under_test.error.code == 1009


@pytest.mark.parametrize("code", [1000, 1001, 1003, 1007, 1011, 1014, 3000, 4999])
def test_a_close_is_passed_on_and_read_and_nothing_follows_it(code: int) -> None:
    close = frame(CLOSE, struct.pack(">H", code) + "tschüß".encode())
    under_test = reader()
    fed = under_test.feed(frame(TEXT, b"x") + close + frame(TEXT, b"late"))
    assert fed == (frame(TEXT, b"x") + close, 1, 1)
    assert under_test.close == (code, "tschüß")
    assert under_test.feed(frame(TEXT, b"later")).data == b""
    under_test = reader()
    under_test.feed(frame(CLOSE))
    assert under_test.close == (1005, "")


@pytest.mark.parametrize("masked", [True, False])
def test_our_own_close_is_one_that_the_reader_takes(masked: bool) -> None:
    under_test = reader(masked=masked)
    sent = close_frame(1008, "limit reached: " + "ü" * 100, masked=masked)
    assert under_test.feed(sent).data == sent
    assert under_test.close is not None
    code, reason = under_test.close
    assert code == 1008
    assert reason.startswith("limit reached: ü")
    assert len(reason.encode()) in (122, 123)


def test_cuts_are_where_messages_begin() -> None:
    under_test = reader()
    first = frame(BINARY, b"x" * 300)
    head = under_test.feed(first[:100])
    left = under_test.left
    assert cuts(head.data, 0) == [Cut(100, 1, 92)]
    rest = first[100:] + frame(PING, b"?") + frame(TEXT, b"ab", fin=False)
    rest += frame(CONTINUATION, b"c") + frame(TEXT, b"def") + frame(BINARY, b"g" * 50)[:20]
    fed = under_test.feed(rest)
    places = cuts(fed.data, left)
    two = 208 + 7
    three = two + 8 + 7
    assert places == [
        Cut(two, 0, 208 + 1),
        Cut(three, 1, 209 + 3),
        Cut(three + 9, 2, 212 + 3),
        Cut(len(fed.data), 3, 215 + 14),
    ]
    assert places[-1][1:] == (fed.messages, fed.payload)


def random_frame(chance: random.Random) -> bytes:
    """Mostly what a client may send next, sometimes not."""
    opcode = chance.choice((TEXT, BINARY, CONTINUATION, CONTINUATION, PING, PONG, 3, 11))
    if chance.random() < 0.1:
        code = chance.choice((1000, 1003, 1004, 1005, 1006, 1012, 1015, 2999, 3000, 4999, 5000))
        payload = struct.pack(">H", code) + chance.choice((b"", b"bye", b"\xff", "✓".encode()))
        return frame(CLOSE, payload if chance.random() < 0.8 else payload[: chance.randrange(3)])
    sizes = (0, 1, 125) if opcode >= CLOSE and chance.random() < 0.9 else (0, 1, 126, 65_536)
    return frame(
        opcode,
        b"x" * chance.choice(sizes),
        fin=chance.random() < (0.95 if opcode >= CLOSE else 0.6),
        rsv=chance.choice((1, 2, 4)) if chance.random() < 0.05 else 0,
        mask=chance.random() < 0.97,
    )


@pytest.mark.parametrize("seed", range(300))
def test_what_another_implementation_refuses_is_refused_here_at_the_same_frame(seed: int) -> None:
    chance = random.Random(seed)
    theirs = ServerProtocol(state=State.OPEN, max_size=None)
    ours = reader()
    for _ in range(12):
        sent = random_frame(chance)
        theirs.receive_data(sent)
        theirs.events_received()
        ours.feed(sent)
        refused = ours.error is not None
        if ours.close is not None and "incomplete fragmented" in str(theirs.parser_exc):
            return  # it may be left in the middle of a message: RFC 6455 section 5.4
        assert refused == (theirs.parser_exc is not None), sent[:20]
        if refused:
            return
        if ours.close is not None:
            assert theirs.close_rcvd is not None
            assert ours.close == (theirs.close_rcvd.code, theirs.close_rcvd.reason)
            return
