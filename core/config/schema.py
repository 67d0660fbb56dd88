"""The JSON Schema of `config.yaml`, for editors: completion, descriptions, defaults, red lines."""

from __future__ import annotations

from typing import Any

from core.config.models import Config


def json_schema() -> dict[str, Any]:
    """Draft 2020-12; a new dict each call. Accepts the human spellings and `${...}` everywhere."""
    schema = Config.model_json_schema()
    _close_mappings(schema)
    for node in [schema, *schema["$defs"].values()]:
        for name, value in node.get("properties", {}).items():
            node["properties"][name] = _with_reference(value)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Tallygate configuration",
    }


def _close_mappings(node: Any) -> None:
    """A mapping by name takes nothing whose name does not fit; pydantic leaves that open."""
    if isinstance(node, dict):
        if "patternProperties" in node:
            node["additionalProperties"] = False
        for value in node.values():
            _close_mappings(value)
    elif isinstance(node, list):
        for value in node:
            _close_mappings(value)


def _with_reference(node: dict[str, Any]) -> dict[str, Any]:
    """A choice of words may come from the environment too; until then it is other text."""
    if "enum" not in node:
        return node
    words = {"enum": node.pop("enum"), "type": "string"}
    node.pop("type", None)
    return {**node, "anyOf": [words, {"type": "string", "pattern": r"\$\{"}]}
