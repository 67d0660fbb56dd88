"""API keys and other secrets: their format, their digest, and how they are compared.

A key is `tg_live_` + 24 random base-62 characters (143 bits) + 6 characters of checksum. The
checksum is no protection, it is a sieve: a mistyped or made-up key is refused without a database
query, and secret scanners can tell a real key from a lookalike.

Keys are stored as BLAKE2b-256 keyed with the pepper. A slow password hash would buy nothing
(143 random bits cannot be guessed) and cost every request; the pepper makes a stolen table useless
for checking candidate keys.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets as _random
import zlib

from core.errors import InvalidValueError

KEY_START = "tg_live_"
PREFIX_LENGTH = (
    12  # `tg_live_` and 4 random characters: enough to tell keys apart, no help to guess
)
DIGEST_SIZE = 32

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_ALPHABET_BYTES = frozenset(_ALPHABET.encode())
_RANDOM_LENGTH = 24
_CHECK_LENGTH = 6  # 62 ** 6 > 2 ** 32
_START = KEY_START.encode()
_MIN_LENGTH = len(KEY_START) + _RANDOM_LENGTH + _CHECK_LENGTH
_MAX_LENGTH = 128  # room for longer keys later; more is never one of ours
_MAX_PEPPER = 64  # BLAKE2b takes a key of at most 64 bytes


def generate_key() -> str:
    """A new secret API key. Show it once; store `KeyHasher.digest` and `prefix` of it."""
    body = KEY_START + "".join(_random.choice(_ALPHABET) for _ in range(_RANDOM_LENGTH))
    return body + _checksum(body.encode()).decode()


def looks_valid(key: str | bytes) -> bool:
    """Whether `key` has the format and the checksum of a key; says nothing of its existence."""
    try:
        raw = key.encode("ascii") if isinstance(key, str) else key
    except UnicodeEncodeError:
        return False
    if not _MIN_LENGTH <= len(raw) <= _MAX_LENGTH or not raw.startswith(_START):
        return False
    if not _ALPHABET_BYTES.issuperset(raw[len(_START) :]):
        return False
    return raw[-_CHECK_LENGTH:] == _checksum(raw[:-_CHECK_LENGTH])


def prefix(key: str) -> str:
    """The part of a key that may be stored and shown."""
    return key[:PREFIX_LENGTH]


def equal(left: str | bytes, right: str | bytes) -> bool:
    """Compare two secrets in a time that does not tell how much of them agrees."""
    one = left.encode() if isinstance(left, str) else left
    other = right.encode() if isinstance(right, str) else right
    return hmac.compare_digest(one, other)


class KeyHasher:
    """Digests keys with one pepper, from a hash state prepared once (half the cost of a new one).

    Raises:
        InvalidValueError: the pepper is missing.
    """

    __slots__ = ("_copy",)

    def __init__(self, pepper: str) -> None:
        if not pepper.strip():
            raise InvalidValueError(
                "key pepper: missing: set TALLYGATE_KEY_PEPPER to a secret of your own, e.g. the "
                "output of `openssl rand -hex 32`, the same for all processes and for ever: with "
                "another pepper no stored key is recognised"
            )
        raw = pepper.encode()
        if len(raw) > _MAX_PEPPER:
            raw = hashlib.blake2b(raw, digest_size=_MAX_PEPPER).digest()
        self._copy = hashlib.blake2b(key=raw, digest_size=DIGEST_SIZE).copy

    def digest(self, key: bytes) -> bytes:
        """32 bytes that stand for `key`."""
        state = self._copy()
        state.update(key)
        return state.digest()


def digest(key: str | bytes, pepper: str) -> bytes:
    """32 bytes that stand for `key`; to digest many keep a `KeyHasher`."""
    return KeyHasher(pepper).digest(key.encode() if isinstance(key, str) else key)


def _checksum(body: bytes) -> bytes:
    value = zlib.crc32(body)
    characters = bytearray(_CHECK_LENGTH)
    for index in range(_CHECK_LENGTH - 1, -1, -1):
        value, rest = divmod(value, 62)
        characters[index] = ord(_ALPHABET[rest])
    return bytes(characters)
