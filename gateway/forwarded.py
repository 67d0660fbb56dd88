"""Whose address a request came from, when trusted proxies stand in front of the gateway.

X-Forwarded-For and Forwarded (RFC 7239) are claims. They are believed only from peers in the
configured networks, and read from the right: the last address that no trusted proxy vouches for is
the client. Anything else lets a customer choose the address that limits are counted on.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Final

_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# Peers whose verdict is remembered; proxies are few, and when strangers fill it, it starts again.
_CACHE_SIZE: Final = 4096

# Bits of an IPv6 address that name a customer's network (RFC 6177): the rest is theirs to choose.
_CUSTOMER_BITS: Final = 64

_FOR = re.compile(rb'(?:^|;)\s*for\s*=\s*("[^"]*"|[^;\s]+)', re.IGNORECASE)


class TrustedProxies:
    """A compiled list of networks, e.g. `("10.0.0.0/8", "::1")`; empty trusts nobody.

    Raises:
        ValueError: an entry is no address or network.
    """

    __slots__ = ("_cache", "_networks")

    def __init__(self, networks: Iterable[str]) -> None:
        self._networks: tuple[_Network, ...] = tuple(
            ipaddress.ip_network(network, strict=False) for network in networks
        )
        self._cache: dict[str, bool] = {}

    def trusts(self, address: str) -> bool:
        """Whether a peer (as text) lies in one of the networks; text that is no address never."""
        if not self._networks:
            return False
        known = self._cache.get(address)
        if known is None:
            if len(self._cache) >= _CACHE_SIZE:
                self._cache.clear()
            known = self._cache[address] = self._lookup(address)
        return known

    def _lookup(self, address: str) -> bool:
        parsed = _parse(address)
        return parsed is not None and any(
            parsed.version == network.version and parsed in network for network in self._networks
        )

    def client_ip(self, peer: str, headers: Iterable[tuple[bytes, bytes]]) -> str:
        """The client's address as text, without port; the peer's own when it is not trusted.

        X-Forwarded-For is believed where both fields are there, Forwarded only in its absence: a
        trusted proxy has to set the one or remove it, or its clients may write it themselves.

        A claim that is no address ends the walk: the nearest proxy before it is then the client,
        as in "unknown" or an obfuscated node.
        """
        client = peer
        if not self._networks or not self.trusts(client):
            return client
        for claim in reversed(_claims(headers)):
            parsed = _parse(claim)
            if parsed is None:
                return client
            client = str(parsed)
            if not self.trusts(client):
                return client
        return client


def client_group(address: str) -> str:
    """What an address without a key is counted under: the IPv4 address, or the IPv6 /64.

    A customer owns all 2**64 addresses of a /64, so counting each would count none. IPv4 mapped
    into IPv6 is counted as IPv4. Text that is no address is its own group.
    """
    return _group(address) if ":" in address else address


@lru_cache(maxsize=_CACHE_SIZE)
def _group(address: str) -> str:
    parsed = _parse(address)
    if not isinstance(parsed, ipaddress.IPv6Address):
        return address if parsed is None else str(parsed)
    return str(ipaddress.IPv6Network((int(parsed), _CUSTOMER_BITS), strict=False))


def _claims(headers: Iterable[tuple[bytes, bytes]]) -> list[str]:
    """The chain of addresses, client first."""
    listed: list[bytes] = []
    forwarded: list[bytes] = []
    for name, value in headers:
        if name == b"x-forwarded-for":
            listed += value.split(b",")
        elif name == b"forwarded":
            forwarded += _nodes(value)
    return [claim.decode("latin-1").strip() for claim in listed or forwarded]


def forwarded_nodes(values: Iterable[bytes]) -> list[bytes]:
    """The addresses of Forwarded fields as X-Forwarded-For has them: no quotes, brackets or ports.

    A node that is no address ("unknown", "_hidden", none at all) becomes `unknown`.
    """
    parsed = [_parse(node.decode("latin-1")) for value in values for node in _nodes(value)]
    return [b"unknown" if address is None else str(address).encode() for address in parsed]


def _nodes(value: bytes) -> list[bytes]:
    """The `for` of each element of a Forwarded field, without its quotes."""
    matches = map(_FOR.search, value.split(b","))
    return [b"unknown" if match is None else match[1].strip(b'"') for match in matches]


def _parse(text: str) -> _Address | None:
    """An address, with or without port or brackets; IPv4 mapped into IPv6 becomes IPv4."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
