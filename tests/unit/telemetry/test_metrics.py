"""Metrics over several real processes: sums, a killed worker, forks, a cold start."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from core.telemetry import directory, exposition
from core.telemetry.local import LocalHistogram, LocalMetrics
from core.telemetry.metrics import Metrics, setup
from tests.support import wait_until, wait_until_async

ROOT = Path(__file__).parents[3]

_WORKER = """
import sys
from core.telemetry.local import LocalMetrics
from core.telemetry.metrics import setup
metrics = setup(sys.argv[1], "gateway")
local = LocalMetrics(metrics)
local.in_flight = 3
for _ in range(int(sys.argv[2])):
    local.record("weather", "free", "admitted")
    local.admission.observe(0.0001)
    local.admission.observe(0.3)
local.upstream("weather").observe(0.02)
local.flush()
print("ready", flush=True)
sys.stdin.read()
local.in_flight = 0
local.record("weather", "free", "admitted")  # written by the handler at exit
"""


def worker(path: Path, count: int) -> subprocess.Popen[str]:
    child = subprocess.Popen(
        [sys.executable, "-c", _WORKER, str(path), str(count)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


def value(path: Path, series: str) -> float | None:
    """One sample of the rendered page, None when it is not there."""
    page = exposition.render(path).decode()
    match = re.search(rf"^{re.escape(series)} (\S+)$", page, re.MULTILINE)
    return float(match[1]) if match else None


REQUESTS = 'tallygate_requests_total{outcome="admitted",plan="free",route="weather"}'


def test_processes_add_up_and_a_killed_one_leaves_its_totals_only(tmp_path: Path) -> None:
    # given three gateway workers
    workers = [worker(tmp_path, count) for count in (10, 20, 30)]
    assert value(tmp_path, REQUESTS) == 60
    assert value(tmp_path, "tallygate_requests_in_flight") == 9
    assert value(tmp_path, 'tallygate_processes{process="gateway"}') == 3
    assert value(tmp_path, "tallygate_admission_seconds_count") == 120
    assert value(tmp_path, 'tallygate_admission_seconds_bucket{le="0.0001"}') == 60
    assert value(tmp_path, 'tallygate_admission_seconds_bucket{le="1.0"}') == 120
    assert value(tmp_path, "tallygate_admission_seconds_sum") == pytest.approx(60 * 0.3001)
    assert value(tmp_path, 'tallygate_upstream_seconds_count{upstream="weather"}') == 3

    # when one is killed, its gauges go and its counts stay
    workers[0].send_signal(signal.SIGKILL)
    workers[0].wait(10)
    assert value(tmp_path, "tallygate_requests_in_flight") == 6
    assert value(tmp_path, 'tallygate_processes{process="gateway"}') == 2
    assert value(tmp_path, REQUESTS) == 60

    # and one that ends by itself writes its last counts first
    workers[1].communicate("", timeout=10)
    assert value(tmp_path, REQUESTS) == 61
    assert value(tmp_path, "tallygate_requests_in_flight") == 3
    workers[2].communicate("", timeout=10)
    assert value(tmp_path, REQUESTS) == 62

    # and the first process of the next start begins from nothing
    fresh = worker(tmp_path, 5)
    assert value(tmp_path, REQUESTS) == 5
    assert len(list(tmp_path.glob("counter_*.db"))) == 1
    fresh.communicate("", timeout=10)


def test_many_that_died_leave_one_file_and_all_of_their_totals(tmp_path: Path) -> None:
    alive = worker(tmp_path, 7)
    template = {path: path.name for path in tmp_path.glob("*_gateway-*.db")}
    for number in range(40):  # as so many workers before it would have left theirs
        for path, name in template.items():
            kind = name.partition("_")[0]
            if kind != "gauge":
                (tmp_path / f"{kind}_gateway-1-{number:08x}.db").write_bytes(path.read_bytes())
    for _ in range(2):
        assert value(tmp_path, REQUESTS) == 41 * 7
        assert value(tmp_path, "tallygate_admission_seconds_count") == 41 * 14
        assert value(tmp_path, 'tallygate_admission_seconds_bucket{le="0.0001"}') == 41 * 7
        assert len(list(tmp_path.glob("counter_*.db"))) == 2
        assert len(list(tmp_path.glob("histogram_*.db"))) == 2
    alive.communicate("", timeout=10)
    assert value(tmp_path, REQUESTS) == 41 * 7 + 1


@pytest.fixture
def metrics(tmp_path: Path) -> Metrics:
    return setup(tmp_path, "gateway")


def test_local_counts_move_once(metrics: Metrics, tmp_path: Path) -> None:
    local = LocalMetrics(metrics)
    for _ in range(3):
        local.record("weather", "free", "admitted")
    local.upstream_errors.inc("weather", "timeout")
    local.key_cache_hits.inc("valid")
    local.flush()
    local.flush()
    assert value(tmp_path, REQUESTS) == 3
    assert (
        value(tmp_path, 'tallygate_upstream_errors_total{kind="timeout",upstream="weather"}') == 1
    )
    assert value(tmp_path, 'tallygate_key_cache_hits_total{kind="valid"}') == 1
    local.record("weather", "free", "admitted")
    local.flush()
    assert value(tmp_path, REQUESTS) == 4


@pytest.mark.parametrize("seconds", [0.0, 0.0001, 0.00011, 0.25, 0.9999, 1.0, 1.01, 77.0])
def test_a_local_observation_lands_where_prometheus_puts_it(
    metrics: Metrics, tmp_path: Path, seconds: float
) -> None:
    local = LocalHistogram(metrics.admission_seconds)
    local.observe(seconds)
    local.flush()
    ours = exposition.render(tmp_path)
    metrics.admission_seconds.observe(seconds)
    theirs = exposition.render(tmp_path)
    prefix = b"tallygate_admission_seconds"

    def samples(page: bytes) -> list[float]:
        return [float(line.split()[-1]) for line in page.splitlines() if line.startswith(prefix)]

    assert samples(theirs) == [2 * sample for sample in samples(ours)]


async def _two_ticks(local: LocalMetrics, path: Path) -> None:
    local.start(asyncio.get_running_loop())
    for expected in (1, 2):
        local.record("weather", "free", "admitted")
        await wait_until_async(lambda n=expected: value(path, REQUESTS) == n)
    local.record("weather", "free", "admitted")
    local.stop()
    assert value(path, REQUESTS) == 3


def test_a_timer_flushes_and_stop_flushes_the_rest(metrics: Metrics, tmp_path: Path) -> None:
    asyncio.run(_two_ticks(LocalMetrics(metrics), tmp_path))


def test_a_forked_child_counts_for_itself_and_is_seen_dead(
    metrics: Metrics, tmp_path: Path
) -> None:
    local = LocalMetrics(metrics)
    local.record("weather", "free", "admitted")  # not flushed before the fork
    local.in_flight = 2
    read_fd, write_fd = os.pipe()
    pid = os.fork()
    if pid == 0:
        local.record("weather", "free", "admitted")
        local.in_flight = 5
        local.flush()
        os.write(write_fd, b"x")
        signal.pause()
        os._exit(0)
    try:
        os.read(read_fd, 1)
        local.flush()
        assert value(tmp_path, REQUESTS) == 2
        assert value(tmp_path, "tallygate_requests_in_flight") == 7
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert value(tmp_path, REQUESTS) == 2
    assert value(tmp_path, "tallygate_requests_in_flight") == 2


def test_a_parent_dies_while_its_forked_child_lives(tmp_path: Path) -> None:
    # The child shares the parent's open lock file; it must not keep the parent alive by that.
    code = (
        "import os, sys, time\nfrom core.telemetry.metrics import setup\n"
        "m = setup(sys.argv[1], 'gateway')\nm.requests_in_flight.set(4)\n"
        "if os.fork() == 0:\n    m.requests_in_flight.set(1)\n"
        "    print('ready', os.getpid(), flush=True)\n    sys.stdin.read()\n    os._exit(0)\n"
        "sys.stdin.read()\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert parent.stdout is not None
    assert parent.stdout.readline().startswith("ready")
    assert value(tmp_path, "tallygate_requests_in_flight") == 5
    parent.kill()
    parent.wait(10)
    wait_until(lambda: value(tmp_path, "tallygate_requests_in_flight") == 1)
    assert parent.stdin is not None
    parent.stdin.close()


def test_configurations_in_force_and_refused(metrics: Metrics, tmp_path: Path) -> None:
    metrics.config_applied("aaa")
    metrics.config_refused()
    assert value(tmp_path, "tallygate_config_stale") == 1
    metrics.config_applied("bbb")
    assert value(tmp_path, "tallygate_config_stale") == 0
    assert value(tmp_path, 'tallygate_config_info{digest="aaa"}') == 0
    assert value(tmp_path, 'tallygate_config_info{digest="bbb"}') == 1
    assert value(tmp_path, 'tallygate_config_reloads_total{result="applied"}') == 2


def test_names_follow_the_conventions_and_every_metric_has_a_help_text(metrics: Metrics) -> None:
    from prometheus_client.metrics import MetricWrapperBase

    families = [f for f in vars(metrics).values() if isinstance(f, MetricWrapperBase)]
    assert len(families) >= 21
    for family in families:
        described = family.describe()[0]
        assert re.fullmatch(r"tallygate_[a-z_]+", described.name)
        assert described.documentation.endswith(".")
        if described.type == "histogram":
            assert described.name.endswith(("_seconds", "_size"))


def test_the_directory_comes_from_the_setting_then_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TALLYGATE_METRICS_DIR", str(tmp_path / "env"))
    assert directory.resolve("/set") == Path("/set")
    assert directory.resolve(None) == tmp_path / "env"
    monkeypatch.delenv("TALLYGATE_METRICS_DIR")
    private = directory.resolve(None)
    assert private.is_dir()
    private.rmdir()
