"""An upstream that knows what it served: the witness of the acceptance tests.

    GET /…/echo          JSON: the request's path, query and headers
    GET /…/slow?ms=N     answers after N milliseconds
    GET /…/hold          answers when `/-/release` is next asked for
    GET /-/seen          JSON: `served` and `peak` (most at once) by X-Who and path, `in_flight`
    GET /-/release       answers everything that is held
    GET /…/named         names itself in the Server field
    GET /…/costs?is=N    says that it cost N, in X-Usage-Cost
    GET /…/opened        has CORS fields of its own
    *   /…/status?code=N answers with this status
    *   /…/flaky?times=N 503 to the first N requests under this X-Who, then 200
    *   anything else    200, a few bytes

A request is counted when it arrives, under `<X-Who> <path>`. With a JOURNAL its X-Request-Id and
the status it will be given are written to that file before it is answered, so that a kill loses
none.
Run: `python -m tests.support.upstream PORT [JOURNAL]`.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections import Counter
from urllib.parse import parse_qs

import httptools
import uvloop

_OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: 3\r\n\r\nok\n"

_CORS = (
    b"\r\naccess-control-allow-origin: *\r\naccess-control-expose-headers: x-own\r\n"
    b"x-own: 1\r\nx-powered-by: upstream\r\nvary: accept\r\n"
)

served: Counter[str] = Counter()
now: Counter[str] = Counter()
peak: Counter[str] = Counter()
held: list[asyncio.Future[None]] = []
journal = -1


class Upstream(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    # httptools

    def on_message_begin(self) -> None:
        self.headers: list[tuple[str, str]] = []

    def on_url(self, url: bytes) -> None:
        self.url = httptools.parse_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.decode("latin-1").lower(), value.decode("latin-1")))

    def on_message_complete(self) -> None:
        path = self.url.path.decode()
        query = (self.url.query or b"").decode()
        if path == "/-/seen":
            seen = {"served": served, "peak": peak, "in_flight": sum(now.values())}
            self._json(seen)
            return
        if path == "/-/release":
            for future in held:
                if not future.done():
                    future.set_result(None)
            held.clear()
            self.transport.write(_OK)
            return
        who = next((value for name, value in self.headers if name == "x-who"), "")
        name = f"{who} {path}"
        served[name] += 1
        code = int(parse_qs(query)["code"][0]) if path.endswith("/status") else 200
        if path.endswith("/flaky") and served[name] <= int(parse_qs(query)["times"][0]):
            code = 503
        if journal >= 0:
            sent = next((value for name, value in self.headers if name == "x-request-id"), "-")
            os.write(journal, f"{sent} {code}\n".encode())
        if path.endswith("/hold"):
            future = asyncio.get_running_loop().create_future()
            held.append(future)
            self._later(name, future)
        elif path.endswith("/slow"):
            delay = int(parse_qs(query)["ms"][0]) / 1000
            self._later(name, asyncio.ensure_future(asyncio.sleep(delay)))
        elif path.endswith("/named"):
            self.transport.write(_OK.replace(b"\r\n", b"\r\nserver: upstream\r\n", 1))
        elif path.endswith("/costs"):
            cost = b"\r\nx-usage-cost: %b\r\n" % query.removeprefix("is=").encode()
            self.transport.write(_OK.replace(b"\r\n", cost, 1))
        elif path.endswith("/opened"):
            self.transport.write(_OK.replace(b"\r\n", _CORS, 1))
        elif path.endswith("/echo"):
            self._json({"path": path, "query": query, "headers": self.headers})
        elif code != 200:
            self.transport.write(_OK.replace(b"200 OK", b"%d Asked" % code, 1))
        else:
            self.transport.write(_OK)

    def _later(self, name: str, future: asyncio.Future[None]) -> None:
        now[name] += 1
        peak[name] = max(peak[name], now[name])

        def answer(_: object) -> None:
            now[name] -= 1
            if not self.transport.is_closing():
                self.transport.write(_OK)

        future.add_done_callback(answer)

    def _json(self, value: object) -> None:
        body = json.dumps(value).encode()
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        self.transport.write(head % len(body) + body)


async def main(port: int, path: str | None) -> None:
    global journal
    if path is not None:
        journal = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Upstream, "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None))
