"""Named SQL: the loader's refusals, and every query against the real schema."""

from __future__ import annotations

import asyncio
from pathlib import Path

import asyncpg
import pytest

from core.db import load_queries


def test_every_query_is_valid_on_the_migrated_schema(database: str) -> None:
    async def run() -> dict[str, str]:
        connection = await asyncpg.connect(database)
        failed = {}
        for name, sql in load_queries().items():
            try:
                await connection.prepare(sql)
            except asyncpg.PostgresError as error:
                failed[name] = str(error)
        await connection.close()
        return failed

    assert asyncio.run(run()) == {}


def test_a_query_carries_its_name_for_the_slow_query_log() -> None:
    assert load_queries()["ping"].splitlines() == ["-- ping", "SELECT 1"]


def test_an_unknown_name_offers_the_nearest() -> None:
    with pytest.raises(LookupError, match="did you mean 'lookup_keys'"):
        load_queries()["lookup_key"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("-- name: one\nSELECT 1\n-- name: one\nSELECT 2\n", "b.sql:3: query 'one' is already"),
        ("-- name: taken\nSELECT 1\n", r"b.sql:1: query 'taken' is already defined at a.sql:2"),
        ("SELECT 1\n-- name: one\nSELECT 2\n", "b.sql:1: SQL before"),
        ("-- name: one\n-- only a remark\n\n-- name: two\nSELECT 1", "b.sql:1: query 'one' is emp"),
        ("-- name: One-Two\nSELECT 1\n", "b.sql:1: 'One-Two'"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.sql").write_text("\n-- name: taken\nSELECT 1;\n")
    (tmp_path / "b.sql").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_queries(tmp_path)
