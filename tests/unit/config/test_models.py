"""What a valid file comes to: settings, compiled limits, routes, prices."""

from __future__ import annotations

import ipaddress
from decimal import Decimal
from pathlib import Path

import pytest

from core.config import Address, Config, Snapshot, load, loads
from core.errors import ConfigError
from core.policy import (
    Action,
    Concurrency,
    FixedWindow,
    Gcra,
    Limit,
    Meter,
    PeriodKind,
    Quota,
    SlidingWindow,
    Status,
)

ROOT = Path(__file__).parents[3]
UPSTREAM = "upstreams: {api: {urls: [http://127.0.0.1:9000/]}}\n"


def limit(text: str, meters: str = "{}") -> Limit:
    config = f"meters: {meters}\nplans: {{free: {{limits: {{it: {text}}}}}}}\n"
    return loads(config, env={}).plans["free"].limits[0]


def routes(text: str) -> Snapshot:
    return loads(UPSTREAM + "routes:\n" + text, env={})


def test_every_default_is_in_force_without_a_line() -> None:
    settings = loads("gateway:\n", env={}).settings
    assert settings == Config()
    gateway = settings.gateway
    assert gateway.listen == Address("127.0.0.1", 8080)
    assert str(gateway.listen) == "127.0.0.1:8080"
    assert gateway.workers is None
    assert gateway.key.headers == ("authorization", "x-api-key")
    assert gateway.key.query is None
    assert gateway.key_cache.size == 100_000
    assert gateway.key_cache.ttl_ms == 300_000
    assert gateway.key_cache.negative_ttl_ms == 30_000
    assert gateway.trusted_proxies == ()
    assert (gateway.headers.ratelimit, gateway.headers.legacy) == (True, True)
    admission = gateway.admission
    assert (admission.max_batch, admission.max_in_flight) == (128, 1)
    assert gateway.access_log is False
    assert gateway.drain_ms == 10_000
    assert settings.control.listen == Address("127.0.0.1", 8081)
    assert settings.reconciler.flush_interval_ms == 1_000
    assert settings.reconciler.batch == 1_000
    assert (settings.redis.url, settings.redis.timeout_ms) == (None, 50)
    assert settings.postgres.url is None
    assert (settings.postgres.pool, settings.postgres.timeout_ms) == (4, 5_000)
    assert (settings.log.level, settings.log.format) == ("info", "auto")
    assert settings.secrets.key_pepper is None
    assert settings.telemetry.metrics_dir is None


def test_settings_parse_their_human_forms() -> None:
    gateway = loads(
        'gateway: {listen: "[::1]:80", workers: "3", trusted_proxies: [10.0.0.0/8, "::1"],'
        ' key: {headers: [X-Token]}, access_log: "${LOG:-true}"}',
        env={},
    ).settings.gateway
    assert gateway.listen == ("::1", 80)
    assert str(gateway.listen) == "[::1]:80"
    assert gateway.workers == 3
    assert gateway.trusted_proxies == (
        ipaddress.ip_network("10.0.0.0/8"),
        ipaddress.ip_network("::1/128"),
    )
    assert gateway.key.headers == ("x-token",)
    assert gateway.access_log is True


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{rate: 10/s, burst: 20}", Gcra("it", "requests", 1, 100_000, 20)),
        ("{rate: 600/m}", Gcra("it", "requests", 1, 100_000, 600)),
        ("{rate: 3/7s, enforce: false}", Gcra("it", "requests", 3, 7_000_000, 3, enforce=False)),
        ("{window: 1d, limit: 1_000}", FixedWindow("it", "requests", 1_000, 86_400_000)),
        ('{window: 1h, limit: "5"}', FixedWindow("it", "requests", 5, 3_600_000)),
        (
            "{window: 1h, limit: 5, sliding: true}",
            SlidingWindow("it", "requests", 5, 3_600_000),
        ),
        ("{period: billing, limit: 9}", Quota("it", "requests", 9, PeriodKind.BILLING)),
        (
            '{period: week, limit: 9, action: overage, thresholds: [0.5, "80%", 1.0]}',
            Quota("it", "requests", 9, PeriodKind.WEEK, Action.OVERAGE, (50, 80, 100)),
        ),
        (
            "{period: day, limit: 0, action: warn, thresholds: []}",
            Quota("it", "requests", 0, PeriodKind.DAY, Action.WARN, ()),
        ),
        ("{concurrency: 50}", Concurrency("it", 50, 30_000)),
        ("{concurrency: 5, lease: 1m, enforce: false}", Concurrency("it", 5, 60_000, False)),
    ],
)
def test_each_form_of_limit_compiles(text: str, expected: Limit) -> None:
    assert limit(text) == expected


