"""Fields of a JSON document by path, with numbers as they were written."""

from __future__ import annotations

import json
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from typing import Any, Final

import orjson

from core.cost import FieldPath

MISSING: Final = object()


def find(document: Any, path: FieldPath) -> Any:
    """The value at `path`; `MISSING` where there is none, or null."""
    for key in path:
        if isinstance(document, dict):
            document = document.get(key)
        elif isinstance(document, list) and key.isascii() and key.isdigit() and len(key) < 10:
            document = document[int(key)] if int(key) < len(document) else None
        else:
            return MISSING
    return MISSING if document is None else document


def extract(data: bytes, paths: Iterable[FieldPath]) -> list[Any] | None:
    """The values at `paths`, or None when `data` is not one JSON document.

    A number with a fraction or an exponent is a Decimal of its text: it is money, not a float.
    """
    paths = list(paths)
    try:
        document = orjson.loads(data)
        found = [find(document, path) for path in paths]
        if any(isinstance(value, float) for value in found):
            # Read again, exactly and slower; also an integer that orjson made a float.
            document = json.loads(data, parse_float=Decimal)
            found = [find(document, path) for path in paths]
    except (ValueError, RecursionError, InvalidOperation):
        return None
    return found
