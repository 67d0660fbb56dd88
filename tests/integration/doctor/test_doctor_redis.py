"""Real Redis and Valkey servers with every setting that loses something."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis

from core.doctor import Crash, Severity
from tests.integration.doctor.ask import diagnosed, one
from tests.support import free_port, wait_until
from tests.support.servers import redis_binaries

if TYPE_CHECKING:
    from cli.embedded import EmbeddedPostgres, EmbeddedValkey

Spoil = Callable[["redis.Redis[bytes]"], object]


@pytest.mark.parametrize(
    ("spoil", "check", "severity", "crash", "loses", "fix"),
    [
        (
            lambda r: r.config_set("appendfsync", "everysec"),
            "redis.appendfsync", Severity.WARNING, Crash.POWER,
            "at most the requests of the last 1 to 2 s", "CONFIG SET appendfsync always",
        ),
        (
            lambda r: r.config_set("appendfsync", "no"),
            "redis.appendfsync", Severity.CRITICAL, Crash.POWER,
            "about the last 30 s", "CONFIG SET appendfsync always",
        ),
        (
            lambda r: r.config_set("appendonly", "no"),
            "redis.appendonly", Severity.CRITICAL, Crash.PROCESS,
            "since the last flush to the ledger (every 1s", "CONFIG SET appendonly yes",
        ),
        (
            lambda r: r.config_set("no-appendfsync-on-rewrite", "yes"),
            "redis.no-appendfsync-on-rewrite", Severity.WARNING, Crash.POWER,
            "during a rewrite", "CONFIG SET no-appendfsync-on-rewrite no",
        ),
        (
            lambda r: (r.config_set("maxmemory", "1gb"),
                       r.config_set("maxmemory-policy", "allkeys-lfu")),
            "redis.maxmemory-policy", Severity.CRITICAL, Crash.FULL,
            "not flushed yet", "CONFIG SET maxmemory-policy noeviction",
        ),
        (
            lambda r: (r.config_set("maxmemory", "1gb"),
                       r.config_set("maxmemory-policy", "volatile-ttl")),
            "redis.maxmemory-policy", Severity.WARNING, Crash.FULL,
            "counted twice", "CONFIG SET maxmemory-policy noeviction",
        ),
        (
            lambda r: r.config_set("maxmemory-policy", "allkeys-lru"),
            "redis.maxmemory-policy", Severity.NOTE, None, "", "noeviction",
        ),
        (
            lambda r: r.config_set("maxmemory", r.info("memory")["used_memory"] + 50_000),
            "redis.maxmemory", Severity.WARNING, None, "", "CONFIG SET maxmemory <more>",
        ),
        (
            lambda r: r.config_set("min-replicas-to-write", 1),
            "redis.min-replicas-to-write", Severity.CRITICAL, None, "", "min-replicas-to-write 0",
        ),
    ],
)  # fmt: skip
def test_a_setting_that_loses_is_named_with_its_fix(
    client: redis.Redis[bytes],
    durable: EmbeddedValkey,
    ledger: EmbeddedPostgres,
    spoil: Spoil,
    check: str,
    severity: Severity,
    crash: Crash | None,
    loses: str,
    fix: str,
) -> None:
    spoil(client)
    found = diagnosed(durable.url, ledger.url)
    item = one(found, check)
    assert item.severity is severity, item
    assert fix in item.fix
    if crash is None:
        assert not item.loses
    else:
        assert loses in item.loses[crash]
    assert found.safe is (severity is Severity.NOTE)


def test_an_old_server_that_evicts(old: EmbeddedValkey, ledger: EmbeddedPostgres) -> None:
    with redis.Redis.from_url(old.url) as client:
        for number in range(4_000):
            client.set(f"filler:{number}", "x" * 2_000)
        assert client.info("stats")["evicted_keys"] > 0
    found = diagnosed(old.url, ledger.url)
    assert one(found, "redis.version").text.startswith("Redis 6.2")
    assert one(found, "redis.appendonly").severity is Severity.CRITICAL
    assert one(found, "redis.maxmemory-policy").severity is Severity.CRITICAL
    assert "keys were evicted" in one(found, "redis.evicted_keys").text
    assert not found.safe


def test_a_server_that_cannot_write_its_file(
    stop: ExitStack, home: Path, ledger: EmbeddedPostgres
) -> None:
    from cli.embedded import EmbeddedValkey

    # everysec, as `always` ends the server; the file is a device that is always full
    server = EmbeddedValkey(
        home / "full", binary=redis_binaries()["redis-6.2"], appendfsync="everysec",
        config={"appendfilename": '"full.aof"'},
    )  # fmt: skip
    server.data_dir.mkdir(parents=True)
    (server.data_dir / "full.aof").symlink_to("/dev/full")
    with server, redis.Redis.from_url(server.url) as client:
        client.set("a", 1)
        wait_until(lambda: client.info("persistence")["aof_last_write_status"] == "err")
        found = diagnosed(server.url, ledger.url)
    item = one(found, "redis.aof_last_write_status")
    assert item.severity is Severity.CRITICAL
    assert Crash.PROCESS in item.loses


def test_a_user_without_config_gets_told_what_cannot_be_known(
    client: redis.Redis[bytes], durable: EmbeddedValkey, ledger: EmbeddedPostgres
) -> None:
    client.execute_command("ACL", "SETUSER", "managed", "on", ">pw", "~*", "+@all", "-config")
    client.execute_command("ACL", "SETUSER", "bare", "on", ">pw", "~*", "+@all", "-@dangerous")
    try:
        address = f"127.0.0.1:{durable.port}/0"
        found = diagnosed(f"redis://managed:pw@{address}", ledger.url)
        item = one(found, "redis.config")
        assert item.severity is Severity.WARNING
        assert "nothing with appendfsync always, 1 to 2 s with everysec" in item.loses[Crash.POWER]
        assert "parameter group" in item.fix
        assert "+config|get" in item.fix
        assert one(found, "redis.appendonly").severity is Severity.OK  # INFO says that much
        assert not found.safe
        found = diagnosed(f"redis://bare:pw@{address}", ledger.url)
        assert "+info" in one(found, "redis.info").fix
        assert not found.safe
    finally:
        client.execute_command("ACL", "DELUSER", "managed", "bare")


def test_a_replica_and_its_master(
    client: redis.Redis[bytes], durable: EmbeddedValkey, ledger: EmbeddedPostgres, home: Path
) -> None:
    from cli.embedded import EmbeddedValkey

    password = client.connection_pool.connection_kwargs["password"]
    replica = EmbeddedValkey(
        home / "replica",
        config={"replicaof": f"127.0.0.1 {durable.port}", "masterauth": password},
    )
    with replica:
        wait_until(lambda: "online" in str(client.info("replication").get("slave0")), 30)
        item = one(diagnosed(replica.url, ledger.url), "redis.role")
        assert item.severity is Severity.CRITICAL
        assert f"point redis.url to 127.0.0.1:{durable.port}" in item.fix
        found = diagnosed(durable.url, ledger.url)
        item = one(found, "redis.min-replicas-to-write")
        assert item.severity is Severity.WARNING
        assert "without bound" in item.loses[Crash.FAILOVER]
        assert not found.safe
        client.config_set("min-replicas-to-write", 1)
        wait_until(lambda: client.info("replication")["min_slaves_good_slaves"] == 1)
        found = diagnosed(durable.url, ledger.url)
        item = one(found, "redis.min-replicas-to-write")
        assert item.severity is Severity.NOTE
        assert "last 10 s at most" in item.loses[Crash.FAILOVER]
        assert found.safe
    wait_until(lambda: client.info("replication")["connected_slaves"] == 0)


def test_a_server_in_cluster_mode(home: Path, ledger: EmbeddedPostgres) -> None:
    from cli.embedded import EmbeddedValkey

    # without a port for it, the bus takes the server's plus 10,000, which may be none
    more = {"cluster-enabled": "yes", "cluster-port": str(free_port())}
    with EmbeddedValkey(home / "cluster", config=more) as server:
        assert one(diagnosed(server.url, ledger.url), "redis.cluster").severity is Severity.WARNING
