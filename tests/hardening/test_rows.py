"""Every row of docs/hardening.md, as raw bytes."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hardening.check import World, play
from tests.hardening.page import PAGE, SOURCES, rendered
from tests.hardening.rows import ROWS, Outcome, Told

_CASES = [
    pytest.param(raw, row.outcome, id=f"{row.section}: {row.what[:50]} [{name[:20]!a}]")
    for row in ROWS
    for name, raw in row.requests.items()
]


@pytest.mark.parametrize(("raw", "outcome"), _CASES)
def test_a_request_of_a_row(world: World, raw: bytes, outcome: Outcome) -> None:
    play(world, raw, outcome)


@pytest.mark.parametrize(("raw", "outcome"), _CASES)
def test_the_same_in_pieces(world: World, raw: bytes, outcome: Outcome) -> None:
    play(world, raw, outcome, pieces=min(len(raw), 40))


def test_every_row_has_its_test() -> None:
    here = Path(__file__).parent
    source = "".join(file.read_text() for file in here.glob("test_*.py"))
    for row in ROWS:
        assert row.requests or (
            isinstance(row.outcome, Told) and f"def {row.outcome.test}(" in source
        )


def test_the_page_says_what_the_rows_say() -> None:
    assert SOURCES
    page = PAGE.read_text()
    assert rendered(page) == page, "run `python -m tests.hardening.page`"
