"""docs/hardening.md from the rows: `python -m tests.hardening.page` writes it."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from tests.hardening import (
    rows_connection,
    rows_framing,
    rows_head,
    rows_path,
    rows_proxy,
    rows_target,
)
from tests.hardening.rows import ROWS
from tests.support.processes import ROOT

PAGE = Path(ROOT, "docs", "hardening.md")
_BEGIN, _END = "<!-- printed from tests/hardening -->\n", "<!-- end -->\n"
SOURCES = (rows_framing, rows_head, rows_target, rows_path, rows_proxy, rows_connection)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("@KEY@", "KEY").replace("@KEYPERCENT@", "%4B%45%59")


def tables() -> str:
    """One table a section, in the order of the rows."""
    parts = []
    sections = [source.SECTION for source in SOURCES]
    sections += [row.section for row in ROWS]
    ordered = sorted(ROWS, key=lambda row: sections.index(row.section))
    for section, rows in groupby(ordered, key=lambda row: row.section):
        parts.append(f"\n### {section}\n| sent | what happens |\n|---|---|\n")
        for row in rows:
            note = f"; {row.note}" if row.note else ""
            parts.append(f"| {_cell(row.what)} | {_cell(str(row.outcome))}{note} |\n")
    return "".join(parts) + "\n"


def rendered(page: str) -> str:
    """The page with its tables as the rows have them."""
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    return before + _BEGIN + tables() + _END + after


if __name__ == "__main__":
    PAGE.write_text(rendered(PAGE.read_text()))