def test_limits_on_a_meter_with_decimals_count_its_smallest_units() -> None:
    meters = "{credits: {unit: credit, decimals: 2}}"
    assert limit("{rate: 10/s, burst: 0.5, meter: credits}", meters) == Gcra(
        "it", "credits", 1, 1_000, 50
    )
    quota = limit('{period: month, limit: "1.25", meter: credits}', meters)
    assert quota == Quota("it", "credits", 125, PeriodKind.MONTH)


def test_requests_exists_and_may_be_redeclared() -> None:
    assert loads("log: {}", env={}).meters == {"requests": Meter("requests")}
    declared = loads("meters: {requests: {unit: call}}", env={})
    assert declared.meters == {"requests": Meter("requests", unit="call")}


def test_money_is_exactly_its_text() -> None:
    plan = loads(
        """
plans:
  pro:
    unlimited: true
    price:
      base: 99.10
      currency: USD
      interval: quarter
      meters: {requests: {included: 10_000, overage: 0.000000000000000000001}}
""",
        env={},
    ).plans["pro"]
    assert plan.price is not None
    assert str(plan.price.base) == "99.10"
    assert plan.price.currency == "usd"
    assert plan.price.meters["requests"].overage == Decimal("1e-21")
    assert plan.interval_months == 3


def test_status_rules_fall_back_to_the_default() -> None:
    text = "plans: {a: {unlimited: true, on_status: {past_due: admit, trialing: refuse}}}"
    rule = loads(text, env={}).plans["a"].status_rule
    assert rule[Status.PAST_DUE] is None
    assert rule[Status.TRIALING] == 403
    assert rule[Status.ACTIVE] is None
    assert rule[Status.PAUSED] == 403


def test_routes_keep_their_order_and_get_unique_names() -> None:
    snapshot = routes(
        """
  - {match: {path: /a/*, methods: [get], host: API.example.com}, upstream: api, strip_prefix: /a}
  - {match: {path: /a/*, methods: [POST]}, upstream: api, meters: {}}
  - {match: {path: /a/*, methods: [PUT]}, upstream: api, name: a_post}
  - {match: {path: /1}, upstream: api}
  - {match: {path: /*}, upstream: api}
"""
    )
    assert [route.name for route in snapshot.routes] == ["a", "a_post_2", "a_post", "r_1", "root"]
    first, second = snapshot.routes[:2]
    assert first.methods == {"GET"}
    assert first.host == "api.example.com"
    assert first.strip_prefix == "/a"
    assert first.costs == {"requests": 1}
    assert second.costs == {}
    assert snapshot.upstreams["api"].urls == ("http://127.0.0.1:9000",)


def test_a_narrower_route_before_a_wider_one_is_fine() -> None:
    snapshot = routes(
        """
  - {match: {path: /a/b}, upstream: api}
  - {match: {path: /a/*, methods: [GET]}, upstream: api}
  - {match: {path: /a/*}, upstream: api}
  - {match: {path: /ab/*}, upstream: api}
  - {match: {path: /c, host: one.example.com}, upstream: api}
  - {match: {path: /c, host: two.example.com}, upstream: api}
  - {match: {path: /c}, upstream: api}
"""
    )
    assert len(snapshot.routes) == 7


def test_variables_are_filled_in() -> None:
    text = """
log: {level: "${LEVEL}"}
redis: {url: "${EMPTY:-}"}
postgres: {url: "postgresql://u:${PASSWORD}@h/${DB:-tally}"}
gateway: {key: {query: "$${not}"}}
"""
    settings = loads(text, env={"LEVEL": "debug", "PASSWORD": "p", "DB": ""}).settings
    assert settings.log.level == "debug"
    assert settings.redis.url is None
    assert settings.postgres.url == "postgresql://u:p@h/tally"
    assert settings.gateway.key.query == "${not}"


def test_anchors_and_merges_work_and_own_keys_win() -> None:
    text = """
plans:
  a: &a {unlimited: true, description: first}
  b: {<<: *a, description: second}
"""
    plans = loads(text, env={}).plans
    assert (plans["a"].description, plans["b"].description) == ("first", "second")
    assert plans["b"].limits == ()


