"""Recomputes what the ledger says and compares Redis with it: `await audit(…)`.

Runs next to everything else: each batch is one snapshot of the database, and what is written
meanwhile gives no false alarm (`live.py` says why). Memory does not grow with the subjects.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from core import clock
from core.audit.gauge import publish
from core.audit.ledger import EventsWaiting, LedgerAudit, MeterUse, batches
from core.audit.live import Comparison, LiveAudit
from core.audit.repair import Behind, RepairBehind, drop_behind, list_as_changed
from core.audit.report import NOTES, AuditReport, Cause, Collector, Drift
from core.db import Database
from core.keyspace import Keyspace, subject_of
from core.meters import MeterRegistry
from core.redis import survey
from core.redis.store import Store

__all__ = [
    "NOTES",
    "AuditReport",
    "Behind",
    "Cause",
    "Drift",
    "MeterUse",
    "RepairBehind",
    "audit",
    "drop_behind",
    "publish",
]

Progress = Callable[[str, int], None]
"""Told `ledger` or `redis` and how many subjects of it are done."""


async def audit(
    database: Database,
    store: Store,
    registry: MeterRegistry,
    *,
    keyspace: Keyspace | None = None,
    subject: str | None = None,
    since_ms: int = 0,
    use: MeterUse | None = None,
    events_waiting: EventsWaiting | None = None,
    repair: bool = False,
    repair_behind: RepairBehind | None = None,
    batch: int = 500,
    keep: int = 1_000,
    on_progress: Progress = lambda _where, _done: None,
) -> AuditReport:
    """Checks the ledger, then every live state against it.

    Args:
        subject: only this one; everybody's by default.
        since_ms: of the ledger, only periods that end and hours that start after it.
        use: how meters are counted, `MeterUse.of(snapshot)`; None: each in any way.
        events_waiting: whether usage events are on their way to Postgres; then none is missed. By
            default, whether Redis' stream has any.
        repair: mend what changes nothing that is billed.
        repair_behind: how states that are older than the ledger are mended; `drop_behind` by
            default.
        batch: subjects looked at together.
        keep: differences that the report holds; all are counted.

    Raises:
        StoreUnavailableError: a store did not answer; what was repaired until then stays so.
    """
    keys = keyspace or Keyspace()
    started_ms, collector = clock.now_ms(), Collector(keep)
    await registry.refresh(database)

    async def waiting() -> bool:
        return await store.length(keys.ingested(0)) > 0

    ledger = LedgerAudit(
        database,
        store,
        keys,
        registry,
        since_ms=since_ms,
        use=use or MeterUse(),
        events_waiting=events_waiting or waiting,
    )
    if subject is None:
        async for subjects in batches(database, batch):
            for drift in await ledger.check(subjects):
                collector.add(drift)
            collector.subjects += len(subjects)
            on_progress("ledger", collector.subjects)
    else:
        for drift in await ledger.check([subject]):
            collector.add(drift)
        collector.subjects = len(await database.fetch("read_epochs", [subject]))
    live = LiveAudit(database, store, keys, registry)
    mend = repair_behind or drop_behind(store, keys)

    async def compare(state_keys: list[str]) -> None:
        result = await live.compare(state_keys)
        collector.states += result.states
        collector.keyless += result.keyless
        collector.pending += result.pending
        for drift in result.drifts:
            collector.add(drift)
        done = await _mend(store, keys, mend, result) if repair else {}
        for drift, state in (*result.behind, *result.unlisted):
            collector.add(replace(drift, repaired=done.get(state.subject, "")))

    if subject is None:
        async for found in survey.scan(store, keys.states(), batch):
            await compare(_ours(keys, found))
            on_progress("redis", collector.states)
    else:
        await compare([keys.state(subject)])
    return collector.report(started_ms, clock.now_ms())


def _ours(keys: Keyspace, found: list[str]) -> list[str]:
    """State keys among what matched the pattern, each once."""
    ours = []
    for key in dict.fromkeys(found):
        try:
            if keys.state(subject_of(key)) == key:
                ours.append(key)
        except ValueError:
            continue
    return ours


async def _mend(
    store: Store, keys: Keyspace, mend: RepairBehind, result: Comparison
) -> dict[str, str]:
    done: dict[str, str] = {}
    if result.unlisted:
        done |= await list_as_changed(store, keys, [state for _, state in result.unlisted])
    if result.behind:
        done |= await mend([Behind(s.subject, s.epoch, s.version) for _, s in result.behind])
    return done
