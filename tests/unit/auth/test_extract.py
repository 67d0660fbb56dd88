"""Where a key is found in a request, and where it is not."""

from __future__ import annotations

import pytest

from gateway.auth.extract import KeyExtractor

KEY = b"tg_live_abc"
DEFAULT = KeyExtractor()
QUERY = KeyExtractor(query="api_key")


@pytest.mark.parametrize(
    ("headers", "header"),
    [
        ([(b"authorization", b"Bearer tg_live_abc")], b"authorization"),
        ([(b"authorization", b"bearer   tg_live_abc ")], b"authorization"),
        ([(b"accept", b"*/*"), (b"x-api-key", b"tg_live_abc")], b"x-api-key"),
        ([(b"x-api-key", b" tg_live_abc\t")], b"x-api-key"),
        # the upstream's own token beside a key, in either order
        ([(b"authorization", b"Bearer eyJ0"), (b"x-api-key", b"tg_live_abc")], b"x-api-key"),
        ([(b"x-api-key", b"tg_live_abc"), (b"authorization", b"Bearer eyJ0")], b"x-api-key"),
        ([(b"authorization", b"Basic dTpw"), (b"x-api-key", b"tg_live_abc")], b"x-api-key"),
        ([(b"x-api-key", b""), (b"x-api-key", b"tg_live_abc")], b"x-api-key"),
    ],
)
def test_a_key_is_found_with_its_header(headers: list[tuple[bytes, bytes]], header: bytes) -> None:
    key, source = DEFAULT.extract(headers, b"")
    assert key == KEY
    assert source is not None
    assert (source.header, source.query) == (header, None)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"accept", b"*/*")],
        [(b"authorization", b"Basic dTpw")],
        [(b"authorization", b"Bearer")],
        [(b"authorization", b"Bearer ")],
        [(b"x-api-key", b"  ")],
    ],
)
def test_no_key(headers: list[tuple[bytes, bytes]]) -> None:
    assert DEFAULT.extract(headers, b"api_key=tg_live_abc") == (None, None)


def test_what_is_no_key_of_ours_is_still_reported_as_a_bad_one() -> None:
    key, source = DEFAULT.extract([(b"authorization", b"Bearer eyJ0"), (b"x-api-key", b"z")], b"")
    assert key == b"eyJ0"
    assert source is not None
    assert source.header == b"authorization"


@pytest.mark.parametrize(
    "query",
    [b"api_key=tg_live_abc", b"a=1&api_key=tg_live_abc&b=2", b"xapi_key=1&api_key=tg%5Flive_abc"],
)
def test_a_key_in_the_query_string(query: bytes) -> None:
    key, source = QUERY.extract([], query)
    assert key == KEY
    assert source is not None
    assert (source.header, source.query) == (None, b"api_key")


def test_a_header_goes_before_the_query_string() -> None:
    key, source = QUERY.extract([(b"x-api-key", b"tg_live_1")], b"api_key=tg_live_2")
    assert key == b"tg_live_1"
    assert source is not None
    assert source.header == b"x-api-key"


def test_configured_headers_replace_the_default_ones() -> None:
    extractor = KeyExtractor(headers=("X-Weather-Key",))
    assert extractor.extract([(b"x-weather-key", KEY)], b"")[0] == KEY
    assert extractor.extract([(b"x-api-key", KEY)], b"") == (None, None)


@pytest.mark.parametrize(
    ("name", "query"),
    [
        ("key[]", b"key[]=tg_live_abc"),
        ("key[]", b"key%5B%5D=tg_live_abc"),
        ("api key", b"a&api+key=tg_live_abc"),
        ("api key", b"api%20key=tg_live_abc"),
        ("cl\N{LATIN SMALL LETTER E WITH ACUTE}", b"cl%C3%A9=tg_live_abc"),
        ("api_key", b"%61pi_key=tg_live_abc"),
    ],
)
def test_a_parameter_is_known_however_its_name_is_spelled(name: str, query: bytes) -> None:
    key, source = KeyExtractor(query=name).extract([], query)
    assert key == KEY
    assert source is not None
    assert source.query == name.encode()
