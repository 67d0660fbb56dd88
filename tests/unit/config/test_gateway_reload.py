"""A gateway takes a new configuration over whole, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from core.config import load
from core.telemetry import logs
from gateway import app
from gateway.app import Gateway
from gateway.runtime import Runtime

STORES = """
redis: {url: "redis://127.0.0.1:1"}
postgres: {url: "postgresql://127.0.0.1:1/x"}
secrets: {key_pepper: "a pepper for tests, longer than thirty-two characters"}
"""
FIRST = STORES + "plans: {free: {unlimited: true}, old: {unlimited: true}}\n"
SECOND = STORES + "plans: {free: {limits: {fast: {rate: 1/s}}}}\nlog: {level: debug}\n"


class Metrics:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.fail = False

    def config_applied(self, digest: str) -> None:
        if self.fail:
            raise OSError("no space left on device")
        self.calls.append("applied")

    def config_refused(self) -> None:
        self.calls.append("refused")


class Log:
    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, Any]]] = []

    def __getattr__(self, level: str) -> Any:
        return lambda event, **fields: self.lines.append((level, event, fields))


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    log = Log()
    monkeypatch.setattr(app, "_log", log)
    monkeypatch.setattr(logs, "configure", lambda *_: None)
    return log


@pytest.fixture
def gateway(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Gateway:
    """One that was never opened: a reload touches no store."""
    path = tmp_path / "config.yaml"
    path.write_text(FIRST)
    monkeypatch.setattr(app, "setup", lambda *_: Metrics())
    monkeypatch.setattr(app, "LocalMetrics", lambda _: None)
    monkeypatch.setattr(Gateway, "_responder", lambda _self, runtime: ("responder", runtime))
    # Pinning goes on in the background and needs Postgres.
    monkeypatch.setattr(Gateway, "_pin_meters", lambda _self: None, raising=False)
    gateway = Gateway(path, load(path))
    gateway._respond = gateway._responder(gateway.runtime)
    path.write_text(SECOND)
    return gateway


def refuse(*_: object) -> None:
    raise ValueError("cannot be built")


@pytest.mark.parametrize("broken", ["runtime", "responder", "metrics"])
def test_what_cannot_be_built_changes_nothing(
    gateway: Gateway, log: Log, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    before = (gateway.config.current, gateway.runtime, gateway._respond)
    with monkeypatch.context() as patch:
        metrics: Any = gateway.metrics
        if broken == "runtime":
            patch.setattr(app, "Runtime", refuse)
        elif broken == "responder":
            patch.setattr(Gateway, "_responder", refuse)
        else:
            patch.setattr(metrics, "fail", True)
        assert gateway.config.reload() is False
    assert (gateway.config.current, gateway.runtime, gateway._respond) == before
    assert metrics.calls == ["refused"]
    ((level, event, fields),) = log.lines
    assert (level, event) == ("error", "config_refused")
    assert "cannot be applied" in fields["problems"][0]


def test_what_can_be_is_in_force_everywhere_and_lost_plans_are_named(
    gateway: Gateway, log: Log
) -> None:
    assert gateway.config.reload() is True
    new = gateway.config.current
    assert isinstance(gateway.runtime, Runtime)
    assert gateway.runtime.snapshot is new
    assert gateway._respond == ("responder", gateway.runtime)  # type: ignore[comparison-overlap]
    level, event, fields = log.lines[-1]
    assert (level, event, fields["plans_removed"]) == ("warning", "config_applied", ["old"])
    gateway.config.reload()
    level, event, fields = log.lines[-1]
    assert (level, event, fields["plans_removed"]) == ("info", "config_applied", [])
