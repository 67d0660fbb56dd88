"""What an answer says of its own cost, read as it passes.

The relay tells a tap the head, each piece of body, and the end once the answer has come to it;
nothing is held back for it and nothing is changed but headers that are stripped. Held are a body up
to `limit` where a field of it is the cost, one event of a stream, and numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from time import monotonic_ns
from typing import Any, Final, NamedTuple

from core.cost import ActualCost, Kept, OnAbort
from gateway.cost.fields import MISSING, extract
from gateway.cost.sse import SseReader

Header = tuple[bytes, bytes]

_EVENT_STREAM: Final = b"text/event-stream"
_PLAIN: Final = (b"", b"identity")


class CostRules:
    """The costs of a route that its answers decide, compiled.

    Attributes:
        identity: whether the upstream must be asked for bodies without compression.
    """

    __slots__ = (
        "actual",
        "headers",
        "identity",
        "json",
        "limit",
        "sse",
        "streamed",
        "stripped",
        "timed",
    )

    def __init__(self, actual: Sequence[ActualCost]) -> None:
        self.actual = tuple(actual)
        self.headers = frozenset(rule.header.encode() for rule in actual if rule.header)
        self.stripped = frozenset(
            rule.header.encode() for rule in actual if rule.header and rule.strip
        )
        self.json = [rule for rule in actual if rule.json]
        self.sse = [rule for rule in actual if rule.sse]
        self.limit = max((rule.limit for rule in actual), default=0)
        self.identity = bool(self.json or self.sse)
        self.streamed = [rule for rule in actual if rule.on_abort is OnAbort.STREAMED]
        self.timed = any(rule.ms_per for rule in actual)


class Cost(NamedTuple):
    """What one meter is charged in the end. `result`: actual, kept_<reason>, aborted_<rule>."""

    rule: ActualCost
    units: int
    result: str


class Tap:
    """One answer; `ended` is called when it has come to its end."""

    __slots__ = (
        "_body",
        "_encoded",
        "_headers",
        "_held",
        "_over",
        "_rules",
        "_size",
        "_sse",
        "_started_ns",
        "answered",
        "ended",
    )

    def __init__(self, rules: CostRules, ended: Callable[[], None]) -> None:
        self._rules = rules
        self._started_ns = monotonic_ns() if rules.timed else 0
        self._headers: dict[bytes, str | None] = {}  # None when it came twice
        self._size = 0
        self._encoded = False
        self._body: list[bytes] | None = None
        self._held = 0
        self._over = False
        self._sse: SseReader | None = None
        self.answered = False
        self.ended = ended

    def head(self, status: int, headers: list[Header]) -> list[Header]:
        """The head of the final answer; returns the headers to pass on."""
        del status  # what is paid for by status is decided elsewhere
        self.answered = True
        rules = self._rules
        if rules.identity:
            kind = encoding = b""
            for name, value in headers:
                if name == b"content-type":
                    kind = value
                elif name == b"content-encoding":
                    encoding = value
            self._encoded = encoding.strip().lower() not in _PLAIN
            if self._encoded:
                pass
            elif kind.partition(b";")[0].strip().lower() == _EVENT_STREAM:
                if rules.sse:
                    self._sse = SseReader([rule.sse for rule in rules.sse], rules.limit)
            elif rules.json:
                self._body = []
        return self._read(headers)

    def trailers(self, headers: list[Header]) -> list[Header]:
        """The trailers, if any; returns those to pass on."""
        return self._read(headers)

    def piece(self, data: bytes) -> None:
        """The next bytes of the body, framing removed."""
        self._size += len(data)
        if self._sse is not None:
            self._sse.feed(data)
        elif self._body is not None:
            self._held += len(data)
            if self._held <= self._rules.limit:
                self._body.append(data)
            else:
                self._over = True
                self._body = None

    def end(self) -> None:
        """The upstream's answer was whole, and was passed on. Not called of one that was cut."""
        self.ended()

    def _read(self, headers: list[Header]) -> list[Header]:
        wanted = self._rules.headers
        if not wanted:
            return headers
        for name, value in headers:
            if name in wanted:
                known = name in self._headers
                self._headers[name] = None if known else value.decode("latin-1")
        stripped = self._rules.stripped
        return [pair for pair in headers if pair[0] not in stripped] if stripped else headers

    # What it came to

    def costs(self, complete: bool) -> list[Cost]:
        """The cost of each meter, once there is no more to come."""
        sse = self._sse
        if sse is not None:
            if complete:
                sse.end()
            # All is there, and said to be: whether the last bytes arrived does not matter.
            complete = complete or sse.done
        if not complete:
            return [self._aborted(rule) for rule in self._rules.actual]
        fields = self._fields()
        return [self._whole(rule, fields) for rule in self._rules.actual]

    def streamed(self) -> list[tuple[ActualCost, int]]:
        """What would be charged of meters whose rule is `streamed`, were the answer cut here."""
        return [(rule, self._so_far(rule)) for rule in self._rules.streamed]

    @property
    def streams(self) -> bool:
        """Whether any meter's rule is `streamed`."""
        return bool(self._rules.streamed)

    def _whole(self, rule: ActualCost, fields: dict[str, Any]) -> Cost:
        if rule.bytes_per or rule.ms_per:
            return Cost(rule, self._measured(rule), "actual")
        found = self._header(rule) if rule.header else self._field(rule, fields)
        if isinstance(found, Kept):
            return Cost(rule, rule.estimate, f"kept_{found}")
        return Cost(rule, found, "actual")

    def _aborted(self, rule: ActualCost) -> Cost:
        units = rule.estimate
        if rule.on_abort is OnAbort.NOTHING:
            units = 0
        elif rule.on_abort is OnAbort.STREAMED:
            units = self._so_far(rule)
        return Cost(rule, units, f"aborted_{rule.on_abort}")

    def _so_far(self, rule: ActualCost) -> int:
        if not self.answered:
            return 0
        if rule.bytes_per or rule.ms_per:
            return self._measured(rule)
        if rule.header:
            found = self._header(rule)
        elif self._sse is not None:
            at = self._rules.sse.index(rule)
            value = self._sse.values[at]
            total = 0 if value is MISSING else rule.reported(value)
            if isinstance(total, Kept):
                return rule.estimate
            return min(total + self._sse.since[at] * rule.per_event, rule.most)
        else:
            return rule.estimate
        return rule.estimate if isinstance(found, Kept) else found

    def _measured(self, rule: ActualCost) -> int:
        micros = (monotonic_ns() - self._started_ns) // 1000 if rule.ms_per else 0
        return rule.measured(self._size, micros)

    def _header(self, rule: ActualCost) -> int | Kept:
        name = rule.header.encode()
        if name not in self._headers:
            return Kept.MISSING
        text = self._headers[name]
        return Kept.INVALID if text is None else rule.reported(text)

    def _fields(self) -> dict[str, Any]:
        """By meter, what a JSON body has at the paths of the rules that read one."""
        body, rules = self._body, self._rules.json
        if not body:
            return {}
        data = body[0] if len(body) == 1 else b"".join(body)
        found = extract(data, [rule.json for rule in rules])
        values = [Kept.INVALID] * len(rules) if found is None else found
        return dict(zip((rule.meter for rule in rules), values, strict=True))

    def _field(self, rule: ActualCost, fields: dict[str, Any]) -> int | Kept:
        if self._encoded:
            return Kept.ENCODED
        value = fields.get(rule.meter, MISSING)
        too_long = self._over
        if self._sse is not None:
            if rule not in self._rules.sse:
                return Kept.MISSING
            value = self._sse.values[self._rules.sse.index(rule)]
            too_long = self._sse.too_long
        if isinstance(value, Kept):
            return value
        if value is MISSING:
            return Kept.TOO_LONG if too_long else Kept.MISSING
        return rule.reported(value)
