"""Subjects that are known to be refused until some time: asking Redis again would tell nothing new.

What a limit refused stays refused until its reset, unless something is given back or raised. So a
refusal is repeated from here, for `MAX_S` at most: a client that does not stop costs Redis nothing,
and what was raised or given back is noticed within that time. A new configuration or another plan
has other admissions, and with them empty lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from core import clock
from core.admission.program import REFUSED
from gateway.answers.verdict import Policy

# How late something that was given back may be noticed.
MAX_S: Final = 0.5
# Less is not worth remembering.
_MIN_S: Final = 0.002
_MAX_SUBJECTS: Final = 10_000


class Refused:
    """What Redis answered to a subject, and for how long it would answer the same.

    Attributes:
        until: monotonic seconds.
        rendered: the answer to the client, kept here by whoever made it, with how long it holds.
    """

    __slots__ = ("_asked", "_numbers", "rendered", "rendered_until", "until")

    def __init__(self, numbers: Sequence[int], asked: float, until: float) -> None:
        self._numbers = numbers
        self._asked = asked  # monotonic seconds, before Redis decided
        self.until = until
        self.rendered: object = None
        self.rendered_until = 0.0

    def numbers(self, now: float) -> Sequence[int]:
        """The answer that Redis would give at `now`, monotonic seconds."""
        passed_ms = int((now - self._asked) * 1000)
        numbers = list(self._numbers)
        numbers[0] += passed_ms
        for at in range(4, len(numbers), 3):
            if numbers[at]:
                numbers[at] = max(1, numbers[at] - passed_ms)
        return numbers


class Blocked:
    """The refused subjects of one plan on one route."""

    __slots__ = ("_refusals",)

    def __init__(self) -> None:
        self._refusals: dict[str, Refused] = {}

    def __bool__(self) -> bool:
        return bool(self._refusals)

    def remember(
        self, subject: str, numbers: Sequence[int], policies: Sequence[Policy], asked: float
    ) -> None:
        """`numbers` is Redis' answer to what was asked at `asked`, in monotonic seconds.

        A concurrency slot may come free at any time: who lacks one is not remembered.
        """
        resets = [0]
        for n, policy in enumerate(policies):
            if policy.enforce and numbers[3 * n + 2] == REFUSED:
                if policy.static[1] == "concurrency":
                    return
                resets.append(numbers[3 * n + 4])
        seconds = min(max(resets) / 1000, MAX_S)
        if seconds < _MIN_S:
            return
        if len(self._refusals) >= _MAX_SUBJECTS:
            del self._refusals[next(iter(self._refusals))]
        self._refusals[subject] = Refused(numbers, asked, asked + seconds)

    def find(self, subject: str) -> Refused | None:
        """What refuses a subject now, or None where Redis has to be asked."""
        refused = self._refusals.get(subject)
        if refused is not None and clock.monotonic() >= refused.until:
            del self._refusals[subject]
            return None
        return refused
