"""The answer to a client that goes on although it was refused: made once, repeated cheaply.

Between two of its answers only the ids differ, until a whole second of a reset has passed.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from gateway.answers import problems
from gateway.answers.headers import SERVER, Headers
from gateway.answers.verdict import LimitState

_REQUEST, _DECISION = "@request@", "@decision@"


class RepeatedRefusal:
    """Attributes:
    headers: of every repetition, but for X-Request-Id.
    names: the limits that refuse, for the log.
    reasons: how many they are.
    """

    __slots__ = ("_parts", "headers", "names", "reasons")

    def __init__(self, states: Sequence[LimitState], limit_headers: Headers) -> None:
        problem = problems.quota_exceeded(
            states, request_id=_REQUEST, decision_id=_DECISION, limit_headers=limit_headers
        )
        before, _, rest = problem.body.partition(orjson.dumps(_REQUEST))
        between, _, after = rest.partition(orjson.dumps(_DECISION))
        self._parts = before, between, after
        self.headers = [*problem.headers, SERVER]
        refusing = [state.name for state in states if not state.allowed]
        self.names = ",".join(refusing)
        self.reasons = len(refusing)

    def body(self, request_id: str, decision_id: str) -> bytes:
        before, between, after = self._parts
        return b"%b%b%b%b%b" % (
            before, orjson.dumps(request_id), between, orjson.dumps(decision_id), after,
        )  # fmt: skip


def holds_s(states: Sequence[LimitState]) -> float:
    """For how many seconds an answer about these states stays true to the second."""
    return min(((state.reset_ms - 1) % 1000 + 1) / 1000 for state in states if state.reset_ms)
