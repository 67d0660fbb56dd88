"""HTTP/2 in tests: the gateway's server on this event loop, and a client that can misbehave."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import uvloop
from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection

from gateway.http.exchange import Handler
from gateway.http.server import HttpServer, Limits
from gateway.http.tls import TlsSource

Fields = Sequence[tuple[str, str]]
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


def on_uvloop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Let pytest run a coroutine function on the gateway's loop; a minute at most."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_watched(test(*args, **kwargs)))

    return run


async def _watched(test: Coroutine[Any, Any, None]) -> None:
    """What goes wrong in a callback of the loop fails the test."""
    trouble: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: trouble.append(context))
    await asyncio.wait_for(test, 60)
    assert not trouble, trouble


@dataclass
class Serving:
    server: HttpServer
    port: int
    events: Counter[str]
    refused: Counter[str]


@contextlib.asynccontextmanager
async def serving(
    handler: Handler, *, tls: TlsSource | None = None, limits: Limits | None = None, **more: Any
) -> AsyncIterator[Serving]:
    """The server with `handler`, on a free port."""
    seen: Counter[str] = Counter()
    refused: Counter[str] = Counter()

    def refuse(_status: int, code: str, detail: str) -> tuple[list[tuple[bytes, bytes]], bytes]:
        refused[code] += 1
        return [(b"content-type", b"text/plain")], detail.encode()

    def event(kind: str) -> None:
        seen[kind] += 1

    server = HttpServer(handler, limits=limits, refuse=refuse, event=event, h2c=tls is None, **more)
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    await server.listen(sock, tls)
    try:
        yield Serving(server, sock.getsockname()[1], seen, refused)
    finally:
        await server.close()


@dataclass
class Stream:
    """What came back on one stream."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    interim: list[int] = field(default_factory=list)
    body: bytes = b""
    trailers: dict[str, str] = field(default_factory=dict)
    ended: bool = False
    reset: int | None = None


class Client:
    """One connection. Windows are opened as data arrives unless `greedy` is False."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        # Nothing that we send is checked: that is what it is for.
        self.h2 = H2Connection(
            H2Configuration(
                client_side=True,
                header_encoding="latin-1",
                validate_outbound_headers=False,
                normalize_outbound_headers=False,
            )
        )
        self.streams: dict[int, Stream] = {}
        self.goaways: list[tuple[int, int]] = []  # error code, last stream
        self.greedy = True
        self.blind = False  # sees nothing but the server's good-bye
        self.closed = False
        self._held = b""

    @classmethod
    @contextlib.asynccontextmanager
    async def to(
        cls, port: int, context: ssl.SSLContext | None = None, *, hello: bool = True, **more: Any
    ) -> AsyncIterator[Client]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, **more)
        client = cls(reader, writer)
        if hello:
            client.h2.initiate_connection()
            await client.flush()
        try:
            yield client
        finally:
            writer.transport.abort()

    async def raw(self, data: bytes) -> None:
        """Bytes as they are; to a server that has closed, none."""
        with contextlib.suppress(ConnectionError):
            self.writer.write(data)
            await self.writer.drain()

    async def flush(self) -> None:
        await self.raw(self.h2.data_to_send())

    async def begin(
        self,
        method: str = "GET",
        path: str = "/",
        headers: Fields = (),
        *,
        end: bool = True,
        block: Fields | None = None,
    ) -> int:
        """Sends a request's head; `block` instead of a well-formed one."""
        stream = self.h2.get_next_available_stream_id()
        pseudo = [
            (":method", method),
            (":scheme", "http"),
            (":authority", "api.example"),
            (":path", path),
        ]
        self.streams[stream] = Stream()
        fields = list(block) if block is not None else [*pseudo, *headers]
        self.h2.send_headers(stream, fields, end_stream=end)
        await self.flush()
        return stream

    async def ask(
        self, method: str = "GET", path: str = "/", headers: Fields = (), body: bytes = b""
    ) -> Stream:
        """A whole request, and all of its answer."""
        stream = await self.begin(method, path, headers, end=not body)
        if body:
            await self.send(stream, body, end=True)
        return await self.answer(stream)

    async def send(self, stream: int, body: bytes, end: bool = False) -> None:
        """A body, as there is room for it; less where the answer has ended before."""
        while True:
            if self.closed or self.streams[stream].reset is not None:
                return
            room = min(self.h2.local_flow_control_window(stream), self.h2.max_outbound_frame_size)
            piece, rest = body[:room], body[room:]
            if piece or not body:
                self.h2.send_data(stream, piece, end_stream=end and not rest)
                await self.flush()
            body = rest
            if not body:
                return
            if not room:
                await self.receive()

    async def answer(self, stream: int) -> Stream:
        found = self.streams[stream]
        await self.until(lambda: found.ended or found.reset is not None)
        return found

    async def until(self, predicate: Callable[[], Any], deadline_s: float = 20) -> None:
        """Receives until the predicate holds or the server has closed."""
        async with asyncio.timeout(deadline_s):
            while not predicate() and not self.closed:
                await self.receive()

    async def gone(self) -> None:
        """Receives until the server has closed."""
        await self.until(lambda: False)

    async def receive(self) -> None:
        try:
            data = await self.reader.read(65_536)
        except (ConnectionError, ssl.SSLError):
            data = b""
        if not data:
            self.closed = True
            return
        data = self._held + data
        at = 0
        while len(data) - at >= 9:
            end = at + 9 + int.from_bytes(data[at : at + 3], "big")
            if end > len(data):
                break
            if data[at + 3] == 7:
                # Not for the library, which would take nothing after it.
                last, code = data[at + 9 : at + 13], data[at + 13 : at + 17]
                self.goaways.append((int.from_bytes(code, "big"), int.from_bytes(last, "big")))
            elif not self.blind:
                for event in self.h2.receive_data(data[at:end]):
                    self._event(event)
            at = end
        self._held = data[at:]
        if not self.blind:
            await self.flush()

    def _event(self, event: events.Event) -> None:
        stream = self.streams.get(getattr(event, "stream_id", 0) or 0)
        if stream is None:
            return
        if isinstance(event, events.ResponseReceived):
            fields = dict(_text(event.headers))
            stream.status = int(fields.pop(":status"))
            stream.headers = fields
        elif isinstance(event, events.InformationalResponseReceived):
            stream.interim.append(int(dict(_text(event.headers))[":status"]))
        elif isinstance(event, events.DataReceived):
            stream.body += event.data or b""
            if self.greedy:
                size = event.flow_controlled_length or 0
                self.h2.acknowledge_received_data(size, event.stream_id)
        elif isinstance(event, events.TrailersReceived):
            stream.trailers = dict(_text(event.headers))
        elif isinstance(event, events.StreamEnded):
            stream.ended = True
        elif isinstance(event, events.StreamReset):
            stream.reset = int(event.error_code or 0)


def _text(headers: Any) -> list[tuple[str, str]]:
    return [(str(name), str(value)) for name, value in headers]


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """A frame as bytes, sound or not."""
    head = len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big")
    return head + payload
