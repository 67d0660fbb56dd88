"""Finds frames in one direction of a WebSocket, without decoding them.

Payloads pass through as they are, masked and compressed: only headers are read, and control frames,
which are at most 125 bytes. What is passed on never ends inside a header or a control frame, so the
gateway can put a frame of its own after it unless a data frame is under way (`left`).

Strict where two readers could differ (RFC 6455 section 5): reserved bits, opcodes, masks, lengths
that are not minimal, fragments out of order. Text is not checked to be UTF-8: that is for who
decodes it.
"""

from __future__ import annotations

import os
from typing import Final, NamedTuple

_CONTINUATION: Final = 0
_BINARY: Final = 2
_CLOSE: Final = 8
_PONG: Final = 10
_FIN: Final = 0x80
_RSV1: Final = 0x40
_RSV23: Final = 0x30
_MAX_CONTROL: Final = 125
_MAX_LENGTH: Final = 2**63 - 1

# Close codes, RFC 6455 section 7.4 and IANA's registry.
NORMAL: Final = 1000
GOING_AWAY: Final = 1001
PROTOCOL_ERROR: Final = 1002
NO_CODE: Final = 1005  # never sent: a close without one
ABNORMAL: Final = 1006  # never sent: the connection ended without a close
NOT_TEXT: Final = 1007
POLICY: Final = 1008
TOO_BIG: Final = 1009
TRY_AGAIN: Final = 1013
BAD_GATEWAY: Final = 1014
_SENDABLE: Final = frozenset((*range(1000, 1004), *range(1007, 1015)))


class FrameError(Exception):
    """The sender breaks the protocol, or a limit: `code` is what to close with."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code


class Fed(NamedTuple):
    """What may be passed on: `messages` begin in `data`, which has so many bytes of payload."""

    data: bytes
    messages: int
    payload: int


class Cut(NamedTuple):
    """A place where data may be cut: before it are so many messages' beginnings and payload."""

    at: int
    messages: int
    payload: int


class FrameReader:
    """Reads what one end sends.

    Args:
        masked: frames have to be masked (a client's), or must not be (a server's).
        compressed: permessage-deflate was agreed on: the first reserved bit has a meaning.
        max_message: bytes of payload of a message; 0 for any.

    Attributes:
        left: bytes still to come of the data frame under way.
        close: code and reason once the sender has closed; what follows is dropped.
        error: once the sender has broken the protocol; what follows is dropped.
    """

    __slots__ = (
        "_compressed",
        "_fragmented",
        "_held",
        "_masked",
        "_max_message",
        "_message",
        "close",
        "error",
        "left",
    )

    def __init__(self, *, masked: bool, compressed: bool = False, max_message: int = 0) -> None:
        self._masked = masked
        self._compressed = compressed
        self._max_message = max_message or _MAX_LENGTH
        self._held = b""  # the beginning of a header or control frame
        self._fragmented = False  # a message has begun that has not ended
        self._message = 0  # bytes of it, as announced
        self.left = 0
        self.close: tuple[int, str] | None = None
        self.error: FrameError | None = None

    def feed(self, data: bytes) -> Fed:
        """What may be passed on of all that has arrived; look at `close` and `error` after it."""
        if self.close is not None or self.error is not None:
            return Fed(b"", 0, 0)
        if self._held:
            data = self._held + data
            self._held = b""
        size = len(data)
        at = self.left  # end of the frame under way
        messages = overhead = 0
        masked = self._masked
        try:
            while at < size:
                if size - at < 2:
                    break
                first, second = data[at], data[at + 1]
                body, length = _lengths(data, at, second)
                if body < 0 or body > size:
                    break
                opcode = first & 0x0F
                if (second >= 0x80) is not masked:
                    raise FrameError(PROTOCOL_ERROR, "a frame is masked that must not be"
                                     if not masked else "a frame is not masked")  # fmt: skip
                if opcode >= _CLOSE:
                    if first & 0x70 or not first & _FIN or length > _MAX_CONTROL or opcode > _PONG:
                        raise FrameError(PROTOCOL_ERROR, "a control frame is not well-formed")
                    if body + length > size:
                        break
                    if opcode == _CLOSE:
                        payload = data[body : body + length]
                        if masked:
                            payload = _unmask(payload, data[body - 4 : body])
                        self.close = _closing(payload)
                        size = body + length  # nothing may follow
                        overhead += length  # leaving is free
                else:
                    messages += self._data_frame(first, opcode, length)
                overhead += body - at
                at = body + length
        except FrameError as error:
            self.error = error
            size = at
        if at >= size:
            self.left = at - size
            passed = data if size == len(data) else data[:size]
            return Fed(passed, messages, size - overhead)
        self.left = 0
        self._held = data[at:]
        return Fed(data[:at], messages, at - overhead)

    def _data_frame(self, first: int, opcode: int, length: int) -> int:
        """Whether a message begins with it, as 0 or 1."""
        if first & _RSV23 or (first & _RSV1 and not (self._compressed and opcode)):
            raise FrameError(PROTOCOL_ERROR, "a reserved bit is set")
        if opcode > _BINARY:
            raise FrameError(PROTOCOL_ERROR, "an unknown opcode")
        if self._fragmented is (opcode != _CONTINUATION):
            raise FrameError(PROTOCOL_ERROR, "fragments of a message are out of order")
        if opcode:
            self._message = 0
        self._message += length
        if self._message > self._max_message:
            raise FrameError(TOO_BIG, f"messages may have {self._max_message} bytes")
        self._fragmented = not first & _FIN
        return 1 if opcode else 0


