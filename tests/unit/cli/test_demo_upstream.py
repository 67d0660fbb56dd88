"""The demo API, called as ASGI and once through its server."""

from __future__ import annotations

import sys

import httpx
import pytest

from cli.demo_upstream import app
from tests.support import Process, free_port


@pytest.fixture
def client() -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://demo")


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.anyio
async def test_answers_are_the_same_for_the_same_question(client: httpx.AsyncClient) -> None:
    one = (await client.get("/current", params={"city": "Oslo"})).json()
    assert one == (await client.get("/current?city=Oslo")).json()
    assert one["city"] == "Oslo"
    assert len((await client.get("/forecast?days=5")).json()["days"]) == 5
    assert (await client.get("/search?q=rain")).json()["results"][0] == "rain north"
    assert (await client.get("/public/terms")).json() == {"public": True, "path": "/public/terms"}


@pytest.mark.anyio
async def test_any_other_path_is_an_echo(client: httpx.AsyncClient) -> None:
    answer = (await client.put("/x/y?a=1", content=b"12345", headers={"x-test": b"\xe9"})).json()
    assert (answer["method"], answer["path"], answer["query"]) == ("PUT", "/x/y", "a=1")
    assert answer["body_bytes"] == 5
    assert ["x-test", "é"] in answer["headers"]


@pytest.mark.anyio
@pytest.mark.parametrize("count", [0, 1, 65_536, 200_000])
async def test_bytes_are_exactly_that_many(client: httpx.AsyncClient, count: int) -> None:
    answer = await client.get(f"/bytes?n={count}")
    assert len(answer.content) == int(answer.headers["content-length"]) == count


@pytest.mark.anyio
@pytest.mark.parametrize("query", ["ms=-1", "ms=x", "ms="])
async def test_nonsense_numbers_fall_back(client: httpx.AsyncClient, query: str) -> None:
    assert (await client.get(f"/slow?{query}")).json() == {"slept_ms": 250}


@pytest.mark.anyio
async def test_status_is_as_asked(client: httpx.AsyncClient) -> None:
    assert (await client.get("/status?code=503")).status_code == 503


def test_it_serves_until_it_is_told_to_stop() -> None:
    port = free_port()
    with Process([sys.executable, "-m", "cli.demo_upstream", "--port", str(port)]) as server:
        server.wait_for_http(f"http://127.0.0.1:{port}/current")
        streamed = httpx.get(f"http://127.0.0.1:{port}/stream?chunks=2", timeout=10)
        assert streamed.text == "chunk 1 of 2\nchunk 2 of 2\n"
        assert streamed.headers["transfer-encoding"] == "chunked"
        assert server.terminate(10) == 0
