"""What of a meter must not change."""

from __future__ import annotations

import pytest

from core.errors import ConfigError
from core.meters import MeterRegistry
from core.policy import Aggregation, Meter, changed_meters

OLD = {"requests": Meter("requests"), "tokens": Meter("tokens", "token", decimals=2)}


def test_only_decimals_and_aggregation_are_fixed() -> None:
    assert changed_meters(OLD, OLD) == []
    assert changed_meters(OLD, {}) == []
    assert changed_meters(OLD, {"tokens": Meter("tokens", "word", decimals=2)}) == []
    assert changed_meters(OLD, OLD | {"new": Meter("new", decimals=6)}) == []
    problems = changed_meters(OLD, {"tokens": Meter("tokens", "token", Aggregation.MAX, 3)})
    assert [problem.split(" since")[0] for problem in problems] == [
        "meters.tokens.decimals: 3: pinned as 2",
        "meters.tokens.aggregation: max: pinned as sum",
    ]
    assert all(problem.endswith("or declare a new meter") for problem in problems)


def test_a_registry_keeps_what_a_reload_took_out() -> None:
    registry = MeterRegistry(OLD)
    registry.declare({"requests": Meter("requests"), "new": Meter("new")})
    assert registry.get("tokens") == OLD["tokens"]
    assert registry.get("new") == Meter("new")
    assert registry.get("newer") is None


def test_a_refused_declaration_changes_nothing() -> None:
    registry = MeterRegistry(OLD, "x.yaml")
    registry.pinned = True
    with pytest.raises(ConfigError, match=r"x\.yaml: 1 problem\n  meters\.tokens\.decimals: 0"):
        registry.declare({"tokens": Meter("tokens"), "new": Meter("new")})
    assert registry.get("new") is None
    assert registry.get("tokens") == OLD["tokens"]
    assert registry.pinned
