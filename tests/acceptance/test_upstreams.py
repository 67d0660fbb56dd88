"""What a customer is charged when an upstream fails, is tried again, or is given a rest."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.acceptance.conftest import NewDatabase
from tests.acceptance.test_memory import children
from tests.acceptance.test_outage import counted
from tests.support import free_port, wait_until
from tests.support.servers import server_directory
from tests.support.stack import Stack, start_stack

_RETRIES = "retries: {attempts: 4, backoff: 1ms, budget: {floor: 1000}}"
_CONFIG = f"""
gateway: {{drain: 2s, reservation: 2s}}
redis: {{url: "${{TALLYGATE_REDIS_URL}}", timeout: 5s}}
postgres: {{url: "${{TALLYGATE_POSTGRES_URL}}", timeout: 2s}}
secrets: {{key_pepper: "${{TALLYGATE_KEY_PEPPER}}"}}
reconciler: {{flush_interval: 50ms, lease: 1s}}
log: {{format: json, level: info}}
upstreams:
  api: {{urls: ["${{UPSTREAM}}"], {_RETRIES}}}
  half: {{urls: ["http://127.0.0.1:%(dead)d", "${{UPSTREAM}}"], {_RETRIES}, eject: {{failures: 2}}}}
  dead: {{urls: ["http://127.0.0.1:%(dead)d"], {_RETRIES}}}
  slow: {{urls: ["${{UPSTREAM}}"], retries: {{attempts: 10, backoff: 1h, budget: {{floor: 1000}}}}}}
  weak: {{urls: ["${{UPSTREAM}}"], breaker: {{minimum: 5, open: 1h}}}}
routes:
  - {{match: {{path: /admit/dead}}, upstream: dead}}
  - {{match: {{path: /any/dead}}, upstream: dead, charge: on_response}}
  - {{match: {{path: /paid/dead}}, upstream: dead, charge: {{status: [2xx]}}}}
  - {{match: {{path: /admit/half}}, upstream: half}}
  - {{match: {{path: /any/half}}, upstream: half, charge: on_response}}
  - {{match: {{path: /paid/half}}, upstream: half, charge: {{status: [2xx]}}}}
  - {{match: {{path: /slow/*}}, upstream: slow, charge: {{status: [2xx]}}}}
  - {{match: {{path: /admit/*}}, upstream: api}}
  - {{match: {{path: /any/*}}, upstream: api, charge: on_response}}
  - {{match: {{path: /paid/*}}, upstream: api, charge: {{status: [2xx]}}}}
  - {{match: {{path: /weak/*}}, upstream: weak}}
plans:
  large: {{limits: {{monthly: {{period: billing, limit: 1000000}}}}}}
"""
ROUTES = ("/admit", "/any", "/paid")


@pytest.fixture(scope="module")
def stack(new_database: NewDatabase) -> Iterator[Stack]:
    config = _CONFIG % {"dead": free_port()}
    with server_directory() as path, start_stack(path, config, new_database()) as running:
        yield running


@pytest.mark.parametrize("route", ROUTES)
def test_a_request_that_is_tried_again_is_charged_once(stack: Stack, route: str) -> None:
    who = stack.subscribe("large")
    answer = stack.get(f"{route}/flaky?times=3", who.key, headers={"x-who": who.id})
    assert (answer.status_code, answer.text) == (200, "ok\n")
    assert stack.served(who.id) == 4
    counted(stack, who, 1)
    retries = {"upstream": "api", "cause": "status"}
    wait_until(lambda: stack.metric("tallygate_upstream_retries_total", **retries) >= 3)


@pytest.mark.parametrize(("route", "charged"), [*zip(ROUTES, (1, 1, 0), strict=True)])
def test_one_that_fails_to_the_end_is_charged_as_its_route_says(
    stack: Stack, route: str, charged: int
) -> None:
    who = stack.subscribe("large")
    answer = stack.get(f"{route}/flaky?times=99", who.key, headers={"x-who": who.id})
    assert answer.status_code == 503
    assert "content-type" not in answer.headers or "problem" not in answer.headers["content-type"]
    assert stack.served(who.id) == 4
    counted(stack, who, charged)


@pytest.mark.parametrize(("route", "charged"), [*zip(ROUTES, (1, 0, 0), strict=True)])
def test_one_that_reaches_nobody_is_charged_as_its_route_says(
    stack: Stack, route: str, charged: int
) -> None:
    who = stack.subscribe("large")
    answer = stack.get(f"{route}/dead", who.key, method="POST", content=b"x")
    problem = answer.json()
    assert answer.status_code == 502
    assert problem["type"] == "urn:tallygate:problem:bad-gateway"
    assert problem["code"] == "upstream-unreachable"
    counted(stack, who, charged)


def test_a_dead_target_beside_a_good_one_costs_nobody_anything(stack: Stack) -> None:
    for route in ROUTES:
        who = stack.subscribe("large")
        for _ in range(5):
            answer = stack.get(
                f"{route}/half", who.key, method="POST", content=b"x", headers={"x-who": who.id}
            )
            assert answer.status_code == 200
        assert stack.served(who.id) == 5
        counted(stack, who, 5)
    wait_until(lambda: stack.metric("tallygate_upstream_targets_down", upstream="half") == 1)
    assert stack.metric("tallygate_upstream_ejections_total", upstream="half") == 1
    idle = {"upstream": "half", "state": "idle"}
    wait_until(lambda: stack.metric("tallygate_upstream_connections", **idle) >= 1)
    assert stack.gateways[0].output.count('"event":"upstream_target_ejected"') == 1


def test_a_worker_that_is_killed_between_two_tries_charges_nothing(stack: Stack) -> None:
    who, other = stack.subscribe("large"), stack.subscribe("large")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(stack.get, "/slow/flaky?times=99", who.key, headers={"x-who": who.id})
        wait_until(lambda: stack.served(who.id) >= 1, what="the first try")
        assert stack.state(who)["requests"].total == 1
        (worker,) = children(stack.gateways[0].pid)
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(httpx.HTTPError):
            asked.result(30)
    counted(stack, who, 0)
    wait_until(lambda: stack.get("/paid/x", other.key).status_code == 200, what="another worker")
    counted(stack, other, 1)


def test_what_an_open_breaker_refuses_is_not_counted(stack: Stack) -> None:
    who = stack.subscribe("large")
    for _ in range(5):
        assert stack.get("/weak/status?code=503", who.key).status_code == 503
    for _ in range(3):
        answer = stack.get("/weak/x", who.key, headers={"x-who": who.id})
        assert answer.status_code == 503
        assert answer.json()["type"] == "urn:tallygate:problem:upstream-unavailable"
        assert answer.json()["code"] == "upstream-resting"
        assert 3_500 < int(answer.headers["retry-after"]) <= 3_600
    assert stack.served(who.id) == 0
    counted(stack, who, 5)
    wait_until(lambda: stack.metric("tallygate_upstream_breaker_state", upstream="weak") == 2)
    errors = {"upstream": "weak", "kind": "upstream-resting"}
    wait_until(lambda: stack.metric("tallygate_upstream_errors_total", **errors) == 3)
    assert stack.gateways[0].output.count('"event":"upstream_breaker_open"') == 1
