"""Findings about a config file: one line each, `path: value: what is wrong and the fix (line n)`.

The first finding about a path is kept, so that a missing variable is not followed by complaints
about the text left in its place. Values of secrets are never shown.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from core.config.catalog import FORM_TAG, LIMIT_FORMS, LIMIT_HELP
from core.config.document import Document, Path
from core.config.models import Config
from core.config.units import UnitError, show

_SECRET_PATHS: tuple[Path, ...] = (("secrets",), ("redis", "url"), ("postgres", "url"))
_URL_CREDENTIALS = re.compile(r"//[^/\s\"]*@")

_REASONS = {
    "missing": "required, but missing",
    "model_type": "must be a mapping, such as {key: value}",
    "model_attributes_type": "must be a mapping, such as {key: value}",
    "dict_type": "must be a mapping, such as {key: value}",
    "tuple_type": "must be a list, such as [a, b]",
    "string_type": "must be text; put it in quotes",
    "too_short": "must have at least one entry",
}


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """`; did you mean x?`, or what there is, or nothing."""
    names = sorted(known)
    close = difflib.get_close_matches(given, names, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; known here: {', '.join(names)}" if names else ""


def dotted(path: Path) -> str:
    """`("routes", 0, "match")` as `routes[0].match`."""
    text = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in path)
    return text.removeprefix(".")


def _secret(path: Path) -> bool:
    # Also above the path: `redis: redis://:password@host` puts the URL one level too high.
    # A value that goes upstream may be the upstream's own credential.
    return "request_headers" in path or any(
        path[: len(hidden)] == hidden[: len(path)] for hidden in _SECRET_PATHS
    )


class Problems:
    """Collects findings about one document."""

    def __init__(self, document: Document) -> None:
        self._document = document
        self._found: dict[Path, str] = {}
        for path, reason in document.problems:
            self.add(path, reason, value=False)

    def __bool__(self) -> bool:
        return bool(self._found)

    def __contains__(self, path: Path) -> bool:
        return path in self._found

    def add(self, path: Path, reason: str, *, value: bool = True) -> None:
        """Record a finding; `value=False` leaves out the value, where it says nothing."""
        if path in self._found:
            return
        shown = self._shown(path) if value else ""
        line = self._document.line(path)
        where = f" (line {line})" if line else ""
        self._found[path] = f"{dotted(path)}: {shown}{reason}{where}"

    def add_validation(self, error: ValidationError) -> None:
        """Record everything that pydantic found, in words of the file."""
        for detail in error.errors(include_url=False):
            loc = detail["loc"]
            about_key = bool(loc) and loc[-1] == "[key]"
            tag = next((str(s) for s in loc if str(s).startswith(FORM_TAG)), "")
            form = tag if tag.removeprefix(FORM_TAG) in LIMIT_FORMS else None
            path = tuple(s for s in loc if s != "[key]" and not str(s).startswith(FORM_TAG))
            if detail["type"] == "too_short" and self._document.get(path):
                continue  # its entries are there, and reported one by one
            unknown = detail["type"] == "extra_forbidden"
            self.add(path, self._reason(detail, path, form), value=not (about_key or unknown))

    def lines(self) -> list[str]:
        """All findings, in the order of the file."""
        order = sorted(self._found, key=lambda path: self._document.line(path) or 0)
        return [self._found[path] for path in order]

    def _shown(self, path: Path) -> str:
        try:
            value = self._document.get(path)
        except KeyError:
            return ""
        if isinstance(value, dict | list):
            return ""
        if _secret(path):
            return "(hidden): "
        return _URL_CREDENTIALS.sub("//***@", show(value)) + ": "

    def _reason(self, detail: ErrorDetails, path: Path, form: str | None) -> str:
        kind = detail["type"]
        context: Mapping[str, Any] = detail.get("ctx", {})
        if kind == "value_error":
            cause = context["error"]
            return cause.reason if isinstance(cause, UnitError) else str(cause)
        if kind == "extra_forbidden":
            if form is not None and form.removeprefix(FORM_TAG) not in LIMIT_FORMS:
                form = None  # of another union: its keys say enough
            hint = did_you_mean(str(path[-1]), known_keys(path[:-1], form))
            if form is None:
                return f"unknown key{hint}"
            hint = hint if "did you mean" in hint else ""
            return f"unknown key for a {form.removeprefix(FORM_TAG)} limit{hint}; {LIMIT_HELP}"
        if kind == "limit_form":
            return self._form_reason(path)
        if kind == "literal_error":
            return f"not known here; write {context['expected'].replace(chr(39), '')}"
        return _REASONS.get(kind, detail["msg"])

    def _form_reason(self, path: Path) -> str:
        limit = self._document.get(path)
        if not isinstance(limit, dict):
            return f"not a limit; {LIMIT_HELP}"
        mixed = " and ".join(key for key in LIMIT_FORMS if key in limit)
        found = f"mixes {mixed}" if mixed else "no form of limit"
        for key in limit:
            close = difflib.get_close_matches(key, LIMIT_FORMS, n=1)
            if not mixed and close:
                found += f" ({key}: did you mean {close[0]}?)"
        return f"{found}; {LIMIT_HELP}"


def known_keys(path: Path, form: str | None = None) -> set[str]:
    """The keys that the schema knows in the mapping at `path`; of one form if it is a limit."""
    schema = Config.model_json_schema()
    nodes = [schema]
    for step in path:
        below: list[dict[str, Any]] = []
        for node in _expand(nodes, schema):
            if isinstance(step, int):
                below.append(node.get("items", {}))
            elif step in node.get("properties", {}):
                below.append(node["properties"][step])
            else:  # a mapping by name: one schema for every value
                below.extend(node.get("patternProperties", {}).values())
        nodes = below
    key = form.removeprefix(FORM_TAG) if form else None
    found = [set(node.get("properties", {})) for node in _expand(nodes, schema)]
    return set().union(*(keys for keys in found if key is None or key in keys))


def _expand(nodes: list[dict[str, Any]], schema: dict[str, Any]) -> list[dict[str, Any]]:
    """Follow references and alternatives down to plain nodes."""
    plain: list[dict[str, Any]] = []
    queue = list(nodes)
    while queue:
        node = queue.pop()
        plain.append(node)
        if "$ref" in node:
            queue.append(schema["$defs"][node["$ref"].rpartition("/")[2]])
        for union in ("anyOf", "oneOf", "allOf"):
            queue.extend(node.get(union, []))
    return plain
