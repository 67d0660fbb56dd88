"""https and unix sockets: what is verified, what is shown, and what a failure is called."""

from __future__ import annotations

import ssl
from dataclasses import replace
from pathlib import Path

import pytest
import trustme

from core.config import loads
from core.errors import ConfigError
from core.upstream import UpstreamTls
from tests.integration.proxy.raw import Peer, Request, answering, ok, on_loop
from tests.integration.upstreams.support import ask, pool_of, serving


class Files:
    """An authority, a server's certificate for `api.test` and 127.0.0.1, and a client's."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self.ca = str(folder / "ca.pem")
        authority.cert_pem.write_to_path(self.ca)
        self.other_ca = str(folder / "other.pem")
        trustme.CA().cert_pem.write_to_path(self.other_ca)
        client = authority.issue_cert("gateway@api.test")
        self.cert, self.key = str(folder / "client.pem"), str(folder / "client.key")
        client.private_key_pem.write_to_path(self.key)
        for blob in client.cert_chain_pems:
            blob.write_to_path(self.cert, append=True)
        self.server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("api.test", "127.0.0.1").configure_cert(self.server)
        self.demanding = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("api.test", "127.0.0.1").configure_cert(self.demanding)
        authority.configure_trust(self.demanding)
        self.demanding.verify_mode = ssl.CERT_REQUIRED
        self.trusting = UpstreamTls(ca=self.ca)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("tls"))


@on_loop
async def test_an_https_upstream_is_served_over_kept_connections(files: Files) -> None:
    seen: list[Request] = []
    async with (
        serving(answering(ok(b"x" * 300_000), requests=seen), tls=files.server) as upstream,
        pool_of(f"https://127.0.0.1:{upstream.port}", tls=files.trusting) as pool,
    ):
        for _ in range(3):
            assert await ask(pool) == (200, b"x" * 300_000)
        assert await ask(pool, "POST", body=b"y" * 1000) == (200, b"x" * 300_000)
    assert upstream.connections == 1
    assert seen[0].get("host") == [f"127.0.0.1:{upstream.port}"]
    assert seen[3].body == b"y" * 1000


@pytest.mark.parametrize(
    ("changes", "result"),
    [
        ({"server_name": "api.test"}, 200),
        ({"server_name": "elsewhere.test"}, "upstream-tls"),
        ({"ca": "other"}, "upstream-tls"),
        ({"ca": ""}, "upstream-tls"),
        ({"ca": "", "verify": False}, 200),
    ],
)
@on_loop
async def test_what_is_verified(
    changes: dict[str, object], result: int | str, files: Files
) -> None:
    if changes.get("ca") == "other":
        changes = {"ca": files.other_ca}
    tls = replace(files.trusting, **changes)
    asked: list[str | None] = []
    files.server.sni_callback = lambda _sock, name, _context: asked.append(name)
    async with (
        serving(answering(ok()), tls=files.server) as upstream,
        pool_of(f"https://127.0.0.1:{upstream.port}", tls=tls) as pool,
    ):
        assert (await ask(pool))[0] == result
    assert asked == [tls.server_name or None], "an address is never asked for by SNI"


@on_loop
async def test_a_client_certificate_is_shown_where_it_is_asked_for(files: Files) -> None:
    async with serving(answering(ok()), tls=files.demanding) as upstream:
        url = f"https://127.0.0.1:{upstream.port}"
        with_one = replace(files.trusting, cert=files.cert, key=files.key)
        async with pool_of(url, tls=with_one) as pool:
            assert await ask(pool) == (200, b"ok")
        async with pool_of(url, tls=files.trusting) as pool:
            # With TLS 1.3 a server refuses after the handshake: the connection just ends.
            assert (await ask(pool))[0] in ("upstream-tls", "upstream-closed")


@on_loop
async def test_http_where_https_is_expected(files: Files) -> None:
    async def plain(peer: Peer) -> None:
        await peer.reader.read(1)
        await peer.send(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n")

    async with (
        serving(plain) as upstream,
        pool_of(f"https://127.0.0.1:{upstream.port}", tls=files.trusting) as pool,
    ):
        assert (await ask(pool))[0] == "upstream-tls"


@on_loop
async def test_a_unix_socket(tmp_path: Path) -> None:
    path = str(tmp_path / "api.sock")
    seen: list[Request] = []
    async with pool_of(f"unix://{path}") as pool:
        assert (await ask(pool))[0] == "upstream-unreachable"
        async with serving(answering(ok(), requests=seen), path=path) as upstream:
            for _ in range(3):
                assert await ask(pool) == (200, b"ok")
            assert upstream.connections == 1
    assert seen[0].get("host") == ["localhost"]


def test_files_are_checked_when_they_are_loaded(files: Files, tmp_path: Path) -> None:
    no_pem = tmp_path / "no.pem"
    no_pem.write_text("nothing")

    def problems(tls: str) -> list[str]:
        text = f"upstreams: {{api: {{urls: [https://127.0.0.1:1], tls: {{{tls}}}}}}}"
        with pytest.raises(ConfigError) as caught:
            loads(text, env={})
        return caught.value.problems

    (ca,) = problems(f"ca: {no_pem}")
    assert ca.startswith("upstreams.api.tls.ca: ")
    assert "no PEM file of certificates" in ca
    (cert,) = problems(f"cert: {no_pem}, key: {files.key}")
    assert cert.startswith("upstreams.api.tls.cert: ")
    other = Files(tmp_path)
    (key,) = problems(f"cert: {files.cert}, key: {other.key}")
    assert "tls.key" in key
    assert "not the key of the certificate" in key


def test_a_renewed_file_makes_another_upstream(files: Files, tmp_path: Path) -> None:
    ca = tmp_path / "ca.pem"
    text = f"upstreams: {{api: {{urls: [https://127.0.0.1:1], tls: {{ca: {ca}}}}}}}"
    ca.write_text(Path(files.ca).read_text())
    first, same = (loads(text, env={}).upstreams["api"] for _ in range(2))
    assert first == same
    assert hash(first) == hash(same)
    ca.write_text(Path(files.other_ca).read_text())
    assert loads(text, env={}).upstreams["api"] != first
