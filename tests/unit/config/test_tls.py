"""`gateway.tls` and `gateway.http2`: what is accepted, and what is said of what is not."""

from __future__ import annotations

import pytest

from core.config import Snapshot, loads, restart_needed
from core.errors import ConfigError


def load(gateway: str) -> Snapshot:
    return loads(f"gateway:\n  {gateway}\n", env={})


def problems(gateway: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(gateway)
    return str(caught.value)


def test_by_default_there_is_no_tls_and_no_http2_without_it() -> None:
    settings = load("workers: 1").settings.gateway
    assert settings.tls is None
    assert settings.http2.h2c is False
    assert load("tls:").settings.gateway.tls is None


def test_one_certificate() -> None:
    tls = load("tls: {listen: 0.0.0.0:443, cert: a, key: b, min_version: 1.3}").settings.gateway.tls
    assert tls is not None
    assert (tls.listen.port, tls.min_version, tls.alpn) == (443, "1.3", ("h2", "http/1.1"))
    assert [(pair.cert, pair.key, pair.names) for pair in tls.pairs] == [("a", "b", None)]


def test_further_certificates_come_after_the_first() -> None:
    more = "certificates: [{cert: c, key: d, names: [API.example.com, '*.example.com']}]"
    tls = load(f"tls: {{cert: a, key: b, {more}}}").settings.gateway.tls
    assert tls is not None
    assert [pair.cert for pair in tls.pairs] == ["a", "c"]
    assert tls.pairs[1].names == ("api.example.com", "*.example.com")
    alone = load(f"tls: {{{more}}}").settings.gateway.tls
    assert alone is not None
    assert [pair.cert for pair in alone.pairs] == ["c"]


@pytest.mark.parametrize(
    ("gateway", "message"),
    [
        ("tls: {}", "no certificate; name the files cert and key"),
        ("tls: {cert: a}", "name both cert and key"),
        ("tls: {key: a}", "name both cert and key"),
        ("tls: {cert: a, key: b, min_version: 1.1}", "write 1.2 or 1.3"),
        ("tls: {cert: a, key: b, alpn: [h3]}", "write h2 or http/1.1"),
        ("tls: {cert: a, key: b, alpn: []}", "gateway.tls.alpn"),
        ("tls: {certificates: [{cert: a, key: b, names: [a b]}]}", "write api.example.com"),
        ("tls: {certificates: [{cert: a, key: b, names: ['a.*']}]}", "write api.example.com"),
        ("http2: {h2c: maybe}", "write true or false"),
        ("http2: {max_streams: 0}", "gateway.http2.max_streams"),
        ("http2: {max_streams: 5000}", "gateway.http2.max_streams"),
        ("http2: {stream_window: 1KiB}", "write 64 KiB or more"),
        ("http2: {connection_window: 4GiB}", "2 GiB at most"),
    ],
)
def test_what_is_refused(gateway: str, message: str) -> None:
    assert message in problems(gateway)


def test_addresses_are_apart() -> None:
    clash = "tls: {cert: a, key: b, listen: 127.0.0.1:8080}"
    assert "already taken by gateway.listen (127.0.0.1:8080)" in problems(clash)
    clash = "tls: {cert: a, key: b, listen: 0.0.0.0:8081}"
    assert "already taken by control.listen (127.0.0.1:8081)" in problems(clash)
    clash = "tls: {cert: a, key: b}\n  listen: 0.0.0.0:8443"
    assert "gateway.tls.listen: already taken by gateway.listen" in problems(clash)


def test_what_a_reload_does_not_change() -> None:
    plain = load("workers: 1")
    one = load("tls: {cert: a, key: b}")
    other = load("tls: {cert: c, key: d, min_version: 1.3, alpn: [http/1.1], client_ca: e}")
    moved = load("tls: {cert: a, key: b, listen: 127.0.0.1:9443}")
    assert restart_needed(one, other) == []
    assert "gateway.tls.listen" in restart_needed(plain, one)
    assert restart_needed(one, moved) == ["gateway.tls.listen"]
    assert restart_needed(one, load("tls: {cert: a, key: b}\n  http2: {h2c: true}")) == [
        "gateway.http2.h2c"
    ]
