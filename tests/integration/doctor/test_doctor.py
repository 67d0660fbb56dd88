"""`tallygate doctor` on real servers with every setting that loses something."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import asyncpg
import pytest
import redis
from click.testing import CliRunner

from core.config import Snapshot, loads
from core.doctor import Crash, Diagnosis, Finding, Severity, diagnose
from tests.support import free_port, wait_until
from tests.support.servers import redis_binaries, server_directory

if TYPE_CHECKING:
    from cli.embedded import EmbeddedPostgres, EmbeddedValkey

CONFIG = """
gateway: {workers: 2}
upstreams: {api: {urls: [http://127.0.0.1:1]}}
routes: [{match: {path: /*}, upstream: api}]
plans: {free: {limits: {per_second: {rate: 10/s}}}}
"""


@pytest.fixture(scope="module")
def stop() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
def home(stop: ExitStack) -> Path:
    return stop.enter_context(server_directory())


@pytest.fixture(scope="module")
def durable(stop: ExitStack, home: Path) -> EmbeddedValkey:
    """A Valkey as it should be."""
    from cli.embedded import EmbeddedValkey

    return stop.enter_context(EmbeddedValkey(home / "durable"))


@pytest.fixture(scope="module")
def old(stop: ExitStack, home: Path) -> EmbeddedValkey:
    """A Redis 6.2 that loses: no file, snapshots, a small memory that evicts."""
    from cli.embedded import EmbeddedValkey

    server = EmbeddedValkey(
        home / "old",
        binary=redis_binaries()["redis-6.2"],
        config={
            "appendonly": "no",
            "save": "3600 1",
            "maxmemory": "8mb",
            "maxmemory-policy": "allkeys-lru",
        },
    )
    return stop.enter_context(server)


@pytest.fixture(scope="module")
def ledger(stop: ExitStack, home: Path) -> EmbeddedPostgres:
    """A Postgres as it should be, up to date."""
    from cli.embedded import EmbeddedPostgres
    from core.db import migrate

    server = stop.enter_context(EmbeddedPostgres(home / "ledger"))
    asyncio.run(migrate(server.url))
    return server


@pytest.fixture
def client(durable: EmbeddedValkey) -> Iterator[redis.Redis[bytes]]:
    """The durable server; settings that the test changes are put back."""
    names = ("appendonly", "appendfsync", "maxmemory", "maxmemory-policy", "save",
             "no-appendfsync-on-rewrite", "min-replicas-to-write")  # fmt: skip
    with redis.Redis.from_url(durable.url) as connection:
        before = {name: value for n in names for name, value in connection.config_get(n).items()}
        yield connection
        for name, value in before.items():
            connection.config_set(name, value)


def snapshot(text: str = CONFIG) -> Snapshot:
    return loads(text, env={})


def diagnosed(redis_url: str, postgres_url: str, config: str = CONFIG) -> Diagnosis:
    return asyncio.run(diagnose(snapshot(config), redis_url, postgres_url))


def one(found: Diagnosis, check: str) -> Finding:
    matching = [item for item in found.findings if item.check == check]
    assert len(matching) == 1, [item.check for item in found.findings]
    return matching[0]


def run(*words: str, **env: str) -> tuple[int, str, str]:
    from cli.main import main

    done = CliRunner().invoke(main, ["doctor", *words], env=env)
    return done.exit_code, done.stdout, done.stderr


def test_servers_as_they_should_be_lose_nothing(
    durable: EmbeddedValkey, ledger: EmbeddedPostgres, tmp_path: Path
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    env = {"TALLYGATE_REDIS_URL": durable.url, "TALLYGATE_POSTGRES_URL": ledger.url}
    status, out, err = run("--config", str(path), **env)
    assert (status, err) == (0, "")
    assert "Nothing is lost when a process or a machine crashes" in out
    assert "appendfsync always" in out
    assert "Redis, disk loss: what was counted since the last flush" in out
    status, out, _ = run("--config", str(path), "--json", **env)
    report = json.loads(out)
    assert (status, report["safe"], report["severity"]) == (0, True, "note")
    assert {item["check"] for item in report["findings"] if item["severity"] != "ok"} == {
        "redis.maxmemory", "redis.replicas", "postgres.standbys",
    }  # fmt: skip
    for item in report["findings"]:
        assert not {"process crash", "machine crash or power loss"} & item["loses"].keys()


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


async def _execute(url: str, *statements: str) -> None:
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            await connection.execute(statement)
    finally:
        await connection.close()


def test_postgres_that_does_not_wait_for_its_disk(durable: EmbeddedValkey, database: str) -> None:
    found = diagnosed(durable.url, database)  # the tests' server runs without any fsync
    for check in ("postgres.fsync", "postgres.synchronous_commit"):
        item = one(found, check)
        assert (item.severity, Crash.POWER in item.loses) == (Severity.CRITICAL, True)
        assert "ALTER SYSTEM SET" in item.fix
    assert one(found, "postgres.full_page_writes").severity is Severity.WARNING
    assert one(found, "postgres.schema").severity is Severity.OK
    assert not found.safe


def test_postgres_that_takes_no_writes(durable: EmbeddedValkey, ledger: EmbeddedPostgres) -> None:
    name = "ALTER DATABASE tallygate"
    asyncio.run(_execute(ledger.url, f"{name} SET default_transaction_read_only = on"))
    try:
        found = diagnosed(durable.url, ledger.url)
        assert one(found, "postgres.default_transaction_read_only").severity is Severity.CRITICAL
    finally:
        words = ("SET default_transaction_read_only = off", f"{name} RESET ALL")
        asyncio.run(_execute(ledger.url, *words))
    # commits that wait for nobody although a standby is named
    asyncio.run(
        _execute(
            ledger.url,
            "SET synchronous_commit = local",
            "ALTER SYSTEM SET synchronous_standby_names = 'other'",
            f"{name} SET synchronous_commit = local",
            "SELECT pg_reload_conf()",
        )
    )
    try:
        # a reload takes effect a moment later
        item = wait_until(
            lambda: one(diagnosed(durable.url, ledger.url), "postgres.synchronous_standby_names")
        )
        assert Crash.FAILOVER in item.loses
        assert item.severity is Severity.WARNING
    finally:
        asyncio.run(
            _execute(
                ledger.url,
                "ALTER SYSTEM RESET synchronous_standby_names",
                "SELECT pg_reload_conf()",
                f"{name} RESET ALL",
            )
        )


def test_a_standby_and_its_primary(durable: EmbeddedValkey, server_dir: Path) -> None:
    from cli.embedded import EmbeddedPostgres
    from core.db import migrate

    primary = EmbeddedPostgres(server_dir / "primary", fast=True)
    with primary:
        asyncio.run(migrate(primary.url))
    # a copy of the stopped server, owners and all, is a base backup
    subprocess.run(["cp", "-a", server_dir / "primary", server_dir / "standby"], check=True)
    (server_dir / "standby" / "data" / "standby.signal").touch()
    with primary:
        standby = EmbeddedPostgres(
            server_dir / "standby", fast=True, config={"primary_conninfo": primary.url}
        )
        with standby:
            item = one(diagnosed(durable.url, standby.url), "postgres.standby")
            assert item.severity is Severity.CRITICAL
            assert "target_session_attrs" in item.fix
            item = wait_until(
                lambda: one(
                    diagnosed(durable.url, primary.url), "postgres.synchronous_standby_names"
                ),
                30,
                what="replication",
            )
            assert item.severity is Severity.WARNING
            assert "1 standbys, and no commit waits for one" in item.text
            assert Crash.FAILOVER in item.loses


@pytest.mark.parametrize(
    ("statement", "text", "fix"),
    [
        ("DROP TABLE schema_migrations", "empty", "tallygate migrate"),
        ("DELETE FROM schema_migrations WHERE version > 1", "0001", "tallygate migrate"),
        ("INSERT INTO schema_migrations VALUES (9999, 'x', '')", "newer", "newer version"),
    ],
)
def test_a_schema_of_another_version(
    durable: EmbeddedValkey, database: str, statement: str, text: str, fix: str
) -> None:
    asyncio.run(_execute(database, statement))
    item = one(diagnosed(durable.url, database), "postgres.schema")
    assert item.severity is Severity.CRITICAL
    assert text in item.text
    assert fix in item.fix


def test_more_connections_than_postgres_has(
    durable: EmbeddedValkey, ledger: EmbeddedPostgres
) -> None:
    many = CONFIG.replace("workers: 2", "workers: 20") + "\npostgres: {pool: 10}\n"
    found = diagnosed(durable.url, ledger.url, many)
    item = one(found, "postgres.max_connections")
    assert "may open 240 connections and the server has 97" in item.text
    assert (item.severity, found.safe) == (Severity.NOTE, True)


def test_stores_that_are_away_are_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    status, out, _ = run(
        "--config", str(path),
        TALLYGATE_REDIS_URL=f"redis://127.0.0.1:{free_port()}",
        TALLYGATE_POSTGRES_URL=f"postgresql://x@127.0.0.1:{free_port()}/x",
    )  # fmt: skip
    assert status == 1
    assert "Redis could not be reached" in out
    assert "Postgres could not be reached" in out


def test_wrong_usage_and_a_wrong_configuration_are_told_apart(tmp_path: Path) -> None:
    assert run("--nonsense")[0] == 2
    path = tmp_path / "config.yaml"
    path.write_text("plans: 1\n")
    status, _, err = run("--config", str(path))
    assert status == 2
    assert "plans" in err


@pytest.mark.parametrize("mode", ["open", "local"])
def test_a_spool_must_be_on_a_disk(
    durable: EmbeddedValkey, ledger: EmbeddedPostgres, tmp_path: Path, mode: str
) -> None:
    def config(spool: Path, more: str = "") -> str:
        return (
            CONFIG.replace("workers: 2", f"workers: 2, outage: {{spool_dir: '{spool}'{more}}}")
        ).replace("upstream: api", f"upstream: api, outage: {mode}")

    memory = Path("/dev/shm")
    if memory.is_dir():
        item = one(diagnosed(durable.url, ledger.url, config(memory / "spool")), "config.spool_dir")
        assert item.severity is Severity.CRITICAL
        assert "in memory (tmpfs)" in item.text
        assert Crash.POWER in item.loses
    found = diagnosed(durable.url, ledger.url, config(tmp_path / "spool"))
    assert "in memory" not in one(found, "config.spool_dir").text
    assert one(found, f"config.outage.{mode}").severity is Severity.NOTE
    file = tmp_path / "file"
    file.touch()
    item = one(diagnosed(durable.url, ledger.url, config(file / "spool")), "config.spool_dir")
    assert item.severity is Severity.WARNING
    found = diagnosed(durable.url, ledger.url, config(tmp_path, ", spool_max: 1000000GiB"))
    assert "make room" in one(found, "config.spool_max").fix
