"""A WebSocket upstream that does what the last part of its path says, on a thread of its own.

echo            sends everything back, as text or binary as it came
sink            reads and remembers how much
deaf            does not read
push?n=N&size=S sends N messages of S bytes, then reads
close?code=C    closes with this code and a reason
vanish          cuts the connection after the first message
refuse?code=C   answers the handshake with this status and a body
headers         sends its request's headers as JSON
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections import Counter
from http import HTTPStatus
from types import TracebackType
from typing import Any
from urllib.parse import parse_qs, urlsplit

from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response

# To the key of the RFC's example.
_ACCEPT = b"sec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"
_SWITCH = b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
_GOOD = _SWITCH + _ACCEPT + b"\r\n"

# What the other upstream answers whatever it is asked, by the last part of the path.
ODD = {
    "unproven": _SWITCH + b"\r\n",
    "wrong": _SWITCH + b"sec-websocket-accept: AAAAAAAAAAAAAAAAAAAAAAAAAAA=\r\n\r\n",
    "unswitched": b"HTTP/1.1 101 Switching Protocols\r\n" + _ACCEPT + b"\r\n",
    "protocol": _SWITCH + _ACCEPT + b"sec-websocket-protocol: mine\r\n\r\n",
    "extension": _SWITCH + _ACCEPT + b"sec-websocket-extensions: permessage-deflate\r\n\r\n",
    "other": b"HTTP/1.1 101 Switching Protocols\r\nupgrade: h2c\r\nconnection: upgrade\r\n\r\n",
    "silent": b"",
    "prompt": _GOOD + b"\x81\x05hello",
    "masked": _GOOD + b"\x81\x81\x00\x00\x00\x00x",
    "unknown": _GOOD + b"\x81\x05hello\x83\x00",
    "half": _GOOD + b"\x82\x7f\x00\x00\x00\x00\x10\x00\x00\x00begin",
}


async def _odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    writer.write(ODD[head.split(b" ")[1].partition(b"?")[0].decode().rpartition("/")[2]])
    if b"/half" in head:
        writer.write_eof()
    await reader.read()
    writer.close()


class Upstream:
    """A context manager. `port` is where it listens, `odd_port` where the one of `ODD` does.

    Attributes:
        messages, size: received, by the path before the last part and the query's `who`.
        ends: (code, reason) of connections that ended, by the same.
        open: connections, by the same.
    """

    def __init__(self) -> None:
        self.port = self.odd_port = 0
        self.messages: Counter[str] = Counter()
        self.size: Counter[str] = Counter()
        self.open: Counter[str] = Counter()
        self.ends: dict[str, list[tuple[int, str]]] = {}
        self._connections: dict[str, list[ServerConnection]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> Upstream:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)

    def cut(self, who: str) -> None:
        """Cuts the connections of one who."""

        def cut() -> None:
            for connection in self._connections.get(who, ()):
                connection.transport.abort()

        self._loop.call_soon_threadsafe(cut)

    async def _stop(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _start(self) -> None:
        server = await serve(
            self._serve,
            "127.0.0.1",
            0,
            process_request=self._process,
            select_subprotocol=lambda _, offered: "chat" if "chat" in offered else None,
            max_size=None,
            ping_interval=None,
            close_timeout=2,
        )
        self.port = next(iter(server.sockets)).getsockname()[1]
        odd = await asyncio.start_server(_odd, "127.0.0.1", 0)
        self.odd_port = odd.sockets[0].getsockname()[1]

    @staticmethod
    def _process(connection: ServerConnection, request: Request) -> Response | None:
        url = urlsplit(request.path)
        if url.path.endswith("/refuse"):
            code = int(parse_qs(url.query)["code"][0])
            headers = Headers([("content-length", "5"), ("x-told", "yes"), ("connection", "close")])
            return Response(code, HTTPStatus(code).phrase, headers, b"nope\n")
        if "upgrade" not in request.headers:
            seen = json.dumps({"path": request.path, "headers": list(request.headers.raw_items())})
            headers = Headers([("content-length", str(len(seen))), ("connection", "close")])
            return Response(200, "OK", headers, seen.encode())
        return None

    async def _serve(self, connection: ServerConnection) -> None:
        assert connection.request is not None
        url = urlsplit(connection.request.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        what = url.path.rpartition("/")[2]
        who = query.get("who", "")
        self.open[who] += 1
        self._connections.setdefault(who, []).append(connection)
        try:
            await getattr(self, f"_do_{what}")(connection, who, query)
            await connection.wait_closed()
        except ConnectionClosed:
            pass
        finally:
            self.open[who] -= 1
            code, reason = connection.close_code, connection.close_reason
            self.ends.setdefault(who, []).append((code or 0, reason or ""))

    def _got(self, who: str, message: Any) -> None:
        self.messages[who] += 1
        self.size[who] += len(message)

    async def _do_echo(self, connection: ServerConnection, who: str, query: Any) -> None:
        async for message in connection:
            self._got(who, message)
            await connection.send(message)

    async def _do_sink(self, connection: ServerConnection, who: str, query: Any) -> None:
        async for message in connection:
            self._got(who, message)

    async def _do_deaf(self, connection: ServerConnection, who: str, query: Any) -> None:
        connection.transport.pause_reading()
        await asyncio.sleep(3600)

    async def _do_push(self, connection: ServerConnection, who: str, query: Any) -> None:
        for _ in range(int(query["n"])):
            await connection.send(b"x" * int(query["size"]))
        await self._do_sink(connection, who, query)

    async def _do_close(self, connection: ServerConnection, who: str, query: Any) -> None:
        await connection.close(int(query["code"]), "as asked")

    async def _do_vanish(self, connection: ServerConnection, who: str, query: Any) -> None:
        await connection.recv()
        connection.transport.abort()

    async def _do_headers(self, connection: ServerConnection, who: str, query: Any) -> None:
        assert connection.request is not None
        await connection.send(json.dumps(list(connection.request.headers.raw_items())))
        await self._do_sink(connection, who, query)
