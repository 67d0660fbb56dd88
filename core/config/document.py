"""YAML text as plain data with the line of every path, and `${ENV}` filled in.

The YAML subset is that of JSON plus comments, block style and anchors (core schema of YAML 1.2):
`yes`, `1:30` and dates stay text, and a number with a point becomes a Decimal of exactly its text,
so that a price never passes through a binary float.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any

import yaml

from core.errors import ConfigError

Path = tuple[str | int, ...]

# An anchor used over and over can expand one kilobyte into gigabytes.
MAX_NODES = 200_000

_TAG = "tag:yaml.org,2002:"
_REFERENCE = re.compile(r"\$\$\{|\$\{([A-Za-z_][A-Za-z0-9_]*)(?::-([^}]*))?\}|\$\{")


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Composes nodes only; resolves the scalars of YAML 1.2's core schema."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - PyYAML reads it off the class


for _name, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("int", r"^[-+]?[0-9][0-9_]*$", "-+0123456789"),
    ("float", r"^[-+]?[0-9][0-9_]*\.[0-9_]*$", "-+0123456789"),
    ("merge", r"^<<$", "<"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(_pattern), list(_first))


@dataclass(slots=True)
class Document:
    """What the file says. `data` holds dict, list, str, int, bool, Decimal and None."""

    data: Any
    lines: dict[Path, int] = field(default_factory=dict)
    problems: list[tuple[Path, str]] = field(default_factory=list)

    def line(self, path: Path) -> int | None:
        """The line of a path, or of its nearest parent that is in the file."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.lines:
                return self.lines[path[:length]]
        return None

    def get(self, path: Path) -> Any:
        """The value at a path.

        Raises:
            KeyError: there is none.
        """
        value = self.data
        for step in path:
            try:
                value = value[step]
            except (TypeError, IndexError, KeyError):
                raise KeyError(path) from None
        return value


class _Reader:
    def __init__(self, env: Mapping[str, str]) -> None:
        self.env = env
        self.document = Document(None)
        self.seen = 0
        self.open: set[int] = set()

    def read(self, node: Any, path: Path) -> Any:
        self.seen += 1
        if self.seen > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES} values; is an anchor used too often?")
        self.document.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node, path)
        if id(node) in self.open:
            raise yaml.YAMLError("an anchor contains itself; write the values out")
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                return [self.read(item, (*path, i)) for i, item in enumerate(node.value)]
            return self.mapping(node, path)
        finally:
            self.open.discard(id(node))

    def mapping(self, node: Any, path: Path) -> dict[str, Any]:
        result: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        first: dict[str, int] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.document.problems.append((path, f"line {line}: a key must be text"))
                continue
            if key_node.tag == _TAG + "merge":
                nodes = (
                    value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
                )
                # Of several merged mappings the first one wins, as YAML says.
                for other in reversed(nodes):
                    value = self.read(other, path)
                    if isinstance(value, dict):
                        merged |= value
                    else:
                        self.document.problems.append(
                            (path, "<< takes a mapping or a list of them")
                        )
                continue
            # A key is its text, whatever type YAML would give it: a plan may be called `null`.
            key: str = key_node.value
            here = (*path, key)
            if key in first:
                self.document.problems.append(
                    (here, f"given twice; remove one (the first is on line {first[key]})")
                )
            first.setdefault(key, line)
            self.document.lines[here] = line
            result[key] = self.read(value_node, here)
        return {**merged, **result}

    def scalar(self, node: Any, path: Path) -> Any:
        text: str = node.value
        kind = node.tag.removeprefix(_TAG)
        if kind == "null":
            return None
        if kind == "bool":
            return text.lower() == "true"
        try:
            if kind == "int":
                return int(text)
            if kind == "float":
                return Decimal(text)
        except (ValueError, InvalidOperation):
            return text  # such as 1__0: the field says what it accepts
        if kind not in ("str", "merge"):
            self.document.problems.append((path, f"tag {node.tag} is not supported; remove it"))
            return text
        return self.interpolate(text, path) if "${" in text else text

    def interpolate(self, text: str, path: Path) -> str:
        def fill(found: re.Match[str]) -> str:
            name, default = found[1], found[2]
            if found[0] == "$${":
                return "${"
            if name is None:
                self.document.problems.append(
                    (path, "unfinished reference; write ${NAME}, ${NAME:-default} or $${ for ${")
                )
                return found[0]
            value = self.env.get(name)
            if default is not None:
                return value or default
            if value is None:
                problem = f"environment variable {name} is not set; set it, "
                problem += f"or give a default as ${{{name}:-default}}"
                self.document.problems.append((path, problem))
                return found[0]
            return value

        return _REFERENCE.sub(fill, text)


def read(text: str, source: str, env: Mapping[str, str]) -> Document:
    """Parse YAML text; findings that leave the rest readable are in `Document.problems`.

    Raises:
        ConfigError: not YAML at all, empty, or not one mapping.
    """
    reader = _Reader(env)
    try:
        node = yaml.compose(text, Loader=_Loader)
        data = None if node is None else reader.read(node, ())
    except yaml.MarkedYAMLError as error:
        # Never str(error): it quotes the lines around the place, which may hold a secret.
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        what = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(source, [f"{where}not YAML: {what}"]) from None
    except yaml.YAMLError as error:
        what = str(error).splitlines()[0]
        raise ConfigError(source, [f"not YAML: {what}"]) from None
    except RecursionError:
        raise ConfigError(source, ["not YAML: nested too deeply"]) from None
    if data is None:
        raise ConfigError(source, ["the file is empty; config.yaml has an example"])
    if not isinstance(data, dict):
        raise ConfigError(source, ["must be a mapping of sections, such as `gateway:`"])
    reader.document.data = data
    return reader.document