def cuts(data: bytes, left: int) -> list[Cut]:
    """Where messages begin in what a reader passed on, and its end; in order.

    `left` is how much of the data frame under way `data` begins with.
    """
    found: list[Cut] = []
    at, messages, payload = left, 0, min(left, len(data))
    while at < len(data):
        body, length = _lengths(data, at, data[at + 1])
        opcode = data[at] & 0x0F
        if 0 < opcode < _CLOSE:
            if at:
                found.append(Cut(at, messages, payload))
            messages += 1
        at = body + length
        if opcode != _CLOSE:
            payload += min(length, len(data) - body)
    found.append(Cut(len(data), messages, payload))
    return found


def close_frame(code: int, reason: str, *, masked: bool) -> bytes:
    """A close; the reason is cut to what a control frame can carry."""
    text = reason.encode()[: _MAX_CONTROL - 2].decode(errors="ignore").encode()
    payload = code.to_bytes(2, "big") + text
    if not masked:
        return bytes((_FIN | _CLOSE, len(payload))) + payload
    key = os.urandom(4)
    return bytes((_FIN | _CLOSE, 0x80 | len(payload))) + key + _unmask(payload, key)


def _lengths(data: bytes, at: int, second: int) -> tuple[int, int]:
    """Where the payload of the frame at `at` begins, and its length; -1 where that is not there.

    Raises:
        FrameError: the length is written in more bytes than it needs, or is none.
    """
    length = second & 0x7F
    body = at + 2
    if length == 126:
        body += 2
        if body > len(data):
            return -1, 0
        length = int.from_bytes(data[body - 2 : body], "big")
        if length < 126:
            raise FrameError(PROTOCOL_ERROR, "a length is not minimal")
    elif length == 127:
        body += 8
        if body > len(data):
            return -1, 0
        length = int.from_bytes(data[body - 8 : body], "big")
        if not 65_536 <= length <= _MAX_LENGTH:
            raise FrameError(PROTOCOL_ERROR, "a length is not minimal, or negative")
    return (body + 4 if second >= 0x80 else body), length


def _closing(payload: bytes) -> tuple[int, str]:
    if not payload:
        return NO_CODE, ""
    code = int.from_bytes(payload[:2], "big")
    if len(payload) < 2 or not (code in _SENDABLE or 3000 <= code <= 4999):
        raise FrameError(PROTOCOL_ERROR, "a close code that may not be sent")
    try:
        return code, payload[2:].decode()
    except UnicodeDecodeError:
        raise FrameError(NOT_TEXT, "the reason of a close is not UTF-8") from None


def _unmask(payload: bytes, key: bytes) -> bytes:
    size = len(payload)
    mask = (key * (size // 4 + 1))[:size]
    return (int.from_bytes(payload, "big") ^ int.from_bytes(mask, "big")).to_bytes(size, "big")
