"""The upstream of the benchmarks without nginx: a small HTTP/1.1 server that keeps connections.

One answer of fixed size for every request without a body: 1 KiB for /1k, 64 KiB for /64k; twenty
events, 10 ms apart, for /stream. It does as little as possible so that what is measured is the
gateway.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import cast

import uvloop

_END = b"\r\n\r\n"
EVENTS = 20
EVENT = b"data: " + b"x" * 56 + b"\n\n"
_EVENT_S = 0.01
_STREAM = (
    b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


def _answer(size: int) -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: %d\r\n\r\n"
    return head % size + b"x" * size


def _protocol(size: int) -> type[asyncio.Protocol]:
    answers = {b"GET /1k ": _answer(1024), b"GET /64k": _answer(65536)}
    other = _answer(size)

    class Stub(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self._transport = cast(asyncio.Transport, transport)
            self._rest = b""

        def data_received(self, data: bytes) -> None:
            data = self._rest + data
            requests = data.count(_END)
            if data.startswith(b"GET /stream") and requests:
                self._rest = b""
                self._transport.write(_STREAM)
                self._stream(EVENTS)
            elif requests:
                self._rest = data[data.rindex(_END) + 4 :]
                self._transport.write(answers.get(data[:8], other) * requests)
            else:
                self._rest = data

        def _stream(self, missing: int) -> None:
            if not missing:
                self._transport.write(b"0\r\n\r\n")
                return
            self._transport.write(b"%x\r\n%s\r\n" % (len(EVENT), EVENT))
            asyncio.get_running_loop().call_later(_EVENT_S, self._stream, missing - 1)

    return Stub


async def _serve(port: int, size: int) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_protocol(size), "127.0.0.1", port, backlog=1024)
    async with server:
        await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--size", type=int, default=27)
    options = parser.parse_args()
    uvloop.run(_serve(options.port, options.size))
