"""What is admitted while no decision can be had, as the route's `outage` says.

  closed  nothing
  open    everything, as long as the journal takes it
  local   what fits into this process's share of each limit: see local.py

What is admitted is in the journal, on disk, before its request goes upstream; or, on a route that
charges for answers, before the answer goes to the client. So it costs accuracy within the stated
bounds, and never revenue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from core.admission.program import Program
from core.errors import StoreUnavailableError
from core.period import Span
from core.policy import Meter, OutageMode
from core.telemetry import logs
from gateway.outage import entries
from gateway.outage.commit import SpoolUnavailable
from gateway.outage.local import LocalFull, LocalLimiter, LocalProgram, Slots
from gateway.outage.replay import Journal

_log = logs.get_logger()


class Emergency(NamedTuple):
    """A decision without Redis. `numbers` are as lua/admit.lua would answer, empty when nothing was
    asked; `entry` is what remains to be journalled once the answer is charged."""

    admitted: bool
    numbers: list[int]
    slots: Slots | None
    entry: bytes


class OutageRules(NamedTuple):
    """A plan on a route, while Redis is away. `caps`: where overage begins, by meter; `waits`:
    whether what is admitted is journalled only once it is answered."""

    mode: OutageMode
    local: LocalProgram | None
    caps: Mapping[str, int]
    waits: bool = False


class Outage:
    """Decides in the place of Redis.

    `on_admitted(mode)` is told of each request, `on_written()` that the journal has another entry.
    """

    def __init__(
        self,
        journal: Journal,
        meters: Callable[[], Mapping[str, Meter]],
        on_admitted: Callable[[str], None] | None = None,
        on_written: Callable[[], None] | None = None,
    ) -> None:
        self._journal = journal
        self._meters = meters
        self._on_admitted = on_admitted
        self._on_written = on_written
        self._local = LocalLimiter()

    async def decide(
        self, rules: OutageRules, program: Program, subject: str, span: Span, now_ms: int
    ) -> Emergency:
        """One request. `span` is its billing period, (0, 0) on a keyless route.

        Raises:
            StoreUnavailableError: it cannot be admitted: the route is closed, or what was admitted
                could not be written down.
        """
        if rules.mode is OutageMode.CLOSED:
            raise StoreUnavailableError("no decision can be had")
        numbers: list[int] = []
        slots: Slots | None = None
        if rules.local is not None:
            try:
                decision = self._local.admit(rules.local, subject, span, now_ms)
            except LocalFull as error:
                raise StoreUnavailableError(str(error)) from error
            if not decision.admitted:
                return Emergency(False, decision.numbers, None, b"")
            numbers, slots = decision.numbers, decision.slots
        entry = b""
        try:
            if program.durable:
                entry = entries.admitted(subject, program, self._meters(), rules.caps, span, now_ms)
                if not rules.waits:
                    await self.write(entry)
                    entry = b""
        except BaseException:
            self.release(slots)
            raise
        if self._on_admitted is not None:
            self._on_admitted(rules.mode.value)
        return Emergency(True, numbers, slots, entry)

    async def write(self, entry: bytes) -> None:
        """Journals an entry: it is on disk when this returns.

        Raises:
            StoreUnavailableError: the journal does not take it, or has no disk.
        """
        if not self._journal.durable:
            raise StoreUnavailableError("there is no spool: set gateway.outage.spool_dir")
        try:
            await self._journal.append(entry)
        except SpoolUnavailable as error:
            raise StoreUnavailableError(f"spool: {error}") from error
        if self._on_written is not None:
            self._on_written()

    def note(self, entry: bytes) -> bool:
        """Journals an entry without waiting for the disk; False when it cannot be."""
        if not self._journal.durable:
            return False
        try:
            self._journal.append_written(entry)
        except SpoolUnavailable as error:
            _log.warning("not_written_down", reason=str(error))
            return False
        if self._on_written is not None:
            self._on_written()
        return True

    def release(self, slots: Slots | None) -> None:
        """Gives back what a request held of this process's share."""
        if slots is not None:
            self._local.release(slots)
