"""Does Redis agree with the ledger? Every live state against its rows, while both are written.

What is read when decides what may be concluded. The ledger only ever gets what Redis had, and a
flush commits before it unlists, so

  hash, then list, then ledger   a state that is not listed is in the ledger by the time that is
                                 read: if the ledger is older, nothing will ever flush it
  ledger, then hash              Redis had what the ledger has: if the hash is older, it lost it

Each verdict below needs the order it names, so load during an audit gives no false alarm.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal

from core import clock, keyspace
from core.audit.report import Cause, Drift
from core.audit.state import LiveRow, LiveState, parse
from core.config.units import format_quantity
from core.db import Database
from core.keyspace import Keyspace, subject_of
from core.meters import MeterRegistry
from core.redis import survey
from core.redis.store import Store

# Hours are kept at least so long; older ones may have become days.
_HOURS_KEPT_MS = 62 * 86_400_000
_KEYLESS = "ip:"


@dataclass(slots=True)
class Comparison:
    """What a batch of keys came to. `behind` and `unlisted` are what can be mended, by drift."""

    states: int = 0
    keyless: int = 0
    pending: int = 0
    drifts: list[Drift] = field(default_factory=list)
    behind: list[tuple[Drift, LiveState]] = field(default_factory=list)
    unlisted: list[tuple[Drift, LiveState]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Stored:
    """The ledger's view: epoch and version by subject; total and overage by (subject, row)."""

    versions: dict[str, tuple[int, int]]
    rows: dict[tuple[str, str, int, int | None], tuple[Decimal, Decimal]]


