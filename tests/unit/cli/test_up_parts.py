"""What `tallygate up` decides and prints, without starting it."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli.up_report import http, say
from cli.up_settings import default_config, read_settings
from core.errors import ConfigError, TallygateError

CONFIG = """
upstreams: {demo: {urls: ["${TALLYGATE_DEMO_UPSTREAM:-http://127.0.0.1:9000}"]}}
routes: [{match: {path: /*}, upstream: demo}]
redis: {url: "${TALLYGATE_REDIS_URL:-}"}
plans: {free: {limits: {per_second: {rate: 10/s, burst: 20}}}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def test_with_nothing_set_everything_is_embedded(config: Path) -> None:
    settings = read_settings(config, {}, 9999)
    assert (settings.redis_url, settings.postgres_url) == (None, None)
    assert settings.upstream_port == 9999
    assert settings.gateway == ("127.0.0.1", 8080)


def test_stores_of_the_environment_or_the_config_are_used(config: Path) -> None:
    config.write_text(CONFIG + "postgres: {url: 'postgresql://db/x'}\n")
    settings = read_settings(config, {"TALLYGATE_REDIS_URL": "redis://r:1/0"}, 9999)
    assert settings.redis_url == "redis://r:1/0"
    assert settings.postgres_url == "postgresql://db/x"


def test_an_upstream_of_your_own_replaces_the_demo(config: Path) -> None:
    environ = {"TALLYGATE_DEMO_UPSTREAM": "http://10.0.0.1:80"}
    assert read_settings(config, environ, 9999).upstream_port is None


def test_one_port_for_both_is_refused(config: Path) -> None:
    with pytest.raises(TallygateError, match=r"both want port 8081.*--gateway-port"):
        read_settings(config, {}, 1).with_ports(8081, None)


def test_a_bad_config_is_refused_whole(config: Path) -> None:
    config.write_text(CONFIG.replace("10/s", "fast").replace("burst: 20", "burst: none"))
    with pytest.raises(ConfigError, match="2 problems"):
        read_settings(config, {}, 1)


def test_the_config_of_the_working_directory_comes_first(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert default_config() == config
    config.unlink()
    assert default_config().name == "config.yaml"


@pytest.mark.parametrize(
    ("address", "url"),
    [
        (("127.0.0.1", 80), "http://127.0.0.1:80"),
        (("0.0.0.0", 80), "http://127.0.0.1:80"),
        (("::", 80), "http://[::1]:80"),
        (("::1", 80), "http://[::1]:80"),
    ],
)
def test_urls_are_ones_a_client_can_use(address: tuple[str, int], url: str) -> None:
    assert http(address) == url


def test_json_lines_are_made_readable(capsys: pytest.CaptureFixture[str]) -> None:
    say("gateway", '{"timestamp":"2026-01-02T03:04:05.678Z","level":"info","event":"up","port":1}')
    say("gateway", "{not json")
    assert capsys.readouterr().err.splitlines() == [
        "gateway    | 03:04:05.678 info up port=1",
        "gateway    | {not json",
    ]


def test_what_a_config_leaves_out_comes_from_the_environment(config: Path) -> None:
    config.write_text(CONFIG.replace('redis: {url: "${TALLYGATE_REDIS_URL:-}"}', "redis:"))
    environ = {
        "TALLYGATE_REDIS_URL": "redis://r:1/0",
        "TALLYGATE_POSTGRES_URL": "postgresql://db/x",
        "TALLYGATE_KEY_PEPPER": "p" * 64,
    }
    settings = read_settings(config, environ, 1)
    assert settings.redis_url == "redis://r:1/0"
    assert settings.postgres_url == "postgresql://db/x"
    assert settings.key_pepper == "p" * 64
    assert "p" * 64 not in repr(settings)


def test_what_a_config_says_itself_goes_first(config: Path) -> None:
    config.write_text(CONFIG.replace("${TALLYGATE_REDIS_URL:-}", "redis://mine:1/0"))
    environ = {"TALLYGATE_REDIS_URL": "redis://r:1/0"}
    assert read_settings(config, environ, 1).redis_url == "redis://mine:1/0"


@pytest.mark.parametrize(
    ("routes", "path"),
    [
        ("{match: {path: /*}, upstream: demo}", "/current"),
        ("{match: {path: /a/*, methods: [POST]}, upstream: demo}", None),
        ("{match: {path: /a, host: a.example}, upstream: demo}", None),
        ("{match: {path: /a}, upstream: demo, keyless: true, plan: free}", None),
    ],
)
def test_only_what_a_demo_key_can_get_is_shown(config: Path, routes: str, path: str | None) -> None:
    config.write_text(CONFIG.replace("{match: {path: /*}, upstream: demo}", routes))
    settings = read_settings(config, {}, 1)
    assert (settings.try_path, settings.demo_plans) == (path, ("free",))


@pytest.mark.parametrize(
    ("headers", "shown"),
    [
        ("[authorization, x-api-key]", "X-API-Key: "),
        ("[authorization]", "Authorization: Bearer "),
        ("[x-token]", "x-token: "),
    ],
)
def test_the_key_is_shown_where_the_config_wants_it(config: Path, headers: str, shown: str) -> None:
    config.write_text(f"{CONFIG}gateway: {{key: {{headers: {headers}}}}}\n")
    assert read_settings(config, {}, 1).key_header == shown
