"""The alert rules speak of metrics that exist, and each says what to do."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from core.telemetry.metrics import setup

DEPLOY = Path(__file__).parents[3] / "deploy" / "prometheus"
RULES: list[dict[str, Any]] = [
    rule
    for group in yaml.safe_load((DEPLOY / "alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_an_alert_names_existing_metrics_and_a_remedy(rule: dict[str, Any], tmp_path: Path) -> None:
    samples: dict[str, set[str]] = {}
    for family in vars(setup(tmp_path, "test")).values():
        if isinstance(family, MetricWrapperBase):
            described = family.describe()[0]
            suffixes = {"counter": ["_total"], "gauge": [""],
                        "histogram": ["_bucket", "_sum", "_count"]}[described.type]  # fmt: skip
            for suffix in suffixes:
                samples[described.name + suffix] = set(family._labelnames)
    text = rule["expr"] + " ".join(rule["annotations"].values())
    for name in re.findall(r"tallygate_[a-z_]+", rule["expr"]):
        assert name in samples
    for name in re.findall(r"tallygate_[a-z_]+", text):
        assert name in samples or any(sample.startswith(name + "_") for sample in samples)
    assert set(rule["annotations"]) == {"summary", "impact", "action"}
    assert rule["labels"]["severity"] in ("page", "ticket")
    assert rule["expr"].count("(") == rule["expr"].count(")")


def test_the_scrape_example_loads_the_rules() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    assert config["rule_files"] == ["alerts.yml"]
    assert config["scrape_configs"][0]["metrics_path"] == "/metrics"
