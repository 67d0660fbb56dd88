"""The control process as an operator sees it: a real process, real stores, real sockets."""

from __future__ import annotations

import signal
import socket
from pathlib import Path

import httpx
import pytest

from tests.support import Process, free_port, run_module, wait_until

_CONFIG = """
redis: {url: "${TALLYGATE_REDIS_URL}", timeout: 50ms}
postgres: {url: "${TALLYGATE_POSTGRES_URL}", timeout: 1s}
log: {format: json}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(_CONFIG)
    return path


def _start(config: Path, port: int, redis_url: str, postgres_url: str) -> Process:
    return run_module(
        "control",
        "--config",
        str(config),
        "--listen",
        f"127.0.0.1:{port}",
        env={
            "TALLYGATE_REDIS_URL": redis_url,
            "TALLYGATE_POSTGRES_URL": postgres_url,
            "TALLYGATE_METRICS_DIR": str(config.parent / "metrics"),
        },
    )


def test_endpoints_of_a_healthy_process_and_a_clean_stop(
    config: Path, valkey: str, postgres_url: str
) -> None:
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    with _start(config, port, valkey, postgres_url) as process:
        process.wait_for_http(f"{base}/readyz")

        ready = httpx.get(f"{base}/readyz").json()
        assert ready["status"] == "ok"
        assert {name: check["status"] for name, check in ready["checks"].items()} == {
            "redis": "ok",
            "postgres": "ok",
        }
        assert httpx.get(f"{base}/healthz").json() == {"status": "ok"}

        metrics = httpx.get(f"{base}/metrics")
        assert metrics.headers["content-type"].startswith("text/plain")
        assert 'tallygate_processes{process="control"} 1.0' in metrics.text
        assert 'tallygate_config_reloads_total{result="applied"} 1.0' in metrics.text
        assert 'tallygate_postgres_seconds_count{query="ping"}' in metrics.text

        missing = httpx.get(f"{base}/nothing/here")
        assert missing.status_code == 404
        assert missing.headers["content-type"] == "application/problem+json"
        problem = missing.json()
        assert problem["type"] == "urn:tallygate:problem:not-found"
        assert problem["status"] == 404
        assert problem["request_id"].startswith("req_")
        assert "/nothing/here" in problem["detail"]

        wrong = httpx.post(f"{base}/healthz")
        assert wrong.status_code == 405
        assert wrong.headers["allow"] == "GET, HEAD"
        assert wrong.json()["type"] == "urn:tallygate:problem:method-not-allowed"

        assert process.terminate(deadline_s=10) == 0
        assert '"event":"stopped"' in process.output
        assert "Traceback" not in process.output
        # The password of neither store is in the log.
        assert ":pw@" not in process.output


@pytest.mark.parametrize("down", ["redis", "postgres"])
def test_readyz_says_which_store_is_down_while_healthz_stays_up(
    config: Path, valkey: str, postgres_url: str, down: str
) -> None:
    dead = f"127.0.0.1:{free_port()}"
    urls = {"redis": valkey, "postgres": postgres_url}
    urls[down] = {
        "redis": f"redis://:hunter2@{dead}/0",
        "postgres": f"postgresql://u:hunter2@{dead}/d",
    }[down]
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    with _start(config, port, urls["redis"], urls["postgres"]) as process:
        process.wait_for_http(f"{base}/healthz")

        answer = httpx.get(f"{base}/readyz", timeout=10)

        assert answer.status_code == 503
        body = answer.json()
        assert body["status"] == "unavailable"
        checks = body["checks"]
        assert checks[down] == {
            "status": "down", "error": "does not answer", "seconds": checks[down]["seconds"],
        }  # fmt: skip
        assert checks[down]["seconds"] < 1  # refused at once, and not tried again
        assert [name for name, check in checks.items() if check["status"] == "ok"] == [
            name for name in ("redis", "postgres") if name != down
        ]
        assert dead.split(":")[1] not in answer.text
        assert "hunter2" not in answer.text + process.output
        assert httpx.get(f"{base}/healthz").status_code == 200
        assert process.terminate(deadline_s=10) == 0


def test_readyz_is_bounded_when_redis_accepts_and_never_answers(
    config: Path, postgres_url: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = free_port()
        base = f"http://127.0.0.1:{port}"
        redis_url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        with _start(config, port, redis_url, postgres_url) as process:
            process.wait_for_http(f"{base}/healthz")
            answer = httpx.get(f"{base}/readyz", timeout=5)
            assert answer.status_code == 503
            assert answer.json()["checks"]["redis"]["status"] == "down"
            assert answer.json()["checks"]["postgres"]["status"] == "ok"


def test_reload_by_signal_and_by_file_change(config: Path, valkey: str, postgres_url: str) -> None:
    port = free_port()
    base = f"http://127.0.0.1:{port}"

    def metric(line: str) -> bool:
        return line in httpx.get(f"{base}/metrics").text

    with _start(config, port, valkey, postgres_url) as process:
        process.wait_for_http(f"{base}/readyz")

        config.write_text(_CONFIG + "log: {level: nonsense}\n")
        process.signal(signal.SIGHUP)
        wait_until(lambda: metric('tallygate_config_reloads_total{result="refused"}'))
        assert metric("tallygate_config_stale 1.0")
        assert httpx.get(f"{base}/readyz").status_code == 200
        process.wait_for_output('"event":"config_refused"')

        config.write_text(_CONFIG + "# changed\n")
        wait_until(lambda: metric('tallygate_config_reloads_total{result="applied"} 2.0'))
        assert metric("tallygate_config_stale 0.0")
        assert process.terminate(deadline_s=10) == 0


def test_a_taken_port_ends_the_process_with_a_message(
    config: Path, valkey: str, postgres_url: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with _start(config, port, valkey, postgres_url) as process:
            assert process.wait(deadline_s=20) == 1
            assert '"event":"exited"' in process.output
            assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in process.output
            assert "Traceback" not in process.output


@pytest.mark.parametrize("missing", ["redis", "postgres"])
def test_a_missing_store_url_is_named(tmp_path: Path, missing: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("redis: {}\n")
    urls = {"redis": "redis://127.0.0.1:1/0", "postgres": "postgresql://127.0.0.1:1/d", missing: ""}
    with _start(config, free_port(), urls["redis"], urls["postgres"]) as process:
        assert process.wait(deadline_s=20) == 1
        assert f"{missing}.url: not set" in process.output


def test_a_bad_config_is_printed_with_every_problem(tmp_path: Path, valkey: str) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("log: {level: loud}\nredis: {timeout: never}\n")
    with _start(config, free_port(), valkey, "") as process:
        assert process.wait(deadline_s=20) == 1
        assert "log.level" in process.output
        assert "redis.timeout" in process.output
        assert "Traceback" not in process.output
