"""An upstream that does on request what an upstream must not do.

The target says what: `/ROUTE/BEHAVIOUR/ID`. Every answer carries its request's ID in each of its
bytes, so that a part of one answer can never pass for another.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from tests.support.threaded import ThreadedServer

LARGE = 300_000
SMALL = 900
_RESET = struct.pack("ii", 1, 0)


def body_of(number: str, size: int) -> bytes:
    """What the answer to a request of this ID consists of."""
    unit = f"<{number}>".encode()
    return (unit * (size // len(unit) + 1))[:size]


@dataclass
class Call:
    """One request, its head read and nothing of its body."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    method: str
    number: str
    length: int  # of its body; -1 chunked

    async def take_body(self) -> None:
        if self.length >= 0:
            await self.reader.readexactly(self.length)
            return
        while size := int(await self.reader.readuntil(b"\r\n"), 16):
            await self.reader.readexactly(size + 2)
        await self.reader.readuntil(b"\r\n")

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def whole(self, size: int = SMALL, *fields: bytes) -> bytes:
        body = body_of(self.number, size)
        lines = [b"HTTP/1.1 200 OK", b"Content-Length: %d" % size, *fields, b"", b""]
        return b"\r\n".join(lines) + (b"" if self.method == "HEAD" else body)

    def reset(self) -> None:
        sock = self.writer.get_extra_info("socket")
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        self.writer.transport.abort()


Behaviour = Callable[[Call], Awaitable[bool]]

# By what the client must see. WHOLE: 200 and the body. GATEWAY: a 502 or 504 of the gateway. CUT: a
# 200 that can be seen to be incomplete, or a 502. EMPTY: the status in the name, and no body.
WHOLE: dict[str, Behaviour] = {}
GATEWAY: dict[str, Behaviour] = {}
CUT: dict[str, Behaviour] = {}
EMPTY: dict[str, Behaviour] = {}

_CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


def _add(kind: dict[str, Behaviour], name: str, answer: Callable[[Call], bytes], then: str) -> None:
    """Answers with these bytes, in one piece; `then` keeps, closes or resets the connection."""

    async def behave(call: Call) -> bool:
        await call.take_body()
        await call.send(answer(call))
        if then == "reset":
            await asyncio.sleep(0)
            call.reset()
        return then == "keep"

    kind[name] = behave


_add(WHOLE, "length", lambda c: c.whole(), "keep")
_add(WHOLE, "large", lambda c: c.whole(LARGE), "keep")
_add(WHOLE, "closes", lambda c: c.whole(SMALL, b"Connection: close"), "close")
_add(WHOLE, "closes-unsaid", lambda c: c.whole(), "close")
_add(WHOLE, "interim", lambda c: b"HTTP/1.1 103 Hint\r\nLink: <a>\r\n\r\n" * 3 + c.whole(), "keep")
_add(WHOLE, "continue", lambda c: b"HTTP/1.1 100 Continue\r\n\r\n" + c.whole(), "keep")
_add(WHOLE, "no-phrase", lambda c: c.whole().replace(b"200 OK", b"200 ", 1), "keep")
_add(WHOLE, "two-answers", lambda c: c.whole() + c.whole().replace(b"<", b"{"), "keep")
_add(WHOLE, "too-long", lambda c: c.whole() + b"and more than was announced", "keep")
_add(WHOLE, "many-fields", lambda c: c.whole(SMALL, *(b"X-%d: a" % n for n in range(90))), "keep")
_add(GATEWAY, "closes-before", lambda c: b"", "close")
_add(GATEWAY, "resets-before", lambda c: b"", "reset")
_add(GATEWAY, "closes-in-head", lambda c: b"HTTP/1.1 200 OK\r\nContent-Le", "close")
_add(GATEWAY, "resets-in-head", lambda c: b"HTTP/1.1 200 OK\r\nContent-Le", "reset")
_add(GATEWAY, "garbage", lambda c: bytes(range(256)), "close")
_add(GATEWAY, "other-protocol", lambda c: b"220 mail.example ESMTP\r\n", "keep")
_add(GATEWAY, "huge-head", lambda c: b"HTTP/1.1 200 OK\r\nX: " + b"y" * 200_000, "keep")
_add(GATEWAY, "endless-interim", lambda c: b"HTTP/1.1 103 Hint\r\n\r\n" * 40 + c.whole(), "keep")
_add(GATEWAY, "switches", lambda c: b"HTTP/1.1 101 Switch\r\nUpgrade: x\r\n\r\nxx", "keep")
_add(GATEWAY, "status-999", lambda c: c.whole().replace(b"200", b"999", 1), "keep")
_add(GATEWAY, "status-20", lambda c: c.whole().replace(b"200", b"20", 1), "keep")
_add(GATEWAY, "two-lengths", lambda c: c.whole(SMALL, b"Content-Length: 3"), "keep")
_add(GATEWAY, "bad-length", lambda c: c.whole().replace(b": 900", b": -900", 1), "keep")
_add(GATEWAY, "both-framings", lambda c: c.whole(SMALL, b"Transfer-Encoding: chunked"), "keep")
_add(
    GATEWAY,
    "zipped-framing",
    lambda c: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nx",
    "close",
)
_add(EMPTY, "204", lambda c: b"HTTP/1.1 204 None\r\nContent-Length: 3\r\n\r\nabc", "keep")
_add(EMPTY, "304", lambda c: b"HTTP/1.1 304 None\r\nContent-Length: 3\r\n\r\nabc", "keep")


