"""`tallygate up` with nothing replaced: what it prints works, and what it counted is never lost."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import asyncpg
import httpx
import psutil
import pytest

from tests.support import Process, free_port, wait_until
from tests.support.processes import ROOT

# Set by the caller's shell or not, `up` starts from nothing here.
CLEAN: dict[str, str | None] = {
    "TALLYGATE_REDIS_URL": None,
    "TALLYGATE_POSTGRES_URL": None,
    "TALLYGATE_KEY_PEPPER": None,
    "TALLYGATE_DEMO_UPSTREAM": None,
    "TALLYGATE_METRICS_DIR": None,
    "TALLYGATE_SPOOL_DIR": None,
}
# No word about stores or secrets, and a limit that no test reaches.
PLAIN = """
gateway: {workers: 2}
redis: {timeout: 5s}
upstreams: {demo: {urls: ["${TALLYGATE_DEMO_UPSTREAM}"]}}
routes: [{match: {path: /*}, upstream: demo}]
plans: {pro: {limits: {monthly: {period: billing, limit: 1_000_000_000}}}}
"""
CLIENTS = 8


class Up(Process):
    """`tallygate up` in `home` on free ports, ready."""

    def __init__(self, home: Path, env: dict[str, str | None] | None = None) -> None:
        self.home = home
        argv = [sys.executable, "-m", "cli.main", "up"]
        argv += [f"--gateway-port={free_port()}", f"--control-port={free_port()}"]
        super().__init__(argv, env={**CLEAN, **(env or {})}, cwd=home)
        try:
            self.wait_for_output("Ctrl-C stops everything", 60)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def found(self, pattern: str) -> str:
        match = re.search(pattern, self.output, re.MULTILINE)
        assert match, self.output
        return match[1]

    def key(self, plan: str) -> str:
        return self.found(rf"^  sub_demo_{plan} +{plan} +(tg_live_\w+)$")

    def url(self) -> str:
        return self.found(r"^  gateway +(http://\S+)")

    def curls(self) -> list[str]:
        return re.findall(r"^  (curl .*)$", self.output, re.MULTILINE)

    def everyone(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)


def tallygate(home: Path, *words: str) -> str:
    """A command in a second terminal: same directory, no variable set."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TALLYGATE_")}
    done = subprocess.run(
        [sys.executable, "-m", "cli.main", *words],
        cwd=home,
        env={**env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(curl: str) -> str:
    done = subprocess.run(
        ["sh", "-c", curl], capture_output=True, text=True, timeout=30, check=True
    )
    return done.stdout


def ledger(home: Path, subscription: str) -> int:
    """Requests in the ledger's periods."""
    env = json.loads((home / ".tallygate" / "env.json").read_text())

    async def read() -> int:
        connection = await asyncpg.connect(env["TALLYGATE_POSTGRES_URL"])
        try:
            total = await connection.fetchval(
                "SELECT coalesce(sum(total), 0) FROM ledger_periods "
                "WHERE subject = $1 AND meter = 'requests'",
                subscription,
            )
            return int(total)
        finally:
            await connection.close()

    return asyncio.run(read())


def still(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [
        process
        for process in processes
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    ]


@pytest.fixture
def home(server_dir: Path) -> Path:
    # The config that comes with tallygate, but with time for a machine that is busy with tests.
    text = (ROOT / "config.yaml").read_text()
    patient = re.sub(r"^  timeout: 50ms ", "  timeout: 5s ", text, flags=re.MULTILINE)
    assert patient != text
    (server_dir / "config.yaml").write_text(patient)
    return server_dir


@pytest.mark.skipif(shutil.which("curl") is None, reason="the printed lines are for curl")
def test_what_it_prints_works_and_is_still_known_after_a_restart(home: Path) -> None:
    with Up(home) as up:
        answer, headers, burst = up.curls()
        assert "celsius" in run(answer)
        assert run(headers).startswith("HTTP/1.1 200")
        assert re.search(r'^ratelimit: "per_second";r=\d+;t=\d+', run(headers), re.MULTILINE)
        assert "ratelimit-policy" in run(headers).lower()
        codes = run(burst).split()
        assert codes[0] == "200"
        assert codes[-1] == "429"
        counted = 4 + codes.count("200")

        env = home / ".tallygate" / "env.json"
        assert stat.S_IMODE(env.stat().st_mode) == 0o600
        wait_until(lambda: ledger(home, "sub_demo_free") == counted, 10, "the flush")
        words = ("usage", "--subscription=sub_demo_free", "--json")
        shown = json.loads(tallygate(home, *words))
        assert [row["total"] for row in shown["meters"] if row["meter"] == "requests"] == [
            str(counted)
        ]
        usage = up.found(r"^  tallygate (usage .*)$")
        assert "up to date with Redis" in tallygate(home, *usage.split())
        assert "sub_demo_free" in tallygate(home, "subscriptions", "list")
        assert tallygate(home, "migrate") == "nothing to apply\n"
        assert json.loads(tallygate(home, "doctor", "--json"))["safe"]
        assert tallygate(home, "audit").endswith("No drift.\n")
        rows = json.loads(tallygate(home, "keys", "list", "--json"))
        assert {row["subscription_id"] for row in rows} == {"sub_demo_free", "sub_demo_pro"}
        made = json.loads(
            tallygate(home, "keys", "create", "--subscription=sub_demo_pro", "--json")
        )
        given = {"Authorization": f"Bearer {made['secret']}"}
        assert httpx.get(up.url() + "/weather/current", headers=given).status_code == 200

        everyone = up.everyone()
        up.signal(signal.SIGINT)
        assert up.wait() == 0
        assert still(everyone) == []
        assert not env.exists()  # it named servers that are gone
        assert "Traceback" not in up.output
        key = up.key("free")

    with Up(home) as up:
        assert up.key("free") == key
        assert "celsius" in run(up.curls()[0])
        wait_until(lambda: ledger(home, "sub_demo_free") == counted + 1, 10, "the flush")
        assert up.terminate() == 0


def test_a_kill_under_load_loses_no_count_and_leaves_no_process(home: Path) -> None:
    """What a client was answered is in the ledger; what is there beyond it was under way."""
    (home / "config.yaml").write_text(PLAIN)
    served = [0] * CLIENTS
    # Admitted, maybe: an answer of an upstream or a store that was killed first, or none at all.
    unknown = [0] * CLIENTS
    over = threading.Event()

    def load(number: int, url: str, key: str) -> None:
        with httpx.Client(headers={"X-API-Key": key}, timeout=5) as client:
            while not over.is_set():
                try:
                    good = client.get(url).status_code == 200
                    served[number] += good
                    unknown[number] += not good
                except httpx.ConnectError:
                    over.wait(0.05)  # nobody was there to count it
                except httpx.TransportError:
                    unknown[number] += 1

    for _ in range(2):
        with Up(home) as up:
            threads = [
                threading.Thread(target=load, args=(number, up.url() + "/current", up.key("pro")))
                for number in range(CLIENTS)
            ]
            before = sum(served)
            for thread in threads:
                thread.start()
            wait_until(lambda: sum(served) > before + 500, 30, "some load")  # noqa: B023
            everyone = up.everyone()
            up.kill()
            wait_until(lambda: still(everyone) == [], 30, "the end of every process")  # noqa: B023
            over.set()
            for thread in threads:
                thread.join()
            over.clear()
    with Up(home) as up:
        url, header = up.url() + "/current", {"X-API-Key": up.key("pro")}
        assert httpx.get(url, headers=header).status_code == 200
        wait_until(lambda: ledger(home, "sub_demo_pro") > sum(served), 10, "every count flushed")
        assert ledger(home, "sub_demo_pro") <= sum(served) + 1 + sum(unknown)
        assert up.terminate() == 0


def test_stores_of_your_own_are_used_and_found_by_the_commands(
    home: Path, valkey: str, empty_database: str
) -> None:
    (home / "config.yaml").write_text(PLAIN)
    env: dict[str, str | None] = {
        "TALLYGATE_REDIS_URL": valkey,
        "TALLYGATE_POSTGRES_URL": empty_database,
    }
    with Up(home, env) as up:
        names = {process.name() for process in up.everyone()}
        assert names.isdisjoint({"valkey-server", "postgres"})
        given = {"X-API-Key": up.key("pro")}
        assert httpx.get(up.url() + "/current", headers=given).status_code == 200
        wait_until(lambda: ledger(home, "sub_demo_pro") == 1, 10, "the flush")
        assert "sub_demo_pro" in tallygate(home, "subscriptions", "list")
        assert up.terminate() == 0
    assert not (home / ".tallygate" / "postgres").exists()


def test_a_folder_of_the_users_does_not_stand_in_for_ours(home: Path) -> None:
    for name in ("gateway", "control", "core"):
        (home / name).mkdir()
        (home / name / "__init__.py").write_text("raise SystemExit('the wrong package')\n")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONSAFEPATH": "1"}
    argv = [sys.executable, "-m", "cli.main", "gateway", "--help"]
    done = subprocess.run(argv, cwd=home, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with Up(home, {"PYTHONSAFEPATH": "1"}) as up:
        given = {"X-API-Key": up.key("free")}
        assert httpx.get(up.url() + "/weather/current", headers=given).status_code == 200
        assert up.terminate() == 0
