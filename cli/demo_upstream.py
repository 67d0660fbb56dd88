"""The API behind the gateway in `tallygate up`: small, predictable, useful for trying things out.

    GET /current?city=  /forecast?city=&days=  /search?q=   JSON, the same for the same question
    GET /public/…                                           JSON, meant for a keyless route
    *   /slow?ms=250        answers after that many milliseconds (60,000 at most)
    GET /stream?chunks=5    a chunked answer, one line each 100 ms (1,000 chunks at most)
    GET /bytes?n=1024       that many bytes (64 MiB at most)
    GET /status?code=503    that status
    *   anything else       echo: method, path, query, headers, size of the body

Run: `python -m cli.demo_upstream --port N`. Listens on 127.0.0.1 only.
"""

from __future__ import annotations

import asyncio
import signal
import zlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

import click
import orjson

from core.leave import leave

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_MAX_SLOW_MS = 60_000
_MAX_CHUNKS = 1_000
_MAX_BYTES = 64 * 1024 * 1024
_BLOCK = 64 * 1024
_SKIES = ("clear", "cloudy", "rain", "snow", "fog")
_JSON = [(b"content-type", b"application/json")]
_BINARY = [(b"content-type", b"application/octet-stream")]
_TEXT = [(b"content-type", b"text/plain; charset=utf-8")]


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """The ASGI application."""
    if scope["type"] != "http":
        return
    path: str = scope["path"]
    query = {name: values[-1] for name, values in parse_qs(scope["query_string"].decode()).items()}
    size = await _body_size(receive)
    if path == "/slow":
        delay_ms = _number(query, "ms", 250, _MAX_SLOW_MS)
        await asyncio.sleep(delay_ms / 1000)
        await _json(send, {"slept_ms": delay_ms})
    elif path == "/stream":
        await _stream(send, _number(query, "chunks", 5, _MAX_CHUNKS))
    elif path == "/bytes":
        await _bytes(send, _number(query, "n", 1024, _MAX_BYTES))
    elif path == "/status":
        code = max(200, _number(query, "code", 200, 599))
        await _json(send, {"status": code}, code)
    else:
        await _json(send, _answer(path, query) or _echo(scope, size))


def _answer(path: str, query: dict[str, str]) -> dict[str, Any] | None:
    city = query.get("city", "Lisbon")
    if path == "/current":
        return {"city": city, **_weather(city, 0)}
    if path == "/forecast":
        days = _number(query, "days", 3, 14)
        return {"city": city, "days": [{"day": d, **_weather(city, d)} for d in range(1, days + 1)]}
    if path == "/search":
        word = query.get("q", "")
        return {"q": word, "results": [f"{word} {suffix}" for suffix in ("north", "south")]}
    if path == "/public" or path.startswith("/public/"):
        return {"public": True, "path": path}
    return None


def _weather(city: str, day: int) -> dict[str, Any]:
    seed = zlib.crc32(f"{city}/{day}".encode())
    return {"celsius": seed % 40 - 5, "sky": _SKIES[seed % len(_SKIES)]}


def _echo(scope: Scope, size: int) -> dict[str, Any]:
    return {
        "method": scope["method"],
        "path": scope["path"],
        "query": scope["query_string"].decode(),
        "headers": [
            [name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]
        ],
        "body_bytes": size,
    }


def _number(query: dict[str, str], name: str, default: int, largest: int) -> int:
    value = query.get(name, "")
    return min(int(value), largest) if value.isascii() and value.isdigit() else default


async def _body_size(receive: Receive) -> int:
    size = 0
    while True:
        message = await receive()
        size += len(message.get("body", b""))
        if message["type"] == "http.disconnect" or not message.get("more_body", False):
            return size


async def _json(send: Send, value: dict[str, Any], status: int = 200) -> None:
    body = orjson.dumps(value, option=orjson.OPT_APPEND_NEWLINE)
    headers = [*_JSON, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _stream(send: Send, chunks: int) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": _TEXT})
    for number in range(1, chunks + 1):
        line = f"chunk {number} of {chunks}\n".encode()
        await send({"type": "http.response.body", "body": line, "more_body": True})
        await asyncio.sleep(0.1)
    await send({"type": "http.response.body", "body": b""})


async def _bytes(send: Send, count: int) -> None:
    headers = [*_BINARY, (b"content-length", str(count).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    block = b"x" * _BLOCK
    for start in range(0, count, _BLOCK):
        body = block[: count - start]
        await send({"type": "http.response.body", "body": body, "more_body": True})
    await send({"type": "http.response.body", "body": b""})


async def serve(port: int) -> None:
    """Serve on 127.0.0.1 until SIGTERM or SIGINT."""
    from granian.constants import Interfaces  # lazily: tests use `app` without a server
    from granian.server.embed import Server

    server = Server(
        app, address="127.0.0.1", port=port, interface=Interfaces.ASGINL, log_enabled=False
    )
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, server.stop)
    await server.serve()


@click.command(help="Serve the demo API on 127.0.0.1.")
@click.option("--port", type=int, required=True)
def main(port: int) -> None:
    asyncio.run(serve(port))
    leave(0)


if __name__ == "__main__":
    main()
