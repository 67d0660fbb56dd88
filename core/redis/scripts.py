"""Loads the Lua files: resolves includes, reads each file's contract, computes its SHA-1."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

_INCLUDE = re.compile(r"^-- @include (\S+)\s*$", re.MULTILINE)
_CONTRACT = ("-- KEYS", "-- ARGV", "-- Returns")


@dataclass(frozen=True, slots=True)
class Script:
    """A script ready to run: its name, full source and the SHA-1 that EVALSHA takes."""

    name: str
    source: str
    sha: str


def render(name: str, replace: Mapping[str, str] | None = None) -> str:
    """The source of `lua/<name>.lua` with its includes put in place.

    `replace` maps an include path to other source: tests use it to control the clock.

    Raises:
        FileNotFoundError: no such script, or an include that does not exist.
        ValueError: the file does not open with KEYS, ARGV and Returns.
    """
    root = files("lua")
    source = root.joinpath(f"{name}.lua").read_text(encoding="utf-8")
    header = source.split("\n\n", 1)[0]
    missing = [part for part in _CONTRACT if part not in header + source.split("\nlocal", 1)[0]]
    if missing:
        raise ValueError(f"lua/{name}.lua does not open with {', '.join(missing)}")

    def include(match: re.Match[str]) -> str:
        path = match.group(1)
        if replace is not None and path in replace:
            return replace[path]
        return root.joinpath(path).read_text(encoding="utf-8")

    return _INCLUDE.sub(include, source)


def make(name: str, source: str) -> Script:
    """A `Script` from source text."""
    return Script(name, source, hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest())


@cache
def load(name: str) -> Script:
    """The script `lua/<name>.lua`, read once a process."""
    return make(name, render(name))
