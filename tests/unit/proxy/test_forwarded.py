"""Whose address counts, with and without trusted proxies."""

from __future__ import annotations

import pytest

from gateway.forwarded import TrustedProxies, client_group

TRUSTED = TrustedProxies(["10.0.0.0/8", "::1", "2001:db8::/32"])


def client_ip(peer: str, *headers: tuple[bytes, bytes]) -> str:
    return TRUSTED.client_ip(peer, headers)


@pytest.mark.parametrize(
    ("address", "trusted"),
    [
        ("10.1.2.3", True),
        ("11.0.0.1", False),
        ("::1", True),
        ("::ffff:10.1.2.3", True),
        ("2001:db8::5", True),
        ("nonsense", False),
        ("", False),
    ],
)
def test_trust(address: str, trusted: bool) -> None:
    assert TRUSTED.trusts(address) is trusted
    assert TRUSTED.trusts(address) is trusted, "remembered alike"


def test_an_empty_list_trusts_nobody() -> None:
    claim = (b"x-forwarded-for", b"1.1.1.1")
    assert TrustedProxies(()).client_ip("10.0.0.1", [claim]) == "10.0.0.1"


def test_a_network_must_be_one() -> None:
    with pytest.raises(ValueError, match="does not appear"):
        TrustedProxies(["10.0.0.0/8", "localhost"])


@pytest.mark.parametrize(
    ("peer", "claims", "client"),
    [
        ("192.0.2.1", b"1.1.1.1", "192.0.2.1"),
        ("10.0.0.1", b"1.1.1.1", "1.1.1.1"),
        ("10.0.0.1", b"6.6.6.6, 1.1.1.1, 10.0.0.2", "1.1.1.1"),
        ("10.0.0.1", b"10.0.0.3, 10.0.0.2", "10.0.0.3"),
        ("10.0.0.1", b"1.1.1.1, unknown, 10.0.0.2", "10.0.0.2"),
        ("10.0.0.1", b"1.1.1.1:4711", "1.1.1.1"),
        ("10.0.0.1", b"[2001:500::1]:4711", "2001:500::1"),
        ("10.0.0.1", b"", "10.0.0.1"),
    ],
)
def test_the_last_address_nobody_vouches_for(peer: str, claims: bytes, client: str) -> None:
    assert client_ip(peer, (b"x-forwarded-for", claims)) == client


def test_several_fields_are_one_list() -> None:
    fields = [(b"x-forwarded-for", b"6.6.6.6"), (b"x-forwarded-for", b"1.1.1.1, 10.0.0.2")]
    assert client_ip("10.0.0.1", *fields) == "1.1.1.1"


def test_forwarded_is_read_when_there_is_no_list() -> None:
    value = b'for=6.6.6.6, proto=https;For="[2001:500::1]:1";by=x, for=10.0.0.2'
    assert client_ip("10.0.0.1", (b"forwarded", value)) == "2001:500::1"


@pytest.mark.parametrize(
    ("address", "group"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2:ffff:ffff:ffff:ffff", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("nonsense", "nonsense"),
        ("not:an:address", "not:an:address"),
    ],
)
def test_a_customer_s_network_is_counted_as_one(address: str, group: str) -> None:
    assert client_group(address) == group
