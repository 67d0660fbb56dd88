"""The gateway's supervisor: what it does when workers cannot come up, and to those that are."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.support import free_port, run_module, wait_until

CONFIG = """
upstreams: {stub: {urls: ["http://127.0.0.1:9"]}}
routes: [{match: {path: "/*"}, upstream: stub}]
plans: {basic: {unlimited: true}}
"""


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def environment(tmp_path: Path, redis_url: str, **more: str) -> dict[str, str]:
    return {
        "TALLYGATE_REDIS_URL": redis_url,
        "TALLYGATE_POSTGRES_URL": "postgresql://127.0.0.1:9/none",  # down: no reason not to start
        "TALLYGATE_KEY_PEPPER": "pepper" * 6,
        "TALLYGATE_METRICS_DIR": str(tmp_path / "metrics"),
    } | more


def arguments(config: Path, *more: str) -> list[str]:
    return ["--config", str(config), "--listen", f"127.0.0.1:{free_port()}", *more]


@pytest.mark.parametrize("missing", ["REDIS_URL", "POSTGRES_URL", "KEY_PEPPER"])
def test_a_missing_setting_ends_it_before_any_worker(
    config: Path, tmp_path: Path, missing: str
) -> None:
    env = environment(tmp_path, "redis://127.0.0.1:9", **{f"TALLYGATE_{missing}": ""})
    with run_module("gateway", *arguments(config), env=env) as gateway:
        assert gateway.wait() == 1
        assert f"set TALLYGATE_{missing}" in gateway.output
        assert "worker" not in gateway.output


def test_workers_that_can_never_come_up_end_it(config: Path, tmp_path: Path, valkey: str) -> None:
    # only the workers write metrics
    env = environment(tmp_path, valkey, TALLYGATE_METRICS_DIR="/dev/null/metrics")
    with run_module("gateway", *arguments(config, "--workers", "2"), env=env) as gateway:
        assert gateway.wait() == 1
        assert "/dev/null/metrics" in gateway.output
        assert "listening" not in gateway.output


def test_a_reload_while_workers_start_kills_none(config: Path, tmp_path: Path, valkey: str) -> None:
    port = free_port()
    with run_module(
        "gateway",
        *("--config", str(config), "--listen", f"127.0.0.1:{port}", "--workers", "2"),
        env=environment(tmp_path, valkey),
    ) as gateway:
        started = wait_until(lambda: children(gateway.pid, 2), what="two workers")

        def listening() -> bool:
            gateway.signal(signal.SIGHUP)
            return "listening" in gateway.output

        wait_until(listening, deadline_s=20, what="a worker that listens")
        gateway.wait_for_http(f"http://127.0.0.1:{port}/-/readyz")
        assert children(gateway.pid, 2) == started
        assert "worker_died" not in gateway.output


def children(pid: int, count: int) -> list[int] | None:
    """The process's children once there are `count` of them."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(word) for word in found] if len(found) == count else None


@pytest.mark.parametrize("count", ["0", "-1", "many"])
def test_a_number_of_workers_that_is_none_is_refused(config: Path, count: str) -> None:
    with run_module("gateway", *arguments(config, f"--workers={count}")) as gateway:
        assert gateway.wait() == 2
        assert "--workers" in gateway.output
