"""Takes back what was reserved and never settled: its gateway was killed, or cut off for long.

A reservation stands in a sorted set by its expiry, so that nothing is searched for. What is taken
back is remembered for a month (`x:<id>`), as its answer may have been served after all by a gateway
that could not tell; then that is forgotten too. Steps, and what a crash after each leaves behind:
  1. read what is due                        nothing
  2. lua/settle.lua takes back or forgets    done, each by itself
"""

from __future__ import annotations

from core.admission.settlement import Kind, Operation, Settled, Settlement
from core.failpoints import reach
from core.keyspace import Keyspace, subject_of
from core.redis.store import Store
from core.telemetry import logs

_log = logs.get_logger()

_BATCH = 500
_LATER_MS = 60_000
_SETTLED = (Settled.DONE, Settled.GONE)


class Reservations:
    """Expires the reservations of one shard."""

    def __init__(
        self, store: Store, settlement: Settlement, keyspace: Keyspace, *, shard: int = 0
    ) -> None:
        self._store = store
        self._settlement = settlement
        self._due_key = keyspace.due(shard)

    async def expire_due(self) -> int:
        """Settles all that is due by Redis' clock; how many there were.

        Raises:
            StoreUnavailableError: a store did not answer; what was done stays done.
        """
        run = await self._store.run_id()
        until = await self._store.now_ms()
        total = 0
        while True:
            # Step 1
            members = await self._store.up_to(self._due_key, until, _BATCH)
            if not members:
                return total
            reach("reservations.listed")
            operations = []
            for member in members:
                name, _, key = member.partition(" ")
                operations.append(Operation(Kind.EXPIRE, subject_of(key), name))
            # Step 2
            found = await self._settlement.settle(operations, run)
            reach("reservations.expired")
            total += len(members)
            done = sum(answer is Settled.DONE for answer in found)
            stuck = [m for m, a in zip(members, found, strict=True) if a not in _SETTLED]
            if stuck:  # a person has to look; those behind them must not wait for that
                _log.error("reservations_not_expired", members=stuck[:10], count=len(stuck))
                await self._store.rescore(self._due_key, stuck, until + _LATER_MS)
            _log.info("reservations_expired", due=len(members), known=done)
            if len(members) < _BATCH:
                return total
