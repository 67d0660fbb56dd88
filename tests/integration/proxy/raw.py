"""Raw sockets on both sides of the relay: an upstream that misbehaves on demand, and a client."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any

CRLF = b"\r\n"


@dataclass
class Request:
    """One request as the upstream read it."""

    method: str
    path: str
    headers: list[tuple[str, str]]
    body: bytes = b""
    trailers: list[tuple[str, str]] = field(default_factory=list)

    def get(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]


@dataclass
class Peer:
    """The upstream's end of one connection, handed to a script."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    number: int

    async def head(self) -> Request:
        """Read a request head.

        Raises:
            asyncio.IncompleteReadError: the connection ended.
        """
        raw = await self.reader.readuntil(b"\r\n\r\n")
        lines = raw.decode("latin-1").split("\r\n")
        method, path, _ = lines[0].split(" ")
        pairs = [line.partition(": ") for line in lines[1:-2]]
        return Request(method, path, [(name, value) for name, _, value in pairs])

    async def request(self) -> Request:
        """Read a whole request, either framing."""
        request = await self.head()
        if request.get("transfer-encoding"):
            while size := int(await self.reader.readuntil(CRLF), 16):
                request.body += await self.reader.readexactly(size)
                await self.reader.readexactly(2)
            while (line := await self.reader.readuntil(CRLF)) != CRLF:
                name, _, value = line.decode("latin-1").strip().partition(": ")
                request.trailers.append((name, value))
        elif length := request.get("content-length"):
            request.body = await self.reader.readexactly(int(length[0]))
        return request

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def gone(self, deadline_s: float = 10) -> bool:
        """Read until the gateway closes this connection."""
        with contextlib.suppress(ConnectionError):
            async with asyncio.timeout(deadline_s):
                while await self.reader.read(65536):
                    pass
        return True


def on_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Let pytest run a coroutine function; none may take longer than a minute."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), 60))

    return run


Script = Callable[[Peer], Awaitable[None]]


@dataclass
class RawUpstream:
    """Runs `script` for each connection; the connection is closed when it returns."""

    script: Script
    port: int = 0
    connections: int = 0
    requests: list[Request] = field(default_factory=list)
    _server: asyncio.Server | None = None
    _writers: set[asyncio.StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in tuple(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        try:
            await self.script(Peer(reader, writer, self.connections))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()


def answering(*answers: bytes, requests: list[Request] | None = None) -> Script:
    """A script: each request on a connection gets the next answer, the last one again and again."""

    async def script(peer: Peer) -> None:
        served = 0
        while True:
            request = await peer.request()
            if requests is not None:
                requests.append(request)
            await peer.send(answers[min(served, len(answers) - 1)])
            served += 1

    return script


async def silent(peer: Peer) -> None:
    """A script: takes a request and never answers."""
    await peer.request()
    await peer.gone(30)


def ok(body: bytes = b"ok", *extra: str) -> bytes:
    lines = ["HTTP/1.1 200 OK", f"content-length: {len(body)}", *extra, "", ""]
    return "\r\n".join(lines).encode() + body


@dataclass
class Answer:
    status: int
    headers: list[tuple[str, str]]
    body: bytes
    clean: bool  # the body ended as its framing promised
    trailers: list[tuple[str, str]] = field(default_factory=list)

    def get(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]


class Client:
    """A client connection that shows exactly what was received."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.trailers: list[tuple[str, str]] = []  # of the last chunked answer

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, port: int, *, receive_buffer: int = 0) -> AsyncIterator[Client]:
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        reader, writer = await asyncio.open_connection(sock=sock, limit=receive_buffer or 65536)
        try:
            yield cls(reader, writer)
        finally:
            writer.transport.abort()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def ask(self, line: str, *headers: str, body: bytes = b"") -> Answer:
        """Send `METHOD /path` and read the whole answer."""
        await self.send(self.head(line, *headers, length=len(body) if body else None) + body)
        return await self.answer(line.startswith("HEAD "))

    @staticmethod
    def head(line: str, *headers: str, length: int | None = None) -> bytes:
        lines = [f"{line} HTTP/1.1", "Host: api.example", *headers]
        if length is not None:
            lines.append(f"Content-Length: {length}")
        return "\r\n".join([*lines, "", ""]).encode()

    async def answer_head(self) -> Answer:
        raw = await self.reader.readuntil(b"\r\n\r\n")
        lines = raw.decode("latin-1").split("\r\n")
        pairs = [line.partition(": ") for line in lines[1:-2]]
        headers = [(name, value) for name, _, value in pairs]
        return Answer(int(lines[0].split(" ")[1]), headers, b"", True)

    async def answer(self, to_head: bool = False) -> Answer:
        answer = await self.answer_head()
        while answer.status < 200:
            answer = await self.answer_head()
        if to_head or answer.status in (204, 304):
            return answer
        try:
            if answer.get("transfer-encoding"):
                async for chunk in self.chunks():
                    answer.body += chunk
                answer.trailers = self.trailers
            else:
                answer.body = await self.reader.readexactly(int(answer.get("content-length")[0]))
        except asyncio.IncompleteReadError as error:
            answer.body += error.partial
            answer.clean = False
        except ConnectionError:
            answer.clean = False
        return answer

    async def chunks(self) -> AsyncIterator[bytes]:
        """The pieces of a chunked body as they come.

        Raises:
            asyncio.IncompleteReadError: it was broken off.
        """
        while size := int(await self.reader.readuntil(CRLF), 16):
            yield await self.reader.readexactly(size)
            await self.reader.readexactly(2)
        self.trailers = []
        while (line := await self.reader.readuntil(CRLF)) != CRLF:
            name, _, value = line.decode("latin-1").strip().partition(": ")
            self.trailers.append((name, value))
