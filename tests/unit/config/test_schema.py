from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from core.config import json_schema

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


def errors(validator: Draft202012Validator, text: str) -> list[str]:
    return [error.message for error in validator.iter_errors(yaml.safe_load(text))]


def test_the_shipped_config_fits_the_schema(validator: Draft202012Validator) -> None:
    assert errors(validator, (ROOT / "config.yaml").read_text()) == []


@pytest.mark.parametrize(
    "text",
    [
        "gateway: {workers: auto, drain: 5s}",
        "gateway: {workers: 4, admission: {max_batch: 1_000}}",
        'gateway: {workers: "${WORKERS}", access_log: "${LOG:-true}", drain: "${DRAIN}"}',
        'log: {level: "${LEVEL:-info}"}',
        "plans: {a: {limits: {x: {rate: 100/10s}, y: {window: 1d, limit: 1_000}}}}",
        'plans: {a: {limits: {x: {period: day, limit: "10_000", thresholds: [0.8, 90]}}}}',
        "gateway: {client: {max_body: unlimited}}",
        'routes: [{match: {path: /a}, upstream: a, max_body: 5 MiB, host: "${HOST}"}]',
        "routes: [{match: {path: /a}, respond: {status: 503, headers: {retry-after: 60}}}]",
        "routes: [{match: {path: /a}, upstream: a, cors: {origins: ['*'], max_age: 1h}}]",
        "routes: [{match: {path: /a/*}, upstream: a, rewrite: {from: '/a/{b}', to: '/{b}'}}]",
    ],
)
def test_human_spellings_fit(validator: Draft202012Validator, text: str) -> None:
    assert errors(validator, text) == []


@pytest.mark.parametrize(
    "text",
    [
        "gatway: {}",
        "gateway: {drain: 1 fortnight}",
        "gateway: {drain: 30}",
        "gateway: {workers: 0}",
        "log: {level: loud}",
        "plans: {a: {limits: {x: {rate: 10/s, window: 1d, limit: 5}}}}",
        "plans: {a: {limits: {x: {window: 1d, limit: -5}}}}",
        "plans: {A: {unlimited: true}}",
        "routes: [{match: {path: /a}}]",
        "routes: [{match: {path: /a}, upstream: a, respond: {status: 503}}]",
        "routes: [{match: {path: /a}, respond: {status: 100}}]",
        "routes: [{match: {path: /a}, upstream: a, cors: {}}]",
    ],
)
def test_mistakes_do_not(validator: Draft202012Validator, text: str) -> None:
    assert errors(validator, text) != []


def test_every_key_is_described_and_defaults_are_in_human_spelling() -> None:
    schema = json_schema()
    for model, node in {"root": schema, **schema["$defs"]}.items():
        for key, value in node["properties"].items():
            section = schema["$defs"].get(value.get("$ref", "").rpartition("/")[2], {})
            assert value.get("description") or section.get("description"), f"{model}.{key}"
    keys: dict[str, Any] = schema["$defs"]["KeyCacheSettings"]["properties"]
    assert keys["ttl"]["default"] == "5m"
    assert "$id" not in schema
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
