"""What is said of states of Redis that a test cannot bring about at will."""

from __future__ import annotations

import pytest

from core.doctor.findings import Finding, Severity
from core.doctor.redis import examine

INFO = {
    "redis_version": "7.2.4",
    "role": "master",
    "loading": "0",
    "aof_enabled": "1",
    "aof_last_write_status": "ok",
    "rdb_last_bgsave_status": "ok",
    "maxmemory_policy": "noeviction",
    "maxmemory": "1000000",
    "used_memory": "1000",
}
SETTINGS = {"appendfsync": "always", "save": "", "min-replicas-to-write": "0"}


def found(info: dict[str, str], settings: dict[str, str]) -> dict[str, Finding]:
    return {item.check: item for item in examine(INFO | info, SETTINGS | settings, "some")}


def test_a_good_server_has_no_warning() -> None:
    assert all(item.severity.rank < Severity.WARNING.rank for item in found({}, {}).values())


@pytest.mark.parametrize(
    ("info", "settings", "check", "severity", "words"),
    [
        ({"loading": "1"}, {}, "redis.loading", Severity.CRITICAL, "still loading"),
        ({"redis_version": "6.0.16"}, {}, "redis.version", Severity.CRITICAL, "older than 6.2"),
        (
            {"rdb_last_bgsave_status": "err"}, {"save": "3600 1"},
            "redis.rdb_last_bgsave_status", Severity.CRITICAL, "MISCONF",
        ),
        (
            {"rdb_last_bgsave_status": "err"}, {},
            "redis.rdb_last_bgsave_status", Severity.NOTE, "all the same",
        ),
        (
            {"aof_last_bgrewrite_status": "err"}, {},
            "redis.aof_last_bgrewrite_status", Severity.NOTE, "grows",
        ),
        (
            {"aof_delayed_fsync": "7"}, {"appendfsync": "everysec"},
            "redis.appendfsync", Severity.WARNING, "7 writes waited for a slow disk",
        ),
    ],
)  # fmt: skip
def test_what_is_said(
    info: dict[str, str], settings: dict[str, str], check: str, severity: Severity, words: str
) -> None:
    item = found(info, settings)[check]
    assert item.severity is severity
    assert words in item.text
