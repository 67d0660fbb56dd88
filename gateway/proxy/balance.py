"""Which endpoint a request goes to. Each strategy picks among the live ones; see `Endpoint.live`.

`update` is called when endpoints come, go, or change between live and not; `pick` for each request
of an upstream with more than one endpoint. `avoid` are endpoints that the request was tried on:
they are taken only when there is no other.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from hashlib import blake2b
from math import gcd
from typing import Final, Protocol

from core.policy import Upstream
from core.upstream import Balance
from gateway.forwarded import TrustedProxies
from gateway.http.message import Request
from gateway.proxy.target import Endpoint

# Points on the ring: with 160 for each part of the weight, shares are within some percent.
_POINTS: Final = 160
_MAX_POINTS: Final = 32_000
_FEWEST_POINTS: Final = 4


def request_key(hash_by: str, trusted: TrustedProxies) -> Callable[[Request], bytes] | None:
    """What `{hash: …}` takes of a request: `client_ip`, `path`, or a header by name."""
    if not hash_by:
        return None
    if hash_by == "client_ip":
        return lambda request: trusted.client_ip(request.peer, request.headers).encode()
    if hash_by == "path":
        return lambda request: request.raw_path
    wanted = hash_by.encode()

    def header(request: Request) -> bytes:
        for name, value in request.headers:
            if name == wanted:
                return value
        return b""

    return header


class Balancer(Protocol):
    def update(self, endpoints: Sequence[Endpoint]) -> None:
        """All endpoints, live or not; at least one of them is live."""

    def pick(self, key: bytes, avoid: Collection[Endpoint]) -> Endpoint:
        """A live endpoint; `key` is what `{hash: …}` named, empty if the request has none."""


def make(upstream: Upstream) -> Balancer:
    if upstream.balance is Balance.HASH:
        return HashRing()
    if upstream.balance is Balance.LEAST_CONNECTIONS:
        return LeastConnections()
    return RoundRobin()


class RoundRobin:
    """In turn; with weights smoothly: 5, 1, 1 is a a b a c a a, and not five times a."""

    def __init__(self) -> None:
        self._live: list[Endpoint] = []
        self._total = 0
        self._even = True
        self._next = 0
        self._others = 0

    def update(self, endpoints: Sequence[Endpoint]) -> None:
        self._live = [endpoint for endpoint in endpoints if endpoint.live]
        self._total = sum(endpoint.weight for endpoint in self._live)
        self._even = len({endpoint.weight for endpoint in self._live}) == 1

    def pick(self, key: bytes, avoid: Collection[Endpoint]) -> Endpoint:
        live = self._live
        if avoid:
            # A turn of its own: second tries must not decide where the next first try goes.
            others = [endpoint for endpoint in live if endpoint not in avoid] or live
            self._others += 1
            return others[self._others % len(others)]
        if self._even:
            self._next += 1
            return live[self._next % len(live)]
        best = live[0]
        for endpoint in live:
            endpoint.current += endpoint.weight
            if endpoint.current > best.current:
                best = endpoint
        best.current -= self._total
        return best


class LeastConnections:
    """Fewest requests in flight for its weight; among equals in turn."""

    def __init__(self) -> None:
        self._live: list[Endpoint] = []
        self._next = 0

    def update(self, endpoints: Sequence[Endpoint]) -> None:
        self._live = [endpoint for endpoint in endpoints if endpoint.live]

    def pick(self, key: bytes, avoid: Collection[Endpoint]) -> Endpoint:
        live = self._live
        if avoid:
            live = [endpoint for endpoint in live if endpoint not in avoid] or live
        self._next += 1
        first = self._next % len(live)
        best = live[first]
        for endpoint in (*live[first + 1 :], *live[:first]):
            # One more here against one more there, compared without fractions.
            if (endpoint.load + 1) * best.weight < (best.load + 1) * endpoint.weight:
                best = endpoint
        return best


class HashRing:
    """Consistent hashing: an endpoint that goes takes only its own keys along, and they return.

    The same in every worker, on every host and after a restart. A request without the key is sent
    in turn.
    """

    def __init__(self) -> None:
        self._hashes: list[int] = []
        self._owners: list[Endpoint] = []
        self._members: tuple[tuple[str, str, int], ...] = ()
        self._keyless = RoundRobin()

    def update(self, endpoints: Sequence[Endpoint]) -> None:
        self._keyless.update(endpoints)
        members = tuple((e.url, e.target.label, e.weight) for e in endpoints)
        known = set(self._owners)
        if members == self._members and known.issuperset(endpoints):
            return  # only who is live has changed, which `pick` sees
        self._members = members
        unit = gcd(*(endpoint.weight for endpoint in endpoints))
        total = sum(endpoint.weight for endpoint in endpoints) // unit
        each = max(_FEWEST_POINTS, min(_POINTS, _MAX_POINTS // total))
        points = sorted(
            (
                (_hash(b"%b#%d" % (endpoint.target.label.encode(), number)), index)
                for index, endpoint in enumerate(endpoints)
                for number in range(each * endpoint.weight // unit)
            ),
        )
        self._hashes = [point for point, _ in points]
        self._owners = [endpoints[index] for _, index in points]

    def pick(self, key: bytes, avoid: Collection[Endpoint]) -> Endpoint:
        if not key:
            return self._keyless.pick(key, avoid)
        owners = self._owners
        start = bisect_left(self._hashes, _hash(key))
        second_best: Endpoint | None = None
        for step in range(len(owners)):
            endpoint = owners[(start + step) % len(owners)]
            if endpoint.live:
                if endpoint not in avoid:
                    return endpoint
                second_best = second_best or endpoint
        return second_best or owners[start % len(owners)]


def _hash(data: bytes) -> int:
    return int.from_bytes(blake2b(data, digest_size=8).digest())
