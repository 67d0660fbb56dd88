"""A tiny responder around `relay`, on the gateway's own server: what the proxy tests talk to.

Run as `python -m tests.integration.proxy.relay_app PORT UPSTREAM_URL...`. `/_stats` answers with
counters of the process; every other path is relayed. Settings come from the environment.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from collections import Counter
from typing import Any

import orjson
import psutil
import uvloop

from core.policy import Upstream
from core.rules import UNLIMITED
from gateway.forwarded import TrustedProxies
from gateway.http.errors import ClientDisconnected, ExchangeError
from gateway.http.exchange import Exchange
from gateway.http.server import HttpServer
from gateway.proxy import watch
from gateway.proxy.pool import UpstreamPool
from gateway.proxy.relay import relay
from gateway.proxy.request import RequestRules
from gateway.proxy.rewrite import path_edit

EXTRA = [(b"x-tallygate", b"yes")]
DROP = frozenset((b"x-drop-me",))


class App:
    def __init__(self, urls: list[str]) -> None:
        env = os.environ
        self.pool = UpstreamPool(
            Upstream(
                name="tested",
                urls=tuple(urls),
                connect_timeout_ms=int(env.get("CONNECT_MS", "1000")),
                response_timeout_ms=int(env.get("RESPONSE_MS", "30000")),
                max_connections=int(env.get("MAX_CONNECTIONS", "256")),
                keepalive_ms=int(env.get("KEEPALIVE_MS", "60000")),
            )
        )
        self.rules = RequestRules(
            path=path_edit(env.get("STRIP_PREFIX", "")),
            drop_headers=(b"x-api-key",),
            drop_query=("api_key",),
            max_body=int(env.get("MAX_BODY", UNLIMITED)),
            trusted=TrustedProxies(filter(None, env.get("TRUSTED", "").split(","))),
        )
        self.outcomes: Counter[str] = Counter()
        self.last: list[float] = []
        self.process = psutil.Process()

    async def __call__(self, exchange: Exchange) -> None:
        if exchange.request.path == "/_stats":
            exchange.respond(200, [], orjson.dumps(self.stats()))
            return
        try:
            result = await relay(
                exchange,
                pool=self.pool,
                head=self.rules.head(exchange.request),
                extra_response_headers=EXTRA,
                drop_response_headers=DROP,
            )
        except ExchangeError as error:
            self.outcomes[error.code] += 1
            if not isinstance(error, ClientDisconnected):
                exchange.respond(error.status, [], str(error).encode())
        else:
            self.outcomes[str(result.outcome)] += 1
            self.last = [result.head_ms, result.upstream_ms]

    def stats(self) -> dict[str, Any]:
        pool = self.pool
        return {
            "rss": self.process.memory_info().rss,
            "tasks": len(asyncio.all_tasks()),
            "watched": len(watch.current()),
            "opened": pool.opened,
            "reused": pool.reused,
            "in_use": pool.in_use,
            "idle": pool.idle,
            "size": pool.size,
            "failures": pool.failures,
            "outcomes": self.outcomes,
            "last": self.last,
        }


async def main(port: int, urls: list[str]) -> None:
    server = HttpServer(App(urls), refuse=lambda _status, _code, detail: ([], detail.encode()))
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("127.0.0.1", port))
    await server.listen(sock)
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), sys.argv[2:]))
