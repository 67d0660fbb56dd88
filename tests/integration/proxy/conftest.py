"""Fixtures: `gateway(script, **settings)` gives a relay in a Granian process and its upstream."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pytest

from tests.integration.proxy.raw import Answer, Client, RawUpstream, Script
from tests.support.wait import free_port, wait_until_async

ROOT = Path(__file__).resolve().parents[3]
STARTED_S = 20


@dataclass
class Gateway:
    port: int
    upstream: RawUpstream

    async def ask(self, line: str, *headers: str, body: bytes = b"") -> Answer:
        """One request on a connection of its own."""
        async with Client.to(self.port) as client, asyncio.timeout(20):
            return await client.ask(line, *headers, body=body)

    def client(self, **options: Any) -> AbstractAsyncContextManager[Client]:
        return Client.to(self.port, **options)

    async def stats(self) -> dict[str, Any]:
        answer = await self.ask("GET /_stats")
        stats: dict[str, Any] = orjson.loads(answer.body)
        return stats

    async def until(self, predicate: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        """Poll the process's counters."""
        stats: dict[str, Any] = {}

        async def holds() -> bool:
            nonlocal stats
            stats = await self.stats()
            return predicate(stats)

        try:
            await wait_until_async(holds, 10, what)
        except AssertionError as error:
            raise AssertionError(f"{error}: {stats}") from None
        return stats

    async def quiet(self) -> dict[str, Any]:
        """Nothing is left of any request: no task but the two of the server and our own."""
        return await self.until(
            lambda s: s["in_use"] == 0 and s["watched"] == 0 and s["tasks"] <= 4, "quiet"
        )


GatewayFactory = Callable[..., AbstractAsyncContextManager[Gateway]]


class RelayProcess:
    """The relay application in a process of its own, relaying to a port nobody listens on yet."""

    def __init__(self, folder: Path, settings: dict[str, object], urls: tuple[str, ...]) -> None:
        self.port = free_port()
        self.upstream_port = free_port()
        self.log = folder / f"relay-{self.port}.log"
        urls = urls or (f"http://127.0.0.1:{self.upstream_port}",)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.integration.proxy.relay_app",
                    str(self.port),
                    *urls,
                ],
                cwd=ROOT,
                env={name.upper(): str(value) for name, value in settings.items()},
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()


@pytest.fixture(scope="session")
def shared_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    process = RelayProcess(tmp_path_factory.mktemp("relay"), {}, ())
    yield process
    process.stop()


@pytest.fixture
def gateway(shared_relay: RelayProcess, tmp_path: Path) -> GatewayFactory:
    """A relay and its upstream, which runs `script`. With settings (environment of `relay_app`) or
    URLs it is a fresh process; without any, one for all tests, its last connections gone.
    """

    @asynccontextmanager
    async def run(script: Script, *urls: str, **settings: object) -> AsyncIterator[Gateway]:
        own = RelayProcess(tmp_path, settings, urls) if settings or urls else None
        process = own or shared_relay
        upstream = RawUpstream(script, process.upstream_port)
        gateway = Gateway(process.port, upstream)
        try:
            await wait_until_async(gateway.stats, STARTED_S, "the relay's start")
            await gateway.until(lambda s: s["size"] == 0, "no connection")
            await upstream.start()
            logged = process.log.stat().st_size
            yield gateway
            await gateway.quiet()
            log = process.log.read_bytes()[logged:]
            assert b"Traceback" not in log, log.decode()
        finally:
            await upstream.stop()
            if own is not None:
                own.stop()

    return run
