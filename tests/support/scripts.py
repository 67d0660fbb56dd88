"""Runs the real Lua scripts on a real server, with the clock of the scripts under control."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import redis

from core.admission.program import Program, Verdict
from core.admission.settlement import Kind
from core.keyspace import Keyspace
from core.period import billing_period, calendar_bounds
from core.policy import Plan
from core.redis.scripts import make, render

# The same scripts with the server's clock replaced by a key that the test sets.
TEST_CLOCK = """
local function now_micros() return tonumber(redis.call('GET', 'test:clock')) end
"""

# What the states are verified in, unless a test says otherwise.
RUN = "run"


@dataclass
class Answer:
    """One limit's answer."""

    flags: int
    remaining: int
    reset_ms: int


@dataclass
class Outcome:
    status: Verdict
    limits: list[Answer] = field(default_factory=list)

    @property
    def admitted(self) -> bool:
        return self.status is Verdict.ADMIT


class Scripts:
    """A synchronous caller of the scripts with a settable clock."""

    def __init__(self, url: str, *, controlled: bool = True) -> None:
        self.redis = redis.Redis.from_url(url, decode_responses=True)
        replace = {"includes/clock.lua": TEST_CLOCK} if controlled else None
        self.scripts = {
            name: make(name, render(name, replace))
            for name in ("admit", "release", "seed", "acknowledge", "settle", "evict", "roll")
        }
        for script in self.scripts.values():
            self.redis.script_load(script.source)
        self.keyspace = Keyspace()
        self._lease = count()
        self.now_us = 0
        self.run = RUN
        self._batch = 0

    def at(self, now_us: int) -> None:
        """Sets the scripts' clock."""
        self.now_us = now_us
        self.redis.set("test:clock", now_us)

    @property
    def now_ms(self) -> int:
        return self.now_us // 1000

    def seed(
        self,
        subject: str,
        fields: Mapping[str, str | int] | None = None,
        *,
        expected: str = "",
        epoch: int = 1,
        version: int = 0,
        run: str = RUN,
        mode: str = "",
        claim: str = "",
    ) -> int:
        pairs: list[str | int] = []
        for name, value in (fields or {}).items():
            pairs += (name, value)
        script = self.scripts["seed"]
        key = self.keyspace.state(subject)
        keys = [key, self.keyspace.claim(subject), self.keyspace.idle(0)]
        answer = self.redis.evalsha(
            script.sha, 3, *keys, expected, epoch, version, run, mode, claim, *pairs
        )
        assert isinstance(answer, int)
        return answer

    def admit(
        self,
        subject: str,
        program: Program,
        *,
        span: tuple[int, int] | None = None,
        anchor_ms: int = 0,
        interval: int = 1,
        lease: str | None = None,
        event: str = "",
    ) -> Outcome:
        """One check, alone in its batch; `lease` is the text of the usage event `event`."""
        return self.batch(
            [(subject, program)],
            span=span,
            anchor_ms=anchor_ms,
            interval=interval,
            leases=[lease] if lease else None,
            events=[event] if event else None,
        )[0]

    def batch(
        self,
        checks: Sequence[tuple[str, Program]],
        *,
        span: tuple[int, int] | None = None,
        anchor_ms: int = 0,
        interval: int = 1,
        leases: Sequence[str] | None = None,
        events: Sequence[str] | None = None,
        calendar: Sequence[int] | None = None,
        deadline: int | None = None,
    ) -> list[Outcome]:
        span = span or billing_period(anchor_ms, interval, self.now_ms)
        keyspace = self.keyspace
        keys = [keyspace.dirty(0), keyspace.events(0), keyspace.due(0)]
        keys += [keyspace.sender(0, "test"), keyspace.ingested(0)]
        self._batch += 1
        programs: list[Program] = []
        arguments: list[str | int] = []
        for position, (subject, program) in enumerate(checks):
            if program not in programs:
                programs.append(program)
            keys.append(self.keyspace.state(subject))
            keys += [self.keyspace.leases(subject, name) for name in program.lease_limits]
            if events:
                keys.append(keyspace.event(subject, events[position]))
            lease = leases[position] if leases else f"lease-{next(self._lease)}"
            last = lease if program.single else 1
            arguments += (programs.index(program) + 1, *span, last)
        script = self.scripts["admit"]
        reply = self.redis.evalsha(
            script.sha,
            len(keys),
            *keys,
            len(programs),
            *(calendar or calendar_bounds(self.now_ms)),
            deadline or 2**52,
            self.run,
            self._batch,
            *(program.text for program in programs),
            *arguments,
        )
        assert isinstance(reply, list)
        outcomes, at = [], 1
        for _, program in checks:
            outcome = Outcome(Verdict(reply[at]))
            at += 1
            if outcome.status in (Verdict.ADMIT, Verdict.REJECT):
                for _ in program.limits:
                    outcome.limits.append(Answer(*reply[at : at + 3]))
                    at += 3
            outcomes.append(outcome)
        assert at == len(reply)
        return outcomes

    def settle(
        self, *operations: tuple[Any, ...], sender: str = "", number: int | str = "", run: str = RUN
    ) -> list[int]:
        """Operations of (kind, subject, id, numbers...); see core.admission.settlement."""
        keys = [self.keyspace.dirty(0), self.keyspace.due(0), self.keyspace.sender(0, sender)]
        keys.append(self.keyspace.events(0))
        arguments: list[str | int] = [run, number]
        for kind, subject, name, *numbers in operations:
            keys.append(self.keyspace.state(subject))
            arguments += (int(Kind[kind.upper()]), name, len(numbers), *numbers)
        script = self.scripts["settle"]
        answer = self.redis.evalsha(script.sha, len(keys), *keys, *arguments)
        assert isinstance(answer, list)
        return answer

    def state(self, subject: str) -> dict[str, str]:
        found = self.redis.hgetall(self.keyspace.state(subject))
        assert isinstance(found, dict)
        return found

    def events(self) -> list[dict[str, str]]:
        return [fields for _, fields in self.redis.xrange(self.keyspace.events(0))]


def plan_of(*limits: object, name: str = "plan", interval: int = 1) -> Plan:
    """A plan with just these limits."""
    return Plan(name, tuple(limits), interval)  # type: ignore[arg-type]