def test_yaml_surprises_stay_text() -> None:
    snapshot = loads("meters: {null: {unit: no}, on: {unit: 2026-01-01}}", env={})
    assert snapshot.meters["null"].unit == "no"
    assert snapshot.meters["on"].unit == "2026-01-01"


def test_a_snapshot_names_its_text_and_cannot_be_changed() -> None:
    snapshot = loads("log: {}", "x.yaml", env={})
    assert snapshot.source == "x.yaml"
    assert len(snapshot.digest) == 64
    assert snapshot.digest != loads("log: { }", env={}).digest
    with pytest.raises(TypeError):
        snapshot.plans["x"] = None  # type: ignore[index]
    with pytest.raises(ValueError, match="frozen"):
        snapshot.settings.log.level = "debug"


def test_secrets_are_never_printed() -> None:
    text = """
redis: {url: "redis://:${S}@h"}
postgres: {url: "postgresql://u:${S}@h/d"}
secrets: {key_pepper: "${S}"}
"""
    snapshot = loads(text, env={"S": "hunter2"})
    assert snapshot.settings.secrets.key_pepper is not None
    assert snapshot.settings.secrets.key_pepper.get_secret_value() == "hunter2"
    assert "hunter2" not in repr(snapshot)
    assert "hunter2" not in str(snapshot.settings)


@pytest.mark.parametrize(
    "text",
    [
        "redis: redis://:hunter2@h",
        "redis: {url: [hunter2]}",
        "redis: {url: 'hunter2'}",
        "secrets: hunter2",
        "secrets: {key_pepper: {a: hunter2}}",
        "secrets: {pepper: hunter2}",
        "key_pepper: hunter2",
        "gateway: {listen: 'redis://:hunter2@h'}",
        "secrets: {key_pepper: 'hunter2\n",
        "secrets: {key_pepper: !x hunter2}",
    ],
)
def test_a_misplaced_secret_is_not_printed_either(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        loads(text, env={})
    assert "hunter2" not in str(caught.value)


def test_the_shipped_config_is_valid_and_is_the_demo() -> None:
    snapshot = load(ROOT / "config.yaml", env={})
    assert set(snapshot.plans) == {"anonymous", "free", "pro"}
    assert snapshot.upstreams["weather"].urls == ("http://127.0.0.1:9000",)
    assert [route.path for route in snapshot.routes] == [
        "/weather/search",
        "/weather/*",
        "/public/*",
    ]
    assert snapshot.routes[0].costs["credits"] == 5
    assert snapshot.routes[2].plan == "anonymous"
    moved = load(ROOT / "config.yaml", env={"TALLYGATE_DEMO_UPSTREAM": "http://10.0.0.1:1"})
    assert moved.upstreams["weather"].urls == ("http://10.0.0.1:1",)


@pytest.mark.parametrize(
    ("given", "url"),
    [
        ("redis://:pw@h:1/2", "redis://:pw@h:1/2"),
        ("rediss://h", "rediss://h"),
        ("unix:///run/redis.sock?db=1", "unix:///run/redis.sock?db=1"),
        ("valkey://:pw@h:1/2", "redis://:pw@h:1/2"),
        (" valkeys://h ", "rediss://h"),
    ],
)
def test_every_scheme_of_redis_becomes_one_that_every_driver_knows(given: str, url: str) -> None:
    assert loads(f'redis: {{url: "{given}"}}', env={}).settings.redis.url == url


def test_the_time_out_of_a_check_is_said_in_one_place() -> None:
    with pytest.raises(ConfigError, match=r"gateway\.admission\.timeout: unknown key"):
        loads("gateway: {admission: {timeout: 1s}}", env={})


def test_a_keyless_plan_may_have_limits_up_to_a_week() -> None:
    found = loads(
        UPSTREAM
        + "routes: [{match: {path: /a}, upstream: api, keyless: true, plan: free}]\n"
        + "plans:\n  free:\n    limits:\n      a: {period: week, limit: 5, action: warn}\n"
        + "      b: {window: 1w, limit: 5, sliding: true}\n      c: {concurrency: 5}\n"
        + "  paid: {limits: {a: {period: year, limit: 5, action: overage}}}\n",
        env={},
    )
    assert len(found.plans["free"].limits) == 3
