"""What looking at a whole server needs of Redis: its settings, all keys, many hashes at once.

Functions on a `Store`, with its errors. SCAN and never KEYS: the server serves others meanwhile.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from redis.exceptions import ResponseError

from core.redis.store import Store

# Commands of one round trip: few enough that the answers of a batch stay small.
_PIPELINE = 200


async def info(store: Store) -> dict[str, str] | None:
    """All of INFO's default sections, raw texts by name; None when the server forbids it.

    Raises:
        StoreUnavailableError: no answer.
    """
    text = await _permitted(store, "INFO")
    return None if text is None else {str(name): _plain(value) for name, value in text.items()}


async def settings(store: Store, names: Sequence[str]) -> dict[str, str] | None:
    """CONFIG GET of each name that the server knows; None when the server forbids it.

    Raises:
        StoreUnavailableError: no answer.
    """
    found: dict[str, str] = {}
    for name in names:  # one at a time: Redis 6.2 takes a single name
        answer = await _permitted(store, "CONFIG GET", name)
        if answer is None:
            return None
        found |= {_text(key): _text(value) for key, value in answer.items()}
    return found


async def scan(store: Store, pattern: str, count: int) -> AsyncIterator[list[str]]:
    """Keys that match, in batches of about `count`; a key may come more than once.

    What is there from beginning to end comes at least once. Keys that are no UTF-8 are left out.

    Raises:
        StoreUnavailableError: no answer.
    """
    cursor = 0
    while True:
        with store._translated():
            cursor, keys = await store._client.scan(cursor, match=pattern, count=count)
        if found := [key for key in map(_decoded, keys) if key is not None]:
            yield found
        if not cursor:
            return


async def states(store: Store, keys: Sequence[str]) -> list[dict[str, str] | None]:
    """The hashes at `keys`, in order, each read atomically; empty where there is none.

    None where something else than a hash of texts is kept.

    Raises:
        StoreUnavailableError: no answer.
    """
    found: list[dict[str, str] | None] = []
    for first in range(0, len(keys), _PIPELINE):
        with store._translated():
            pipeline = store._client.pipeline(transaction=False)
            for key in keys[first : first + _PIPELINE]:
                pipeline.hgetall(key)
            replies: list[Any] = await pipeline.execute(raise_on_error=False)
            for reply in replies:
                if isinstance(reply, Exception) and not isinstance(reply, ResponseError):
                    raise reply
        found += map(_state, replies)
    return found


async def scores(store: Store, key: str, members: Sequence[str]) -> list[int | None]:
    """Each member's score in a sorted set, whole numbers; None for one that is not in it.

    Raises:
        StoreUnavailableError: no answer.
    """
    found: list[int | None] = []
    for first in range(0, len(members), _PIPELINE):
        with store._translated():
            replies = await store._client.zmscore(key, members[first : first + _PIPELINE])
        found += [None if reply is None else int(reply) for reply in replies]
    return found


async def enlist(store: Store, key: str, members: Sequence[str], score: int) -> None:
    """Adds to a sorted set those of `members` that are not in it.

    Raises:
        StoreUnavailableError: no answer.
    """
    with store._translated():
        await store._client.zadd(key, dict.fromkeys(members, score), nx=True)


async def _permitted(store: Store, *words: str) -> Any:
    with store._translated():
        try:
            return await store._client.execute_command(*words)
        except ResponseError as error:
            # NOPERM by ACL, or renamed away; "loading" and the like come with other classes
            text = str(error).lower()
            if any(word in text for word in ("no permissions", "unknown command", "not allowed")):
                return None
            raise


def _state(reply: Any) -> dict[str, str] | None:
    try:
        return {name.decode(): text.decode() for name, text in reply.items()}
    except (AttributeError, UnicodeDecodeError):
        return None


def _decoded(key: bytes) -> str | None:
    try:
        return key.decode()
    except UnicodeDecodeError:
        return None


def _text(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _plain(value: Any) -> str:
    """redis-py makes a dict of `slave0:ip=…,state=online`: back to what it was."""
    if isinstance(value, dict):
        return ",".join(f"{name}={_plain(item)}" for name, item in value.items())
    return _text(value)
