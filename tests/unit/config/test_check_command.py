from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from cli.check import check, schema
from core.config import json_schema

ROOT = Path(__file__).parents[3]
CONFIG = str(ROOT / "config.yaml")
BROKEN = "gateway: {workers: 0}\nplans: {a: {}}\nsecrets: {key_pepper: 7}\n"


def test_a_valid_file_is_shown_in_human_units() -> None:
    result = CliRunner().invoke(check, [CONFIG])
    assert result.exit_code == 0, result.output
    for text in (
        "10/s, burst 20",
        "1_000 per 1d",
        "10_000 per billing period (events at 80 90 95 100 %)",
        "50 in flight, lease 30s",
        "overage",
        "requests 1, credits 5",
        "/weather/search",
        "anonymous",
    ):
        assert text in result.stdout


def test_json_is_the_compiled_form() -> None:
    result = CliRunner().invoke(check, [CONFIG, "--json"])
    assert result.exit_code == 0
    data = json.loads(result.stdout)
    assert data["valid"] is True
    assert data["plans"]["free"]["limits"][0] == {
        "algorithm": "gcra",
        "name": "per_second",
        "meter": "requests",
        "rate": 1,
        "period_us": 100_000,
        "burst": 20,
        "enforce": True,
    }
    assert data["plans"]["pro"]["price"]["base"] == "99.00"
    assert data["routes"][0]["costs"] == {"requests": 1, "credits": 5}


def test_every_problem_goes_to_stderr(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(BROKEN)
    result = CliRunner().invoke(check, [str(file)])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "3 problems" in result.stderr
    assert "gateway.workers: 0" in result.stderr
    assert "plans.a.limits: " in result.stderr
    assert "secrets.key_pepper: (hidden): " in result.stderr


def test_every_problem_as_json(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(BROKEN)
    result = CliRunner().invoke(check, [str(file), "--json"])
    assert result.exit_code == 1
    data = json.loads(result.stdout)
    assert data["valid"] is False
    assert len(data["problems"]) == 3


def test_a_missing_file_is_wrong_usage() -> None:
    assert CliRunner().invoke(check, ["/nonexistent.yaml"]).exit_code == 2
    assert CliRunner().invoke(check, []).exit_code == 2


def test_schema_prints_the_schema() -> None:
    result = CliRunner().invoke(schema, [])
    assert result.exit_code == 0
    assert json.loads(result.stdout) == json_schema()


def test_brackets_in_a_path_are_shown_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        "upstreams: {u: {urls: [http://127.0.0.1:9]}}\n"
        'routes: [{match: {path: "/items/[id][/x]", methods: [GET, POST]}, upstream: u}]\n'
        "plans: {p: {unlimited: true}}\n"
    )
    result = CliRunner().invoke(check, [str(file)])
    assert result.exit_code == 0, result.output
    assert "GET POST /items/[id][/x]" in result.stdout
