"""TLS towards clients: which certificate is shown to whom, and how it is replaced."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from cryptography import x509

from core.config.tls import TlsSettings
from core.errors import ConfigError
from gateway.certificates import Certificates
from gateway.http.exchange import Exchange
from gateway.http.server import HttpServer, Limits
from gateway.http.tls import TlsListener
from tests.support.certificates import Files
from tests.support.h2 import Serving, on_uvloop, serving
from tests.support.wait import wait_until_async


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


async def hello(exchange: Exchange) -> None:
    exchange.respond(200, [], f"{exchange.request.version} {exchange.request.scheme}".encode())


class Door:
    """Certificates and what they report."""

    def __init__(self, **settings: Any) -> None:
        self.reloads: Counter[str] = Counter()
        self.expiry: dict[str, float] = {}
        self.certificates = Certificates(
            TlsSettings(**settings),
            on_reload=lambda result: self.reloads.update([result]),
            on_expiry=self.expiry.__setitem__,
            interval_s=0.02,
        )

    @contextlib.asynccontextmanager
    async def open(self, **more: Any) -> AsyncIterator[Serving]:
        watching = asyncio.create_task(self.certificates.run())
        try:
            async with serving(hello, tls=self.certificates, **more) as at:
                yield at
        finally:
            watching.cancel()


async def shown(port: int, context: ssl.SSLContext, name: str | None = None) -> int:
    """The serial number of the certificate that a client is shown."""
    return (await seen(port, context, name)).serial_number


async def seen(port: int, context: ssl.SSLContext, name: str | None) -> x509.Certificate:
    _, writer = await asyncio.open_connection(
        "127.0.0.1", port, ssl=context, server_hostname=name or "127.0.0.1"
    )
    der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    return x509.load_der_x509_certificate(der)


def serial(pair: dict[str, str]) -> int:
    return x509.load_pem_x509_certificate(Path(pair["cert"]).read_bytes()).serial_number


@on_uvloop
async def test_both_protocols_by_agreement(files: Files) -> None:
    door = Door(**files.pair("a"))
    async with door.open() as at:
        url = f"https://localhost:{at.port}/"
        for http2, text in ((True, "2 https"), (False, "1.1 https")):
            context = files.trusting(*(("h2",) if http2 else ("http/1.1",)))
            async with httpx.AsyncClient(verify=context, http2=http2, trust_env=False) as http:
                assert (await http.get(url)).text == text
        nothing = ssl.create_default_context(cafile=str(files.ca_file))
        reader, writer = await asyncio.open_connection("localhost", at.port, ssl=nothing)
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        assert (await reader.read(-1)).endswith(b"1.1 https")
        writer.close()


@on_uvloop
async def test_without_h2_in_alpn_there_is_none(files: Files) -> None:
    async with (
        Door(**files.pair("a"), alpn=("http/1.1",)).open() as at,
        httpx.AsyncClient(verify=files.trusting(), http2=True, trust_env=False) as http,
    ):
        assert (await http.get(f"https://localhost:{at.port}/")).text == "1.1 https"


@on_uvloop
async def test_the_certificate_is_that_of_the_name_asked_for(files: Files) -> None:
    first = files.pair("first")
    api = files.pair("api", "api.example.com", "*.other.example")
    named = files.pair("named", "ignored.example")
    door = Door(**first, certificates=(api, {**named, "names": ["named.example"]}))
    # Whom it is for is not our question here, so the client does not ask it.
    context = files.trusting()
    context.check_hostname = False
    async with door.open() as at:
        for name, pair in (
            ("api.example.com", api),
            ("API.example.com", api),
            ("a.other.example", api),
            ("a.b.other.example", first),
            ("other.example", first),
            ("named.example", named),
            ("ignored.example", first),
            ("localhost", first),
            (None, first),
        ):
            assert await shown(at.port, context, name) == serial(pair), name
        # The agreement on a protocol is made under the chosen certificate.
        async with httpx.AsyncClient(verify=context, http2=True, trust_env=False) as http:
            answer = await http.get(
                f"https://127.0.0.1:{at.port}/", extensions={"sni_hostname": "api.example.com"}
            )
    assert answer.text == "2 https"
    assert len(door.expiry) == 3


@on_uvloop
async def test_versions(files: Files) -> None:
    def client(version: ssl.TLSVersion) -> ssl.SSLContext:
        context = files.trusting()
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.maximum_version = version
        return context

    pair = files.pair("a")
    async with Door(**pair, min_version="1.3").open() as at:
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await shown(at.port, client(ssl.TLSVersion.TLSv1_2))
        assert await shown(at.port, client(ssl.TLSVersion.TLSv1_3)) == serial(pair)
        await wait_until_async(lambda: at.events["tls_refused"] == 1, what="the count")
    async with Door(**pair).open() as at:
        assert await shown(at.port, client(ssl.TLSVersion.TLSv1_2)) == serial(pair)


@on_uvloop
async def test_mutual_tls(files: Files) -> None:
    stranger = trustme.CA().issue_cert("client@example.com")
    door = Door(**files.pair("a"), client_ca=str(files.ca_file))

    async def ask(port: int, client: trustme.LeafCert | None) -> httpx.Response:
        context = files.trusting()
        if client is not None:
            client.configure_cert(context)
        async with httpx.AsyncClient(verify=context, http2=True, trust_env=False) as http:
            return await http.get(f"https://localhost:{port}/")

    async with door.open() as at:
        known = files.ca.issue_cert("client@example.com")
        assert (await ask(at.port, known)).text == "2 https"
        for client in (None, stranger):
            with pytest.raises(httpx.TransportError):
                await ask(at.port, client)
        await wait_until_async(lambda: at.events["tls_refused"] == 2, what="both counts")


@on_uvloop
async def test_a_new_certificate_under_load_drops_nothing(files: Files) -> None:
    """Each handshake shows one that is or was in force; connections that are open stay."""
    serials = {serial(pair := files.pair("a"))}
    door = Door(**pair)
    context = files.trusting()
    failed: list[BaseException] = []
    asked = fresh = 0
    stop = False

    async def load(http2: bool) -> None:
        nonlocal asked, fresh
        try:
            async with httpx.AsyncClient(verify=context, http2=http2, trust_env=False) as kept:
                while not stop:
                    answer = await kept.get(f"https://localhost:{at.port}/")
                    assert answer.status_code == 200
                    asked += 1
                    found = await shown(at.port, context)
                    assert found in serials
                    fresh += 1
        except BaseException as error:
            failed.append(error)
            raise

    async with door.open() as at:
        tasks = [asyncio.create_task(load(http2)) for http2 in (True, False)]
        for number in range(1, 6):
            # Known before it can be shown.
            serials.add(new := serial(files.pair("b")))
            for kind in ("key", "crt"):  # one after the other, as most tools do
                (files.folder / f"b.{kind}").replace(files.folder / f"a.{kind}")
            await wait_until_async(
                lambda number=number: door.reloads["applied"] == number, what="the reload"
            )
            assert await shown(at.port, context) == new
            before = fresh
            await wait_until_async(
                lambda before=before: fresh > before + 2 or failed, what="more handshakes"
            )
        stop = True
        await asyncio.gather(*tasks)
        assert at.server.connections <= 2
    assert not failed
    assert asked > 10
    assert not door.reloads["refused"]


@on_uvloop
async def test_a_bad_pair_changes_nothing_until_it_is_mended(files: Files) -> None:
    pair = files.pair("a")
    old = serial(pair)
    door = Door(**pair)
    context = files.trusting()
    other = files.pair("b")
    async with door.open() as at:
        for number, (file, content) in enumerate(
            [
                (pair["key"], Path(other["key"]).read_bytes()),  # belongs to another certificate
                (pair["key"], b"no key"),
                (pair["cert"], b"no certificate"),
            ],
            start=1,
        ):
            Path(file).write_bytes(content)
            await wait_until_async(
                lambda number=number: door.reloads["refused"] == number, what="the refusal"
            )
            assert await shown(at.port, context) == old
        Path(pair["cert"]).unlink()
        await wait_until_async(lambda: door.reloads["refused"] == 4, what="the refusal")
        assert await shown(at.port, context) == old
        new = serial(files.pair("a"))
        await wait_until_async(lambda: door.reloads["applied"] == 1, what="the reload")
        assert await shown(at.port, context) == new


@on_uvloop
async def test_a_reload_of_the_configuration(files: Files) -> None:
    a, b = files.pair("a"), files.pair("b")
    door = Door(**a)
    context = files.trusting()
    async with door.open() as at:
        with pytest.raises(ConfigError, match=r"none\.crt: cannot be read: No such file"):
            door.certificates.prepare(TlsSettings(cert=a["cert"] + "none.crt", key=a["key"]))
        assert await shown(at.port, context) == serial(a)
        switch = door.certificates.prepare(TlsSettings(**b))
        assert await shown(at.port, context) == serial(a)  # not before the whole reload is taken
        switch()
        assert await shown(at.port, context) == serial(b)
        assert door.expiry[a["cert"]] == float("inf")
        # What is configured as before and cannot be read now does not stand in a reload's way.
        shown_last = serial(b)
        Path(b["cert"]).write_text("broken")
        door.certificates.prepare(TlsSettings(**b))()
        assert door.reloads["refused"] >= 1
        assert await shown(at.port, context) == shown_last


def test_files_that_cannot_be_used(files: Files) -> None:
    a, b = files.pair("a"), files.pair("b")
    secret = files.folder / "secret.key"
    secret.write_text(
        "-----BEGIN ENCRYPTED PRIVATE KEY-----\nMAA=\n-----END ENCRYPTED PRIVATE KEY-----\n"
    )
    ca = files.folder / "empty.pem"
    ca.write_text("nothing")
    for settings, message in (
        ({**a, "cert": "/nowhere.crt"}, "/nowhere.crt: cannot be read: No such file"),
        ({**a, "key": b["key"]}, "does not belong to the certificate in"),
        ({"cert": a["key"], "key": a["key"]}, "no certificate in PEM form"),
        ({**a, "key": a["cert"]}, "no private key in PEM form"),
        ({**a, "client_ca": str(ca)}, "empty.pem: no certificates in PEM form"),
        ({**a, "certificates": [{**b, "key": a["key"]}]}, "does not belong"),
    ):
        with pytest.raises(ConfigError, match=message):
            Door(**settings)
    with pytest.raises(ConfigError, match=r"secret\.key: (the key is encrypted|no private key)"):
        Door(**{**a, "key": str(secret)})


def test_an_expired_certificate_is_served_and_its_end_told(files: Files) -> None:
    door = Door(**files.expired("old"))
    assert list(door.expiry.values()) == [1_577_836_800.0]


@on_uvloop
async def test_handshakes_that_do_not_end(files: Files) -> None:
    """They are few, they end, and a client that means it gets through all the while."""
    door = Door(**files.pair("a"))
    server = HttpServer(hello, limits=Limits(), refuse=lambda *_: ([], b""))
    sock = socket.socket()
    sock.bind(("127.0.0.1", 0))
    port = sock.getsockname()[1]
    listener = TlsListener(server, sock, door.certificates, 2.5, 10)
    listener.start(128)
    try:
        waiting = [await asyncio.open_connection("127.0.0.1", port) for _ in range(30)]
        for _, writer in waiting[:15]:
            writer.write(b"\x16\x03\x01")
        await wait_until_async(lambda: listener.handshakes == 10, what="ten at most")
        assert await shown(port, files.trusting()) > 0
        assert listener.handshakes <= 10
        for reader, writer in waiting:
            with contextlib.suppress(ConnectionError):
                assert await asyncio.wait_for(reader.read(-1), 20) == b""
            writer.close()
        await wait_until_async(lambda: listener.handshakes == 0, what="none")
        assert await shown(port, files.trusting()) > 0
    finally:
        listener.close()
        await server.close()


@on_uvloop
async def test_what_is_no_tls_is_counted(files: Files) -> None:
    async with Door(**files.pair("a")).open() as at:
        reader, writer = await asyncio.open_connection("127.0.0.1", at.port)
        writer.write(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
        with contextlib.suppress(ConnectionError):
            await reader.read(-1)
        writer.close()
        _, writer = await asyncio.open_connection("127.0.0.1", at.port)
        writer.close()
        await wait_until_async(
            lambda: at.events == {"tls_refused": 1, "tls_closed": 1}, what="both counts"
        )
