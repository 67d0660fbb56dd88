"""`tallygate audit`: exit codes, what people and machines read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.integration.audit.scene import CONFIG, Scene, play
from tests.support import free_port


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return path


def run(config: Path, redis_url: str, postgres_url: str, *words: str) -> tuple[int, str, str]:
    from cli.main import main

    env = {"TALLYGATE_REDIS_URL": redis_url, "TALLYGATE_POSTGRES_URL": postgres_url}
    done = CliRunner().invoke(main, ["audit", "--config", str(config), *words], env=env)
    return done.exit_code, done.stdout, done.stderr


def test_exit_codes_and_words(config: Path, valkey: str, database: str) -> None:
    async def act(s: Scene) -> None:
        await s.used("a", 3)
        await s.used("b", 2)

    async def spoil(s: Scene) -> None:
        await s.hit("a", 1)
        s.redis.zrem(s.dirty, s.key("a"))
        await s.sql.execute("UPDATE ledger_hours SET total = 9 WHERE subject = 'b'")

    play(valkey, database, act)
    status, out, err = run(config, valkey, database)
    assert (status, err) == (0, "")
    assert out.splitlines() == [
        "Ledger: 2 subjects. Redis: 2 states, 0 of them with changes that the next flush stores.",
        "No drift.",
    ]
    play(valkey, database, spoil)
    status, out, _ = run(config, valkey, database)
    assert status == 1
    assert "drift period_sum  b: requests of the period from" in out
    assert "says 2 and its hours add up to 9 (7 less)" in out
    assert "Drift: 3 left." in out  # b's hour differs from Redis, too
    status, out, _ = run(config, valkey, database, "--show", "0")
    assert "… and 3 more; see them with --show 3" in out
    assert run(config, valkey, database, "--subscription", "a")[0] == 1
    status, out, _ = run(config, valkey, database, "--subscription", "a", "--repair")
    assert status == 0
    assert "repaired redis_ahead_not_dirty" in out
    status, out, _ = run(config, valkey, database, "--repair", "--json", "--since", "7d")
    report = json.loads(out)
    assert (status, report["clean"], report["pending"]) == (1, False, 1)
    assert report["left"]["period_sum"] == 1
    drift = next(item for item in report["differences"] if item["cause"] == "period_sum")
    assert (drift["expected"], drift["found"], drift["repaired"]) == ("9", "2", "")


def test_wrong_usage(config: Path, valkey: str, database: str, empty_database: str) -> None:
    assert run(config, valkey, database, "--nonsense")[0] == 2
    status, _, err = run(config, valkey, database, "--since", "yesterday")
    assert (status, "--since" in err) == (2, True)
    status, _, err = run(config, valkey, database, "--subscription", "sub_nobody")
    assert (status, "'sub_nobody'" in err) == (2, True)
    status, _, err = run(config, valkey, empty_database)
    assert (status, "tallygate migrate" in err) == (2, True)
    config.write_text("plans: 1")
    assert run(config, valkey, database)[0] == 2


def test_stores_that_are_away(config: Path, valkey: str, database: str) -> None:
    status, _, err = run(config, f"redis://127.0.0.1:{free_port()}", database)
    assert (status, "Redis" in err) == (3, True)
    away = f"postgresql://x@127.0.0.1:{free_port()}/x"
    status, _, err = run(config, valkey, away)
    assert (status, "Postgres did not answer" in err) == (3, True)
