"""Every key of an upstream, and what it compiles to; the schema takes what the loader takes."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from click.testing import CliRunner
from jsonschema import Draft202012Validator

from cli.main import main
from core.config import json_schema, loads
from core.upstream import (
    Balance,
    Breaker,
    Ejection,
    HealthCheck,
    Retries,
    Upstream,
    UpstreamTls,
)

FULL = """
upstreams:
  api:
    urls:
      - https://one.internal:8443/
      - {url: https://two.internal, weight: 3}
      - unix:///run/a.sock
    balance: {hash: X-Session}
    tls: {verify: false, server_name: API.internal}
    health:
      {path: /healthz, interval: 2s, timeout: 500ms, healthy_after: 1, unhealthy_after: 4,
       status: [2xx, 404]}
    eject: {failures: 4, for: 5s, max: 1m}
    dns: {refresh: 10s}
    pool: {max_connections: 64, keepalive: 30s, lifetime: 10m, max_waiting: 0}
    timeout: {connect: 2s, response: 20s, idle: 5s, total: 1m}
    retries:
      {attempts: 3, per_try: 2s, backoff: 10ms, "on": [connect, 503],
       budget: {percent: 10%, floor: 0}}
    breaker: {errors: 0.4, window: 20s, minimum: 10, open: 3s, probes: 1}
"""
SWITCHED_ON = """
upstreams:
  api:
    urls: [http://127.0.0.1:9000]
    balance: least_connections
    health: {path: /}
    eject: {}
    dns: {}
    retries: {}
    breaker: {}
"""


def api(text: str) -> Upstream:
    return loads(text, env={}).upstreams["api"]


def test_every_key_has_its_place() -> None:
    assert api(FULL) == Upstream(
        name="api",
        urls=("https://one.internal:8443", "https://two.internal", "unix:///run/a.sock"),
        weights=(1, 3, 1),
        balance=Balance.HASH,
        hash_by="x-session",
        tls=UpstreamTls(verify=False, server_name="api.internal"),
        health=HealthCheck(
            path="/healthz",
            statuses=frozenset(range(200, 300)) | {404},
            interval_ms=2_000,
            timeout_ms=500,
            healthy_after=1,
            unhealthy_after=4,
        ),
        eject=Ejection(failures=4, for_ms=5_000, max_ms=60_000),
        dns_refresh_ms=10_000,
        max_connections=64,
        keepalive_ms=30_000,
        lifetime_ms=600_000,
        max_waiting=0,
        connect_timeout_ms=2_000,
        response_timeout_ms=20_000,
        idle_timeout_ms=5_000,
        total_timeout_ms=60_000,
        retries=Retries(
            attempts=3,
            percent=10,
            floor=0,
            per_try_ms=2_000,
            backoff_ms=10,
            causes=frozenset({"connect"}),
            statuses=frozenset({503}),
        ),
        breaker=Breaker(errors=40, window_ms=20_000, minimum=10, open_ms=3_000, probes=1),
    )


def test_what_may_surprise_is_off_until_its_section_is_there() -> None:
    plain = api("upstreams: {api: {urls: [http://127.0.0.1:9000]}}")
    assert plain == Upstream("api", ("http://127.0.0.1:9000",), weights=(1,))
    assert (plain.health, plain.eject, plain.retries, plain.breaker) == (None,) * 4
    on = api(SWITCHED_ON)
    assert on.health == HealthCheck("/", frozenset(range(200, 300)))
    assert (on.eject, on.retries, on.breaker) == (Ejection(), Retries(), Breaker())
    assert (on.dns_refresh_ms, on.balance) == (30_000, Balance.LEAST_CONNECTIONS)
    assert hash(on) == hash(api(SWITCHED_ON))


def test_the_schema_takes_it_too() -> None:
    validator = Draft202012Validator(json_schema())
    for text in (FULL, SWITCHED_ON):
        assert [error.message for error in validator.iter_errors(yaml.safe_load(text))] == []
    for wrong in (
        "{urls: [ftp://h]}",
        "{urls: [{weight: 2}]}",
        "{urls: [http://h], balance: random}",
        "{urls: [http://h], health: {}}",
        "{urls: [http://h], retries: {'on': [404]}}",
    ):
        data = yaml.safe_load(f"upstreams: {{api: {wrong}}}")
        assert list(validator.iter_errors(data)), wrong


def test_check_shows_it_as_json(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(FULL)
    result = CliRunner().invoke(main, ["check", "--json", str(path)])
    assert result.exit_code == 0, result.output
    shown = json.loads(result.output)["upstreams"]["api"]
    assert shown["retries"]["causes"] == ["connect"]
    assert shown["health"]["statuses"][-1] == 404