def _behaviour(kind: dict[str, Behaviour], name: str) -> Callable[[Behaviour], Behaviour]:
    def add(function: Behaviour) -> Behaviour:
        kind[name] = function
        return function

    return add


@_behaviour(WHOLE, "chunked")
async def _chunked(call: Call) -> bool:
    await call.take_body()
    body = body_of(call.number, SMALL)
    await call.send(_CHUNKED)
    if call.method != "HEAD":
        for at in range(0, SMALL, 100):
            await call.send(_chunk(body[at : at + 100]))
        await call.send(b"0\r\nX-Trailer: t\r\n\r\n")
    return True


@_behaviour(WHOLE, "until-close")
async def _until_close(call: Call) -> bool:
    await call.take_body()
    body = b"" if call.method == "HEAD" else body_of(call.number, SMALL)
    await call.send(b"HTTP/1.1 200 OK\r\n\r\n" + body)
    return False


@_behaviour(WHOLE, "version-1.0")
async def _old(call: Call) -> bool:
    await call.take_body()
    await call.send(call.whole().replace(b"HTTP/1.1", b"HTTP/1.0", 1))
    return False


@_behaviour(WHOLE, "trickles")
async def _trickles(call: Call) -> bool:
    await call.take_body()
    answer = call.whole()
    for at in range(0, len(answer), 60):
        await call.send(answer[at : at + 60])
        await asyncio.sleep(0.005)
    return True


@_behaviour(WHOLE, "early")
async def _early(call: Call) -> bool:
    """Answers before it has read the body, and takes it afterwards."""
    await call.send(call.whole())
    await call.take_body()
    return True


@_behaviour(WHOLE, "early-deaf")
async def _early_deaf(call: Call) -> bool:
    """Answers before the body, and never reads that: the connection is of no further use."""
    await call.send(call.whole())
    if call.length:
        await asyncio.sleep(0.2)
        return False
    return True


@_behaviour(GATEWAY, "stalls")
async def _stalls(call: Call) -> bool:
    await call.take_body()
    await call.reader.read(1)
    return False


@_behaviour(CUT, "stalls-in-body")
async def _stalls_in_body(call: Call) -> bool:
    await call.take_body()
    await call.send(call.whole(LARGE)[: LARGE // 2])
    await call.reader.read(1)
    return False


def _add_cut(name: str, head: bytes, size: int, framed: bool, then: str) -> None:
    async def behave(call: Call) -> bool:
        await call.take_body()
        part = body_of(call.number, size)
        await call.send(head + (_chunk(part) if framed else part))
        await asyncio.sleep(0.005)
        if then == "reset":
            call.reset()
        return False

    CUT[name] = behave


_LENGTH = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n"
for _then in ("close", "reset"):
    _add_cut(f"short-{_then}", _LENGTH % SMALL, SMALL // 2, False, _then)
    _add_cut(f"large-{_then}", _LENGTH % LARGE, LARGE // 3, False, _then)
    _add_cut(f"one-byte-{_then}", _LENGTH % SMALL, SMALL - 1, False, _then)
    _add_cut(f"chunks-{_then}", _CHUNKED, SMALL, True, _then)
    _add_cut(f"large-chunk-{_then}", _CHUNKED, LARGE, True, _then)
_add_cut("in-a-chunk", _CHUNKED + b"fff\r\n", 500, False, "close")
_add_cut("bad-chunk", _CHUNKED + b"zz\r\n", 500, False, "close")
_add_cut("long-chunk", _CHUNKED + b"5\r\n", 50, False, "close")
_add_cut("reset-no-framing", b"HTTP/1.1 200 OK\r\n\r\n", 5000, False, "reset")

ALL = {**WHOLE, **GATEWAY, **CUT, **EMPTY}


class Misfits(ThreadedServer):
    """`served` counts by behaviour."""

    def __init__(self) -> None:
        super().__init__(limit=1 << 24)
        self.served: Counter[str] = Counter()
        self.executed: Counter[str] = Counter()  # by ID
        self.open = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            while await self._one(reader, writer):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        line, _, fields = (await reader.readuntil(b"\r\n\r\n")).partition(b"\r\n")
        fields = fields.lower()
        method, target, _ = line.decode().split(" ")
        _, _, name, number = target.split("/")
        length = 0
        if b"transfer-encoding: chunked" in fields:
            length = -1
        elif b"content-length: " in fields:
            length = int(fields.partition(b"content-length: ")[2].partition(b"\r")[0])
        self.served[name] += 1
        self.executed[number] += 1
        return await ALL[name](Call(reader, writer, method, number, length))
