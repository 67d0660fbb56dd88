"""From a request's headers to its subscription."""

from __future__ import annotations

from enum import IntEnum

from core.clock import Clock
from core.errors import StoreUnavailableError
from core.secrets import KeyHasher, looks_valid
from gateway.auth.extract import Headers, KeyExtractor, Source
from gateway.auth.keycache import KeyCache, KeyEntry
from gateway.auth.keyloader import KeyLoader

# Far above any key of ours; keeps a 60 kB header from being hashed.
_MAX_KEY_LENGTH = 256


class Outcome(IntEnum):
    """What became of the key."""

    OK = 0
    PENDING = 1  # not cached: await `authenticate_slow`
    MISSING = 2  # the request carries no key
    UNKNOWN = 3  # no such key
    EXPIRED = 4
    INACTIVE = 5
    UNAVAILABLE = 6  # not cached, and Postgres does not answer


# Outcome, entry (set for OK, EXPIRED and INACTIVE), source of the key (None for MISSING). A bare
# tuple: one is made for every request.
Authentication = tuple[Outcome, KeyEntry | None, Source | None]

_OK = Outcome.OK
_PENDING = Outcome.PENDING
_EXPIRED = Outcome.EXPIRED
_INACTIVE = Outcome.INACTIVE
_MISSING: Authentication = (Outcome.MISSING, None, None)


class Authenticator:
    """Answers from the cache at once, or says PENDING; then `authenticate_slow` asks Postgres."""

    __slots__ = ("_cache", "_clock", "_digest", "_extract", "_get", "_loader")

    def __init__(
        self,
        *,
        extractor: KeyExtractor,
        hasher: KeyHasher,
        cache: KeyCache,
        loader: KeyLoader,
        clock: Clock,
    ) -> None:
        self._extract = extractor.extract
        self._digest = hasher.digest
        self._cache = cache
        self._get = cache.get
        self._loader = loader
        self._clock = clock

    def authenticate(self, headers: Headers, query_string: bytes) -> Authentication:
        """Who is calling, as far as this process knows; never waits.

        `headers` and `query_string` are the request's.
        """
        key, source = self._extract(headers, query_string)
        if key is None:
            return _MISSING
        if len(key) > _MAX_KEY_LENGTH:
            return Outcome.UNKNOWN, None, source
        digest = self._digest(key)
        entry = self._get(digest)
        if entry is None:
            # The checksum costs more than the look-up: only for keys that are not cached.
            if not looks_valid(key) or self._cache.is_negative(digest, self._clock()):
                return Outcome.UNKNOWN, None, source
            return _PENDING, None, source
        now_ms = self._clock()
        if entry.fresh_until_ms <= now_ms:
            self._loader.refresh(digest)  # in the background: this request goes on
        return _judge(entry, now_ms), entry, source

    async def authenticate_slow(self, headers: Headers, query_string: bytes) -> Authentication:
        """Like `authenticate`, but waits for Postgres instead of answering PENDING."""
        known = self.authenticate(headers, query_string)
        if known[0] is not _PENDING:
            return known
        key, source = self._extract(headers, query_string)
        assert key is not None
        try:
            entry = await self._loader.load(self._digest(key))
        except StoreUnavailableError:
            return Outcome.UNAVAILABLE, None, source
        if entry is None:
            return Outcome.UNKNOWN, None, source
        return _judge(entry, self._clock()), entry, source


def _judge(entry: KeyEntry, now_ms: int) -> Outcome:
    if not entry.active:
        return _INACTIVE
    expires_at_ms = entry.expires_at_ms
    if expires_at_ms and expires_at_ms <= now_ms:
        return _EXPIRED
    return _OK
