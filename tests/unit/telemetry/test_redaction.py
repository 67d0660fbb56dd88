"""No secret passes, in whatever shape it arrives; what is not secret does."""

from __future__ import annotations

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.telemetry.redaction import is_secret_field, redact, redact_text, scrub

SECRET = "Zx9q7PlmW3sVt"
API_KEY = f"tg_live_{SECRET}"


class _Request:
    def __repr__(self) -> str:
        return f"<Request headers={{'x-api-key': '{SECRET}'}}>"


class _Broken:
    def __repr__(self) -> str:
        raise RuntimeError(SECRET)


SHAPES: list[object] = [
    API_KEY,
    f"key {API_KEY} is unknown",
    f"tg_test_{SECRET}",
    f"prefix{API_KEY}suffix",
    f"sk_live_{SECRET} rk_test_{SECRET} whsec_{SECRET}",
    API_KEY.encode(),
    {"key": SECRET},
    {"api_key": SECRET},
    {"x-api-key": SECRET},
    {"apiKey": SECRET},
    {"webhookSecret": SECRET},
    {"Authorization": f"Bearer {SECRET}"},
    {"authorization": [f"Bearer {SECRET}"]},
    {"secrets": {"deep": SECRET}},
    {"db": {"password": SECRET}},
    {"redis.password": SECRET},
    {"pepper_previous": SECRET},
    {"dsn": SECRET},
    {b"cookie": SECRET},
    {"stripe-signature": SECRET},
    {"token": 12345678},
    {API_KEY: 1},
    [(b"authorization", f"Bearer {SECRET}".encode()), (b"accept", b"*/*")],
    [["x-api-key", SECRET]],
    ("set", {API_KEY}, frozenset({API_KEY})),
    {"a": {"b": {"c": {"d": {"e": {"f": {"g": {"password": SECRET}}}}}}}},
    f"redis://:{SECRET}@127.0.0.1:6379/0",
    f"postgresql://user:{SECRET}@db/x?sslmode=require",
    f"postgresql://user:p@ss/{SECRET}@db/x",
    f"rediss+cluster://u:{SECRET}@h:1",
    f"https://{SECRET}@example.org/hook",
    f"postgresql://db/x?user=u&password={SECRET}",
    f"host=db user=u password={SECRET} dbname=x",
    f"host=db password='{SECRET} with spaces'",
    f"Authorization: Bearer {SECRET}",
    f"GET / HTTP/1.1\r\nauthorization: Token {SECRET}\r\nhost: x",
    f"Cookie: a=b; session={SECRET}",
    f"bearer {SECRET}",
    f"?access_token={SECRET}&x=1",
    f"?key={SECRET}",
    f"{{'password': '{SECRET}'}}",
    f'{{"password": "{SECRET}"}}',
    f'{{"client_secret":"{SECRET}"}}',
    orjson.dumps({"inner": f'{{"password": "{SECRET}"}}'}).decode(),
    f"Settings(pepper='{SECRET}', size=3)",
    f"(b'authorization', b'Basic {SECRET}')",
    ValueError(f"bad dsn: {SECRET}"),
    KeyError(API_KEY),
    _Request(),
    _Broken(),
]


@pytest.mark.parametrize("value", SHAPES, ids=lambda value: str(type(value).__name__))
def test_no_shape_lets_the_secret_through(value: object) -> None:
    clean = redact({"event": "x", "value": value})
    line = scrub(orjson.dumps(clean))
    assert SECRET.encode() not in line
    assert b"12345678" not in line
    assert orjson.loads(line)["event"] == "x"


@given(
    before=st.text(max_size=20),
    after=st.text(alphabet=' "\\\n,}', max_size=5),
    body=st.text(alphabet="abcXYZ019_-", min_size=8, max_size=40),
)
def test_a_key_is_removed_inside_any_text_and_the_line_stays_json(
    before: str, after: str, body: str
) -> None:
    text = f"{before}tg_live_{body}{after}"
    line = scrub(orjson.dumps(redact({"event": text})))
    assert f"tg_live_{body}".encode() not in line
    assert isinstance(orjson.loads(line)["event"], str)


@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
))  # fmt: skip
def test_whatever_is_logged_comes_out_as_json(value: object) -> None:
    orjson.loads(scrub(orjson.dumps(redact({"event": value}))))


@pytest.mark.parametrize(
    "text",
    [
        "flushed 12 subjects in 0.2 s",
        "GET /weather/v1?city=Berlin",
        "http://127.0.0.1:8080/readyz",
        "limit daily: 3 of 1000 left",
        "subject cus_01KAM7 key_id=key_01KAM7",
        "KeyError: 'plan'",
        "2026-11-22T12:50:00.000Z",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert redact_text(text) == text


@pytest.mark.parametrize(
    ("name", "secret"),
    [
        ("key", True), ("API_KEY", True), ("x-api-key", True), ("previousPepper", True),
        ("password_hash", True), ("auth", True), ("dsn", True), ("key_id", False),
        ("upstream_key_id", False), ("monkey", False), ("request_id", False), ("plan", False),
        ("keys_count", False), ("", False),
    ],
)  # fmt: skip
def test_fields_are_judged_by_their_words(name: str, secret: bool) -> None:
    assert is_secret_field(name) is secret


def test_a_flag_about_a_secret_keeps_its_value() -> None:
    assert redact({"secret": None, "auth": True}) == {"secret": None, "auth": True}


def test_a_structure_that_contains_itself_ends() -> None:
    loop: dict[str, object] = {"password": SECRET}
    loop["self"] = loop
    assert SECRET not in str(redact(loop))


def test_long_text_is_cut() -> None:
    assert len(redact_text("x" * 10**6)) < 70_000


def test_hostile_text_takes_no_long_time() -> None:
    # Quadratic matching would take minutes for this.
    for text in (
        "a_" * 30_000,
        "password" * 8_000,
        "://" * 20_000,
        "key='" * 12_000,
        "\\" * 60_000,
    ):
        redact_text(text)
