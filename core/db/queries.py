"""SQL lives in `sql/*.sql`, in blocks that open with `-- name: <query>`; code calls it by name.

A name is unique over all files. Comment lines before the statement stay with it, so a slow-query
log shows which query it was.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

_SQL_DIR = Path(__file__).parent / "sql"
_HEADER = re.compile(r"^--\s*name:\s*(?P<name>\S+)\s*$")
_NAME = re.compile(r"^[a-z][a-z0-9_]*$")


class Queries(Mapping[str, str]):
    """Query name -> SQL text, read-only."""

    def __init__(self, texts: Mapping[str, str]) -> None:
        self._texts = dict(texts)

    def __getitem__(self, name: str) -> str:
        """The SQL of `name`.

        Raises:
            LookupError: no file defines it; the message offers the nearest name.
        """
        try:
            return self._texts[name]
        except KeyError:
            near = difflib.get_close_matches(name, self._texts, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise LookupError(f"no query is named {name!r} in core/db/sql{hint}") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._texts)

    def __len__(self) -> int:
        return len(self._texts)


def load_queries(directory: Path = _SQL_DIR) -> Queries:
    """Every named block of `directory/*.sql`.

    Raises:
        ValueError: a name is used twice or malformed, a block is empty, or SQL stands before the
            first name; the message gives file and line.
    """
    texts: dict[str, str] = {}
    places: dict[str, str] = {}
    for path in sorted(directory.glob("*.sql")):
        for name, line, sql in _blocks(path):
            place = f"{path.name}:{line}"
            if name in texts:
                raise ValueError(f"{place}: query {name!r} is already defined at {places[name]}")
            texts[name] = sql
            places[name] = place
    return Queries(texts)


def _blocks(path: Path) -> Iterator[tuple[str, int, str]]:
    name, start, lines = "", 0, list[str]()
    for number, text in enumerate(path.read_text("utf-8").splitlines(), start=1):
        header = _HEADER.match(text)
        if header is None:
            if not name and text.strip() and not text.startswith("--"):
                raise ValueError(f"{path.name}:{number}: SQL before the first `-- name:` line")
            lines.append(text)
            continue
        if name:
            yield name, start, _body(path, name, start, lines)
        name, start, lines = header["name"], number, []
        if not _NAME.match(name):
            raise ValueError(f"{path.name}:{number}: {name!r}: use lower case, digits and _")
    if name:
        yield name, start, _body(path, name, start, lines)


def _body(path: Path, name: str, start: int, lines: list[str]) -> str:
    if all(not line.strip() or line.startswith("--") for line in lines):
        raise ValueError(f"{path.name}:{start}: query {name!r} is empty")
    return f"-- {name}\n" + "\n".join(lines).strip().rstrip(";")
