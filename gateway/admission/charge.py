"""The charge of one request on a route that charges for its answer.

Decided when the head of the upstream's answer is there, and durable before the client sees any of
it: what is served is charged, and what is charged is served.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from core.errors import StoreUnavailableError
from gateway.admission.settler import Reservation, ReservationLost, Settler
from gateway.outage.decide import Outage
from gateway.outage.entries import confirmed

if TYPE_CHECKING:
    from gateway.cost.tap import Cost, Tap


class Charge:
    """`charged` are the statuses that are paid for, None all. One of `reservation` and `entry`."""

    __slots__ = ("_charged", "_entry", "_outage", "_reservation", "_settler")

    def __init__(
        self,
        settler: Settler,
        outage: Outage,
        charged: frozenset[int] | None,
        reservation: Reservation | None,
        entry: bytes,
    ) -> None:
        self._settler = settler
        self._outage = outage
        self._charged = charged
        self._reservation = reservation
        self._entry = entry

    costs: Sequence[Cost] = ()
    """What the meters were charged of which the answer decides the cost, once it has."""

    def tap(self, request_id: str) -> Tap | None:
        """What is to read the answer; None where that does not decide the cost."""
        del request_id
        return None

    async def answered(self, status: int) -> None:
        """The upstream has answered; nothing of it has been passed on.

        Raises:
            StoreUnavailableError: the charge could not be made durable: do not serve.
        """
        paid = self._charged is None or status in self._charged
        if not paid:
            self.give_back()
            return
        held, self._reservation = self._reservation, None
        entry, self._entry = self._entry, b""
        if held is not None:
            try:
                await self._confirm(held)
            except ReservationLost:
                raise  # a state that was lost or restored: there is nothing to confirm later either
            except BaseException:  # also where the worker ends while this waits
                self._settler.refund(held)  # it is not served
                raise
        elif entry:
            await self._outage.write(entry)

    async def _confirm(self, held: Reservation) -> None:
        try:
            await self._settler.confirm(held)
        except ReservationLost:
            raise
        except StoreUnavailableError:
            await self._outage.write(confirmed(held.subject, held.id))

    def give_back(self) -> None:
        """There is no answer to charge for; nothing to do once it was charged."""
        self._entry = b""
        if self._reservation is not None:
            self._settler.refund(self._reservation)
            self._reservation = None
