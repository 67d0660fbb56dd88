"""Who gets the next request: turns, weights, load, and the same key to the same target."""

from __future__ import annotations

from collections import Counter

import pytest

from gateway.forwarded import TrustedProxies
from gateway.http.message import Request
from gateway.proxy.balance import (
    Balancer,
    HashRing,
    LeastConnections,
    RoundRobin,
    request_key,
)
from gateway.proxy.target import Endpoint, parse_target


def endpoints(*weights: int) -> list[Endpoint]:
    urls = [f"http://10.0.0.{number}:9000" for number in range(1, len(weights) + 1)]
    return [
        Endpoint(url, parse_target(url), weight) for url, weight in zip(urls, weights, strict=True)
    ]


def picked(balancer: Balancer, count: int, *avoid: Endpoint) -> Counter[Endpoint]:
    return Counter(balancer.pick(b"", avoid) for _ in range(count))


def test_equal_targets_take_turns() -> None:
    targets = endpoints(1, 1, 1)
    balancer = RoundRobin()
    balancer.update(targets)
    assert picked(balancer, 300) == Counter(dict.fromkeys(targets, 100))


def test_weights_are_shares_and_are_spread_evenly() -> None:
    heavy, light, other = targets = endpoints(5, 1, 1)
    balancer = RoundRobin()
    balancer.update(targets)
    turns = [balancer.pick(b"", ()) for _ in range(70)]
    assert Counter(turns) == {heavy: 50, light: 10, other: 10}
    longest = max(len(run) for run in "".join("h" if t is heavy else "." for t in turns).split("."))
    assert longest < 5


def test_second_tries_do_not_decide_about_first_ones() -> None:
    first, second = targets = endpoints(1, 1)
    balancer = RoundRobin()
    balancer.update(targets)
    firsts = []
    for _ in range(10):
        firsts.append(balancer.pick(b"", ()))
        balancer.pick(b"", {firsts[-1]})
    assert Counter(firsts) == {first: 5, second: 5}


def test_what_is_not_live_gets_nothing_and_comes_back() -> None:
    targets = endpoints(2, 1, 1)
    balancer = RoundRobin()
    targets[0].live = False
    balancer.update(targets)
    assert picked(balancer, 10) == {targets[1]: 5, targets[2]: 5}
    targets[0].live = True
    balancer.update(targets)
    assert picked(balancer, 40)[targets[0]] == 20


@pytest.mark.parametrize("balancer", [RoundRobin(), LeastConnections(), HashRing()])
def test_what_was_tried_is_avoided_unless_there_is_no_other(balancer: Balancer) -> None:
    targets = endpoints(1, 3)
    balancer.update(targets)
    for key in (b"", b"a", b"b", b"c"):
        assert balancer.pick(key, {targets[0]}) is targets[1]
        assert balancer.pick(key, set(targets)) in targets


def test_the_least_loaded_for_its_weight_is_next() -> None:
    targets = endpoints(1, 1, 3)
    balancer = LeastConnections()
    balancer.update(targets)
    for _ in range(50):
        balancer.pick(b"", ()).opening += 1
    assert [target.load for target in targets] == [10, 10, 30]
    targets[1].opening = 0
    assert balancer.pick(b"", ()) is targets[1]


KEYS = [b"key-%d" % number for number in range(4_000)]


def test_a_key_stays_with_its_target_and_shares_follow_weights() -> None:
    targets = endpoints(1, 1, 2)
    ring, elsewhere = HashRing(), HashRing()
    ring.update(targets)
    elsewhere.update(list(reversed(targets)))  # another worker, another order
    owners = {key: ring.pick(key, ()) for key in KEYS}
    assert all(ring.pick(key, ()) is owner for key, owner in owners.items())
    shares = Counter(owners.values())
    assert shares[targets[2]] == pytest.approx(2_000, rel=0.25)
    assert shares[targets[0]] == pytest.approx(1_000, rel=0.35)
    assert all(elsewhere.pick(key, ()) is owner for key, owner in owners.items())


def test_a_target_that_goes_takes_only_its_own_keys_along() -> None:
    targets = endpoints(1, 1, 1, 1)
    ring = HashRing()
    ring.update(targets)
    before = {key: ring.pick(key, ()) for key in KEYS}
    targets[2].live = False  # ejected
    ring.update(targets)
    out = {key: ring.pick(key, ()) for key in KEYS}
    assert all(out[key] is before[key] for key in KEYS if before[key] is not targets[2])
    assert targets[2] not in out.values()
    assert len({out[key] for key in KEYS if before[key] is targets[2]}) == 3, "spread over others"
    targets[2].live = True
    ring.update(targets)
    assert {key: ring.pick(key, ()) for key in KEYS} == before
    ring.update([target for target in targets if target is not targets[2]])  # gone from DNS
    assert {key: ring.pick(key, ()) for key in KEYS} == out


def test_a_request_without_the_key_takes_turns() -> None:
    targets = endpoints(1, 1)
    ring = HashRing()
    ring.update(targets)
    assert picked(ring, 10) == {targets[0]: 5, targets[1]: 5}


def test_what_is_hashed() -> None:
    trusted = TrustedProxies(["10.0.0.0/8"])
    headers = [(b"x-forwarded-for", b"192.0.2.7"), (b"x-session", b"s1")]
    request = Request("GET", b"/a/b", headers, peer="10.0.0.1")

    def key(hash_by: str) -> bytes | None:
        of = request_key(hash_by, trusted)
        return None if of is None else of(request)

    assert key("") is None
    assert key("client_ip") == b"192.0.2.7"
    assert key("path") == b"/a/b"
    assert key("x-session") == b"s1"
    assert key("x-missing") == b""