class LiveAudit:
    """Compares states, batch by batch."""

    def __init__(
        self, database: Database, store: Store, keys: Keyspace, registry: MeterRegistry
    ) -> None:
        self._database = database
        self._store = store
        self._keys = keys
        self._registry = registry

    async def compare(self, state_keys: Sequence[str]) -> Comparison:
        """Compares the states at these keys with the ledger.

        Raises:
            StoreUnavailableError: a store did not answer.
        """
        result = Comparison()
        # 1. hash, 2. list
        states = await self._read(state_keys, result)
        since = await self._listed(states)
        # 3. ledger
        stored = await self._ledger(states)
        older: list[LiveState] = []
        for state in states:
            theirs = stored.versions.get(state.subject)
            mine = (state.epoch, state.version)
            if theirs is not None and mine[0] <= theirs[0] and mine[1] < theirs[1]:
                older.append(state)
            elif theirs is None or mine > theirs or mine[1] > theirs[1]:
                self._newer(state, theirs, since[state.key], result)
            elif drift := self._differing(state, stored, since[state.key]):
                result.drifts.append(drift)
        if older:
            await self._older(older, stored, result)
        return result

    async def _read(self, state_keys: Sequence[str], result: Comparison) -> list[LiveState]:
        found: list[LiveState] = []
        texts = await survey.states(self._store, state_keys)
        for key, text in zip(state_keys, texts, strict=True):
            subject = subject_of(key)
            if text == {}:
                continue  # gone meanwhile
            if text is not None and keyspace.VERSION not in text and subject.startswith(_KEYLESS):
                result.keyless += 1
                continue
            result.states += 1
            try:
                if text is None:
                    raise ValueError("it is no hash of texts")
                found.append(parse(key, text))
            except ValueError as error:
                result.drifts.append(_unreadable(subject, key, str(error)))
        names = {name for state in found for name in state.meters}
        if unknown := await self._registry.unknown(self._database, names):
            for state in [state for state in found if state.meters & unknown]:
                name = ", ".join(sorted(state.meters & unknown))
                reason = f"no process ever declared its meter {name}"
                result.drifts.append(_unreadable(state.subject, state.key, reason))
                found.remove(state)
        return found

    async def _listed(self, states: Sequence[LiveState]) -> dict[str, int | None]:
        """Since when each is listed as changed, None for those that are not."""
        found: dict[str, int | None] = {}
        by_list: dict[str, list[str]] = {}
        for state in states:
            dirty = self._keys.dirty(self._keys.shard(state.subject))
            by_list.setdefault(dirty, []).append(state.key)
        for dirty, members in by_list.items():
            scores = await survey.scores(self._store, dirty, members)
            found |= zip(members, scores, strict=True)
        return found

    async def _ledger(self, states: Sequence[LiveState]) -> _Stored:
        rows = [(state.subject, row) for state in states for row in state.rows]
        stored: dict[tuple[str, str, int, int | None], tuple[Decimal, Decimal]] = {}
        async with self._database.transaction() as transaction:
            await transaction.execute("consistent_read")
            versions = {
                row["subject"]: (row["epoch"], row["version"])
                for row in await transaction.fetch("read_epochs", [s.subject for s in states])
            }
            for query, chosen in (
                ("audit_these_periods", [r for r in rows if r[1].hour_start_ms is None]),
                ("audit_these_hours", [r for r in rows if r[1].hour_start_ms is not None]),
            ):
                columns: list[list[object]] = [
                    [subject for subject, _ in chosen],
                    [row.meter for _, row in chosen],
                    [clock.to_datetime(row.period_start_ms) for _, row in chosen],
                ]
                hours = [row.hour_start_ms for _, row in chosen if row.hour_start_ms is not None]
                if hours:
                    columns.append([clock.to_datetime(hour) for hour in hours])
                if not chosen:
                    continue
                for found in await transaction.fetch(query, *columns):
                    subject, row = chosen[found["position"] - 1]
                    stored[_place(subject, row)] = found["total"], found["overage"]
        return _Stored(versions, stored)

    def _newer(
        self,
        state: LiveState,
        theirs: tuple[int, int] | None,
        since_ms: int | None,
        result: Comparison,
    ) -> None:
        if since_ms is not None:
            result.pending += 1
            return
        if theirs is None and not state.version:
            return  # nothing was counted yet
        have = f"version {theirs[1]}" if theirs else "nothing"
        drift = Drift(
            Cause.REDIS_AHEAD_NOT_DIRTY,
            state.subject,
            f"{state.subject}: Redis has version {state.version} and the ledger {have}, but the "
            "state is not listed as changed: nothing flushes it until its next request; an entry "
            "of the list was removed, or the ledger was restored from a backup",
            expected=Decimal(state.version),
            found=Decimal(theirs[1] if theirs else 0),
        )
        result.unlisted.append((drift, state))

    def _differing(self, state: LiveState, stored: _Stored, since_ms: int | None) -> Drift | None:
        """A row of a state whose version the ledger has, with other numbers; the first of them."""
        for row in state.rows:
            meter = self._registry.get(row.meter)
            assert meter is not None, row.meter  # _read left out states with unknown meters
            live = meter.from_units(row.total), meter.from_units(row.overage)
            found = stored.rows.get(_place(state.subject, row))
            if found is None:
                old = clock.now_ms() - (row.hour_start_ms or row.period_start_ms) > _HOURS_KEPT_MS
                if not any(live) or (row.hour_start_ms is not None and old):
                    continue
            if found == live:
                continue
            what = "overage" if found and found[0] == live[0] else "total"
            mine = live[what == "overage"]
            theirs = found[what == "overage"] if found else None
            start = row.period_start_ms if row.hour_start_ms is None else row.hour_start_ms
            unit = "period" if row.hour_start_ms is None else "hour"
            listed = "; the next flush may change the ledger" if since_ms is not None else ""
            return Drift(
                Cause.REDIS_DIFFERS,
                state.subject,
                f"{state.subject}: {what} of {row.meter} in the {unit} from "
                f"{clock.isoformat(start)} is {format_quantity(mine)} in Redis and "
                f"{'missing' if theirs is None else format_quantity(theirs)} in the ledger, both "
                f"at version {state.version}: one of them was changed by hand{listed}",
                row.meter,
                row.period_start_ms,
                row.hour_start_ms,
                mine,
                theirs,
            )
        return None

    async def _older(
        self, suspects: Sequence[LiveState], stored: _Stored, result: Comparison
    ) -> None:
        # 4. hash again, after the ledger
        run = await self._store.run_id()
        unread = Comparison()  # whatever cannot be read now was told, or will be by the next audit
        for state in await self._read([state.key for state in suspects], unread):
            epoch, version = stored.versions[state.subject]
            if state.epoch > epoch or state.version >= version:
                continue  # flushed, or repaired, between the two reads
            decides = not run or state.run == run
            drift = Drift(
                Cause.REDIS_BEHIND if decides else Cause.REDIS_OLDER,
                state.subject,
                f"{state.subject}: Redis has version {state.version} and the ledger {version}: "
                "an older copy of Redis' data came back"
                + (
                    " while the server ran, so its limits admit again what was used up before; "
                    "the ledger and what is billed are right"
                    if decides
                    else "; the ledger's takes its place at its next request"
                ),
                expected=Decimal(version),
                found=Decimal(state.version),
            )
            result.behind.append((drift, state))


def _place(subject: str, row: LiveRow) -> tuple[str, str, int, int | None]:
    return subject, row.meter, row.period_start_ms, row.hour_start_ms


def _unreadable(subject: str, key: str, reason: str) -> Drift:
    return Drift(
        Cause.STATE_UNREADABLE,
        subject,
        f"{subject}: the state at {key} cannot be read ({reason}), so its requests are answered "
        "503 and what it holds is not flushed; delete the key to go on from the ledger, without "
        "what was not flushed",
    )
