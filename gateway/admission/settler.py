"""Settles the reservations of this worker's requests, on routes that charge for an answer.

A reservation was counted when its request was admitted. It is confirmed before the first byte of
the answer leaves for the client, so what was served is charged, and refunded when there is nothing
to charge for. What is neither, because this worker was killed, expires and is taken back. Those of
long requests are renewed here, on one timer for all of them. Where the answer decides the cost, a
reservation is settled by it at the answer's end, and says meanwhile what is charged if it expires.

Settlements that are asked for while a call is under way form the next one. Confirmations, which
answers wait for, go apart from the rest: a refund may have to wait for the ledger.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace

from core import clock
from core.admission.settlement import Change, Kind, Operation, Settled, Settlement
from core.errors import StoreUnavailableError
from core.telemetry import logs

_log = logs.get_logger()

# How often reservations are looked at for renewal.
_SWEEP_S = 0.25
_BATCH = 256
# Refunds that wait for Redis; beyond that their reservations expire.
_MAX_AGAIN = 10_000
_RENEWALS = 3  # a reservation is renewed when this part of it has passed
# How often an answer that is charged as it streams tells how far it has come.
PROGRESS_S = 1.0


_UNSETTLED = (Settled.COLD, Settled.UNVERIFIED)


class ReservationLost(StoreUnavailableError):
    """Redis does not know the reservation any more, so it cannot be charged: do not serve."""


_Waiter = tuple[Operation, "asyncio.Future[None] | None"]


@dataclass(slots=True)
class _Lane:
    pending: list[_Waiter] = field(default_factory=list)
    sending: asyncio.Task[None] | None = None


@dataclass(slots=True, eq=False)
class Reservation:
    """What one admitted request has reserved."""

    id: str
    subject: str
    ms: int
    renew_at: float
    progress: Callable[[], Operation] | None = None
    """What to tell of an answer under way: a PROGRESS of this reservation."""
    progress_at: float = 0.0
    told: tuple[Change, ...] = ()


class Settler:
    """All reservations of this process. `run()` is the run of the Redis connected to, or None.

    A confirmation is waited for `timeout_s` at most: a stalled Redis must not stall answers. Nor
    does it charge later for what was not served then, given `redis_now_ms()`. `spill` writes down
    a cost that Redis does not take, False when it cannot.
    """

    def __init__(
        self,
        settlement: Settlement,
        run: Callable[[], str | None],
        timeout_s: float = 0.05,
        on_settled: Callable[[str, int], None] | None = None,
        redis_now_ms: clock.Clock | None = None,
        spill: Callable[[Operation], bool] | None = None,
    ) -> None:
        self._settlement = settlement
        self._run = run
        self._timeout_s = timeout_s
        self._on_settled = on_settled
        self._redis_now_ms = redis_now_ms
        self._spill = spill
        self._held: set[Reservation] = set()
        self._confirms, self._others = _Lane(), _Lane()
        self._again: list[Operation] = []  # refunds and costs that Redis did not take
        self._sweeper: asyncio.Task[None] | None = None

    def now_ms(self) -> int:
        """The time of Redis, as far as it is known here."""
        return clock.now_ms() if self._redis_now_ms is None else self._redis_now_ms()

    def hold(self, name: str, subject: str, ms: int) -> Reservation:
        """Registers what an admission reserved, to be renewed until it is settled."""
        held = Reservation(name, subject, ms, clock.monotonic() + ms / 1000 / _RENEWALS)
        self._held.add(held)
        self._watch()
        return held

    async def confirm(self, held: Reservation) -> None:
        """The answer is charged: durable when this returns.

        Raises:
            ReservationLost: there is nothing to charge any more.
            StoreUnavailableError: Redis did not answer; whether it is charged is not known.
        """
        self._held.discard(held)
        await self._durable(Operation(Kind.CONFIRM, held.subject, held.id))

    async def begin(self, held: Reservation, progress: Operation) -> None:
        """The answer is charged as `progress` says, whatever becomes of this process; more to come.

        Raises: as `confirm`.
        """
        await self._durable(progress)

    async def _durable(self, operation: Operation) -> None:
        if self._run() is None:
            raise StoreUnavailableError("Redis is not connected")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if self._redis_now_ms is not None:
            deadline_ms = self._redis_now_ms() + max(1, round(self._timeout_s * 1000))
            operation = replace(operation, deadline_ms=deadline_ms)
        self._queue(operation, future)
        try:
            async with asyncio.timeout(self._timeout_s):
                await future
        except TimeoutError:
            raise StoreUnavailableError("Redis took longer than the time-out") from None

    def cost(self, held: Reservation, cost: Operation) -> None:
        """What the answer cost in the end. Never waits, never fails; tried again as a refund is."""
        self._held.discard(held)
        self._queue(cost, None)

    def refund(self, held: Reservation) -> None:
        """There was nothing to charge for. Never waits, never fails.

        Tried again while Redis is away; what this process takes with it expires.
        """
        self._held.discard(held)
        self._queue(Operation(Kind.REFUND, held.subject, held.id), None)

    async def close(self) -> None:
        """Sends what waits; what is still held expires."""
        if self._sweeper is not None:
            self._sweeper.cancel()
            with suppress(asyncio.CancelledError):
                await self._sweeper
        for lane in (self._confirms, self._others):
            if lane.sending is not None:
                await lane.sending

    def _queue(self, operation: Operation, future: asyncio.Future[None] | None) -> None:
        lane = self._others if future is None else self._confirms
        lane.pending.append((operation, future))
        if lane.sending is None or lane.sending.done():
            lane.sending = asyncio.create_task(self._send(lane))

    async def _send(self, lane: _Lane) -> None:
        while lane.pending:
            batch, lane.pending = lane.pending[:_BATCH], lane.pending[_BATCH:]
            # whoever stopped waiting does not serve
            batch = [item for item in batch if item[1] is None or not item[1].done()]
            if not batch:
                continue
            error: BaseException | None = None
            found: list[Settled] = []
            run = self._run()
            try:
                if run is None:
                    raise StoreUnavailableError("Redis is not connected")
                found = await self._settlement.settle([operation for operation, _ in batch], run)
            except StoreUnavailableError as failure:
                error = failure
            except Exception as failure:
                _log.exception("settlement_failed")
                error = StoreUnavailableError(f"the settlement failed: {failure!r}")
            except BaseException:
                self._tell(batch, [], StoreUnavailableError("shutting down"))
                raise
            self._tell(batch, found, error)
            self._keep([operation for operation, _ in batch], found)

    def _keep(self, operations: list[Operation], found: list[Settled]) -> None:
        """What is to be tried again. `found` is empty when Redis did not answer."""
        kept: list[Operation] = []
        untold: set[str] = set()
        for at, operation in enumerate(operations):
            settled = found[at] if found else Settled.COLD
            if operation.kind is Kind.COST:
                if settled is Settled.GONE:
                    # Redis lost it, or it was settled already by a call whose answer was lost.
                    _log.info("cost_of_no_reservation", subject=operation.subject, id=operation.id)
                elif settled in _UNSETTLED and not (self._spill and self._spill(operation)):
                    kept.append(operation)
            elif operation.kind is Kind.REFUND and settled in _UNSETTLED:
                kept.append(operation)
            elif operation.kind is Kind.PROGRESS and settled in _UNSETTLED:
                untold.add(operation.id)
        if untold:  # an answer that has paused would not tell it again
            for held in self._held:
                if held.id in untold:
                    held.told = ()
        if kept:
            self._again = (self._again + kept)[:_MAX_AGAIN]
            self._watch()

    def _watch(self) -> None:
        if self._sweeper is None or self._sweeper.done():
            self._sweeper = asyncio.create_task(self._sweep())

    def _tell(
        self, batch: list[_Waiter], found: list[Settled], error: BaseException | None
    ) -> None:
        if self._on_settled is not None:
            for kind in {operation.kind for operation, _ in batch}:
                count = sum(operation.kind is kind for operation, _ in batch)
                self._on_settled("lost" if error else kind.name.lower(), count)
        for at, (_, future) in enumerate(batch):
            if future is None or future.done():
                continue
            if error is not None:
                future.set_exception(error)
            elif found[at] is Settled.DONE:
                future.set_result(None)
            elif found[at] is Settled.LATE:
                future.set_exception(StoreUnavailableError("Redis took longer than the time-out"))
            elif found[at] is Settled.GONE:
                future.set_exception(ReservationLost("the reservation is gone"))
            else:
                future.set_exception(StoreUnavailableError("the state cannot be restored or read"))

    async def _sweep(self) -> None:
        while self._held or self._again:
            await asyncio.sleep(_SWEEP_S)
            if self._again and self._run() is not None:
                again, self._again = self._again, []
                for operation in again:
                    self._queue(operation, None)
            now = clock.monotonic()
            for held in self._held:
                if held.progress is not None and held.progress_at <= now:
                    held.progress_at = now + PROGRESS_S
                    progress = held.progress()
                    if progress.changes != held.told or held.renew_at <= now:
                        held.told = progress.changes
                        held.renew_at = now + held.ms / 1000 / _RENEWALS
                        self._queue(progress, None)
                elif held.renew_at <= now:
                    held.renew_at = now + held.ms / 1000 / _RENEWALS
                    self._queue(Operation(Kind.RENEW, held.subject, held.id, ms=held.ms), None)
