"""What an audit may mend: only what changes nothing that is billed, and never silently."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

from core.audit.state import LiveState
from core.keyspace import Keyspace
from core.redis import survey
from core.redis.scripts import load
from core.redis.store import Store


class Behind(NamedTuple):
    """A subject whose live state is older than the ledger, at the version that was compared."""

    subject: str
    epoch: int
    version: int


RepairBehind = Callable[[Sequence[Behind]], Awaitable[Mapping[str, str]]]
"""Mends such states: what was done, in words, by subject; who is left out was left."""


def drop_behind(store: Store, keyspace: Keyspace) -> RepairBehind:
    """The simplest repair: deletes the state, so that the next request rebuilds it from the ledger.

    One that changed since it was compared stays.
    """
    script = load("drop")

    async def repair(behind: Sequence[Behind]) -> Mapping[str, str]:
        calls = [
            (
                [keyspace.dirty(keyspace.shard(item.subject)), keyspace.state(item.subject)],
                [item.epoch, item.version],
            )
            for item in behind
        ]
        replies = await store.run_many(script, calls)
        return {
            item.subject: "its state was deleted and the next request rebuilds it from the "
            "ledger; what was counted on the older copy alone is dropped"
            for item, reply in zip(behind, replies, strict=True)
            if reply
        }

    return repair


async def list_as_changed(
    store: Store, keyspace: Keyspace, states: Sequence[LiveState]
) -> dict[str, str]:
    """Lists states for the next flush; what was done by subject.

    Raises:
        StoreUnavailableError: Redis did not answer.
    """
    now_ms = await store.now_ms()
    by_list: dict[str, list[str]] = {}
    for state in states:
        by_list.setdefault(keyspace.dirty(keyspace.shard(state.subject)), []).append(state.key)
    for dirty, keys in by_list.items():
        await survey.enlist(store, dirty, keys, now_ms)
    done = "it was listed as changed, so that the next flush copies it into the ledger"
    return {state.subject: done for state in states}
