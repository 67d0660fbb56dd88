"""The `tallygate` command itself."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner

from cli import main as cli_main
from core.errors import TallygateError

ROOT = Path(__file__).resolve().parents[3]


def test_help_lists_every_command_and_imports_none() -> None:
    code = (
        "import sys; from cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted(n for n in sys.modules if n in ('asyncpg', 'redis', 'rich', 'granian')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1] == "[]"
    for name in ("up", "check", "schema", "creators", "keys", "usage", "migrate", "gateway"):
        assert f"\n  {name} " in done.stdout


def test_an_expected_failure_is_its_message_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("TALLYGATE_POSTGRES_URL", raising=False)
    monkeypatch.chdir(tmp_path)  # no configuration, no data directory
    result = CliRunner().invoke(cli_main.main, ["migrate"])
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("tallygate: no database: set TALLYGATE_POSTGRES_URL")
    assert len(result.stderr.splitlines()) == 1


def test_version() -> None:
    result = CliRunner().invoke(cli_main.main, ["--version"])
    assert result.exit_code == 0
    assert result.stdout.startswith("tallygate ")


def test_an_unknown_command_is_refused() -> None:
    result = CliRunner().invoke(cli_main.main, ["gatway"])
    assert result.exit_code == 2
    assert "gatway" in result.stderr


@pytest.mark.parametrize("name", ["gateway", "control", "reconciler"])
def test_a_process_gets_its_arguments_untouched(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr("core.leave.leave", sys.exit)  # it would end the tests, too
    module = types.ModuleType(f"{name}.__main__")
    module.main = lambda argv: seen.append(argv)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, f"{name}.__main__", module)
    result = CliRunner().invoke(cli_main.main, [name, "--config", "x.yaml", "--help"])
    assert result.exit_code == 0, result.output
    assert seen == [["--config", "x.yaml", "--help"]]


def test_a_process_that_refuses_its_config_exits_1(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_argv: list[str]) -> None:
        raise TallygateError("no such file")

    module = types.ModuleType("gateway.__main__")
    module.main = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gateway", types.ModuleType("gateway"))
    monkeypatch.setitem(sys.modules, "gateway.__main__", module)
    result = CliRunner().invoke(cli_main.main, ["gateway"])
    assert (result.exit_code, result.stderr) == (1, "tallygate: no such file\n")


def test_migrate_can_be_repeated(empty_database: str) -> None:
    env = {**os.environ, "TALLYGATE_POSTGRES_URL": empty_database}
    first = CliRunner(env=env).invoke(cli_main.main, ["migrate"])
    assert first.exit_code == 0, first.output
    assert "applied" in first.stdout
    assert CliRunner(env=env).invoke(cli_main.main, ["migrate"]).stdout == "nothing to apply\n"
