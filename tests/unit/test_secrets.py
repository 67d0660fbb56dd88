"""Keys: format, checksum, digest, and what a missing pepper says."""

from __future__ import annotations

import hashlib
import re

import pytest

from core import secrets
from core.errors import InvalidValueError
from core.secrets import KeyHasher

PEPPER = "a pepper for tests"


def test_a_key_has_the_documented_format_and_passes_its_own_check() -> None:
    for _ in range(200):
        key = secrets.generate_key()
        assert re.fullmatch(r"tg_live_[0-9A-Za-z]{24}[0-9A-Za-z]{6}", key)
        assert secrets.looks_valid(key)
        assert secrets.looks_valid(key.encode())


def test_keys_do_not_repeat() -> None:
    assert len({secrets.generate_key() for _ in range(1_000)}) == 1_000


def test_any_one_changed_character_is_noticed() -> None:
    key = secrets.generate_key()
    for position in range(len(key)):
        other = "a" if key[position] != "a" else "b"
        assert not secrets.looks_valid(key[:position] + other + key[position + 1 :]), position


@pytest.mark.parametrize(
    "key",
    [
        "",
        "tg_live_",
        "tg_live_short",
        "sk_live_" + "a" * 30,
        "tg_live_" + "a" * 30,
        "tg_live_" + "é" * 30,
        "tg_live_" + "\0" * 30,
        "tg_live_" + "a" * 500,
    ],
)
def test_what_is_no_key_does_not_look_valid(key: str) -> None:
    assert not secrets.looks_valid(key)
    assert not secrets.looks_valid(key.encode())


def test_bytes_that_are_no_text_do_not_look_valid() -> None:
    assert not secrets.looks_valid(b"tg_live_" + b"\xff" * 30)


def test_the_digest_is_keyed_blake2b_of_32_bytes() -> None:
    key = secrets.generate_key()
    expected = hashlib.blake2b(key.encode(), key=PEPPER.encode(), digest_size=32).digest()
    hasher = KeyHasher(PEPPER)
    assert hasher.digest(key.encode()) == expected
    assert hasher.digest(key.encode()) == expected  # the prepared state is not used up
    assert secrets.digest(key, PEPPER) == expected


def test_another_pepper_gives_another_digest_also_beyond_64_bytes() -> None:
    long = "x" * 64
    digests = {secrets.digest("key", pepper) for pepper in (PEPPER, long, long + "1", long + "2")}
    assert len(digests) == 4


@pytest.mark.parametrize("pepper", ["", "  \n"])
def test_a_missing_pepper_says_how_to_set_it(pepper: str) -> None:
    with pytest.raises(InvalidValueError, match="TALLYGATE_KEY_PEPPER"):
        KeyHasher(pepper)


def test_the_prefix_shows_little() -> None:
    key = secrets.generate_key()
    assert secrets.prefix(key) == key[:12]


def test_comparison_takes_text_and_bytes() -> None:
    assert secrets.equal("geheim", b"geheim")
    assert secrets.equal("schlüssel", "schlüssel")
    assert not secrets.equal("geheim", "geheim2")
