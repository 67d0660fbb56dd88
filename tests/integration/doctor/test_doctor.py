"""`tallygate doctor`: good servers, absent ones, what the configuration risks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from core.doctor import Crash, Severity
from tests.integration.doctor.ask import CONFIG, diagnosed, one, run
from tests.support import free_port

if TYPE_CHECKING:
    from cli.embedded import EmbeddedPostgres, EmbeddedValkey


def test_servers_as_they_should_be_lose_nothing(
    durable: EmbeddedValkey, ledger: EmbeddedPostgres, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    env = {"TALLYGATE_REDIS_URL": durable.url, "TALLYGATE_POSTGRES_URL": ledger.url}
    status, out, err = run("--config", str(path), **env)
    assert (status, err) == (0, "")
    assert "Nothing is lost when a process or a machine crashes" in out
    assert "appendfsync always" in out
    assert "Redis, disk loss: what was counted since the last flush" in out
    status, out, _ = run("--config", str(path), "--json", **env)
    report = json.loads(out)
    assert (status, report["safe"], report["severity"]) == (0, True, "note")
    assert {item["check"] for item in report["findings"] if item["severity"] != "ok"} == {
        "redis.maxmemory", "redis.replicas", "postgres.standbys",
    }  # fmt: skip
    for item in report["findings"]:
        assert not {"process crash", "machine crash or power loss"} & item["loses"].keys()


def test_stores_that_are_away_are_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    status, out, _ = run(
        "--config", str(path),
        TALLYGATE_REDIS_URL=f"redis://127.0.0.1:{free_port()}",
        TALLYGATE_POSTGRES_URL=f"postgresql://x@127.0.0.1:{free_port()}/x",
    )  # fmt: skip
    assert status == 1
    assert "Redis could not be reached" in out
    assert "Postgres could not be reached" in out


def test_wrong_usage_and_a_wrong_configuration_are_told_apart(tmp_path: Path) -> None:
    assert run("--nonsense")[0] == 2
    path = tmp_path / "config.yaml"
    path.write_text("plans: 1\n")
    status, _, err = run("--config", str(path))
    assert status == 2
    assert "plans" in err


@pytest.mark.parametrize("mode", ["open", "local"])
def test_a_spool_must_be_on_a_disk(
    durable: EmbeddedValkey, ledger: EmbeddedPostgres, tmp_path: Path, mode: str
) -> None:
    def config(spool: Path, more: str = "") -> str:
        return (
            CONFIG.replace("workers: 2", f"workers: 2, outage: {{spool_dir: '{spool}'{more}}}")
        ).replace("upstream: api", f"upstream: api, outage: {mode}")

    memory = Path("/dev/shm")
    if memory.is_dir():
        item = one(diagnosed(durable.url, ledger.url, config(memory / "spool")), "config.spool_dir")
        assert item.severity is Severity.CRITICAL
        assert "in memory (tmpfs)" in item.text
        assert Crash.POWER in item.loses
    found = diagnosed(durable.url, ledger.url, config(tmp_path / "spool"))
    assert "in memory" not in one(found, "config.spool_dir").text
    assert one(found, f"config.outage.{mode}").severity is Severity.NOTE
    file = tmp_path / "file"
    file.touch()
    item = one(diagnosed(durable.url, ledger.url, config(file / "spool")), "config.spool_dir")
    assert item.severity is Severity.WARNING
    found = diagnosed(durable.url, ledger.url, config(tmp_path, ", spool_max: 1000000GiB"))
    assert "make room" in one(found, "config.spool_max").fix
