"""What a diagnosis consists of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Severity(StrEnum):
    """How bad a finding is, ascending."""

    OK = "ok"
    NOTE = "note"  # worth knowing; no guarantee depends on it
    WARNING = "warning"  # a guarantee does not hold in some crash, or cannot be verified
    CRITICAL = "critical"  # counts are being lost, will be in a common crash, or nothing is served

    @property
    def rank(self) -> int:
        return list(Severity).index(self)


class Crash(StrEnum):
    """What may happen to a store."""

    PROCESS = "process crash"
    POWER = "machine crash or power loss"
    DISK = "disk loss"
    FAILOVER = "failover"
    FULL = "memory full"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        check: identifies it for machines, such as `redis.appendfsync`.
        text: what it is, in a sentence.
        loses: what would be lost, by crash; empty when this loses nothing.
        fix: the command or setting that mends it; '' when nothing is to be done.
    """

    check: str
    severity: Severity
    text: str
    loses: Mapping[Crash, str] = field(default_factory=dict)
    fix: str = ""

    @property
    def area(self) -> str:
        """redis, postgres or config."""
        return self.check.partition(".")[0]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """All findings: Redis', Postgres', the configuration's."""

    findings: tuple[Finding, ...]

    @property
    def severity(self) -> Severity:
        """The worst one."""
        return max((item.severity for item in self.findings), key=lambda s: s.rank)

    @property
    def safe(self) -> bool:
        """Whether nothing can be lost that the guarantees cover, as far as can be known."""
        return self.severity.rank < Severity.WARNING.rank


def ok(check: str, text: str) -> Finding:
    return Finding(check, Severity.OK, text)
