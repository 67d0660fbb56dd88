"""Redis holds who is active: subjects that were idle for long leave it, and return when they call.

Their counts are in the ledger and their rate limits whole again, so that the state which the cold
path seeds on their return decides as the one that left would have. Each leaves in one atomic step,
upon the conditions of lua/evict.lua: a crash leaves it there or gone, never in part.
"""

from __future__ import annotations

from core.admission.program import rest_ms
from core.config import Snapshot
from core.keyspace import Keyspace, subject_of
from core.policy import Concurrency
from core.redis.scripts import load
from core.redis.store import Store
from core.telemetry import logs

_log = logs.get_logger()

# Subjects of one script call, which nothing else may interrupt: well under a millisecond.
_BATCH = 100


def idle_after_ms(snapshot: Snapshot) -> int:
    """How long a subject must have been idle: `reconciler.idle_after`, and long enough for every
    rate limit of every plan to be whole again."""
    limits = [limit for plan in snapshot.plans.values() for limit in plan.limits]
    return max(snapshot.settings.reconciler.idle_after_ms, rest_ms(limits))


async def evict_idle(
    store: Store,
    keyspace: Keyspace,
    snapshot: Snapshot,
    *,
    shard: int = 0,
    after_ms: int | None = None,
    most: int = 100_000,
) -> int:
    """Removes idle subjects of a shard, the longest idle first; the number that left.

    Args:
        snapshot: its plans say how long, see `idle_after_ms`, and which lease sets there may be.
        after_ms: idle for so long instead.
        most: looks at so many subjects at most, so that one call ends soon; the next goes on.

    Raises:
        StoreUnavailableError: Redis did not answer; who left stays gone.
    """
    script = load("evict")
    leases = sorted(
        {
            limit.name
            for plan in snapshot.plans.values()
            for limit in plan.limits
            if isinstance(limit, Concurrency)
        }
    )
    after_ms = idle_after_ms(snapshot) if after_ms is None else after_ms
    before_ms = await store.now_ms() - after_ms
    idle = keyspace.idle(shard)
    shard_keys = [keyspace.dirty(shard), idle]
    total = skip = 0
    for _ in range(0, most, _BATCH):
        rows = await store.oldest(idle, _BATCH, skip)
        keys = list(shard_keys)
        for key, since in rows:
            if since < before_ms:
                subject = subject_of(key)
                keys += (key, *(keyspace.leases(subject, limit) for limit in leases))
        if len(keys) == len(shard_keys):
            break
        evicted, kept = await store.run(script, keys, [before_ms, len(leases)])
        total += evicted
        skip += kept
    if total:
        _log.info("idle_evicted", subjects=total, idle_ms=after_ms)
    return total
