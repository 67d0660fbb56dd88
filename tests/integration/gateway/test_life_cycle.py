"""Connections when the process behind them goes: none that was accepted is reset."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support import free_port, run_module, wait_until
from tests.support.processes import ROOT, Process

CONFIG = """
gateway: {drain: %(drain)s, drain_delay: %(delay)s, workers: 1}
upstreams: {stub: {urls: ["http://127.0.0.1:%(upstream)s"]}}
routes: [{match: {path: "/*"}, upstream: stub, keyless: true, plan: basic}]
plans: {basic: {unlimited: true}}
"""
HEALTH = b"GET /-/healthz HTTP/1.1\r\nhost: x\r\n\r\n"
READY = b"GET /-/readyz HTTP/1.1\r\nhost: x\r\n\r\n"


@pytest.fixture
def env(tmp_path: Path, valkey: str) -> dict[str, str]:
    return {
        "TALLYGATE_REDIS_URL": valkey,
        "TALLYGATE_POSTGRES_URL": "postgresql://127.0.0.1:9/none",  # down: no reason not to start
        "TALLYGATE_KEY_PEPPER": "pepper" * 6,
        "TALLYGATE_METRICS_DIR": str(tmp_path / "metrics"),
    }


@contextmanager
def gateway(
    tmp_path: Path,
    env: dict[str, str],
    *,
    drain: str = "5s",
    delay: str = "0s",
    upstream: int = 9,
) -> Iterator[tuple[Process, int]]:
    """A gateway of one worker that serves, and its port."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG % {"drain": drain, "delay": delay, "upstream": upstream})
    port = free_port()
    listen = ("--config", str(config), "--listen", f"127.0.0.1:{port}")
    with run_module("gateway", *listen, env=env) as process:
        process.wait_for_http(f"http://127.0.0.1:{port}/-/readyz")
        yield process, port


def worker_of(process: Process) -> psutil.Process:
    (worker,) = psutil.Process(process.pid).children()
    return worker


@contextmanager
def queued(port: int, count: int) -> Iterator[list[socket.socket]]:
    """Connections, each with a request sent, while nobody accepts."""
    with ExitStack() as stop:
        found = []
        for _ in range(count):
            client = stop.enter_context(socket.create_connection(("127.0.0.1", port), timeout=20))
            client.sendall(HEALTH)
            found.append(client)
        yield found


def answer(client: socket.socket) -> str:
    """All of it up to the end of its head."""
    found = b""
    while b"\r\n\r\n" not in found:
        piece = client.recv(4096)
        assert piece, "closed without an answer"
        found += piece
    return found.decode()


def ask(port: int, request: bytes) -> int:
    with socket.create_connection(("127.0.0.1", port), timeout=5) as client:
        client.sendall(request)
        return int(answer(client)[9:12])


def test_the_queue_of_a_killed_worker_is_served_by_the_next(
    tmp_path: Path, env: dict[str, str]
) -> None:
    with gateway(tmp_path, env) as (process, port):
        worker = worker_of(process)
        worker.suspend()
        with queued(port, 20) as clients:
            worker.kill()
            for client in clients:
                assert answer(client).startswith("HTTP/1.1 200")
            # also what came while nobody was there
            assert ask(port, HEALTH) == 200
        assert worker_of(process).pid != worker.pid


def test_a_worker_that_cannot_live_does_not_let_clients_wait(
    tmp_path: Path, env: dict[str, str]
) -> None:
    """Its place on the port is given up between two attempts; then it serves again."""
    with gateway(tmp_path, env) as (process, port):
        worker = worker_of(process)
        for _ in range(5):  # pauses: none, 0.1, 0.2, 0.4, 0.8 s
            worker.kill()
            worker = wait_until(lambda old=worker: another(process, old), what="the next one")
        assert door(port) == "closed"
        wait_until(lambda: ask(port, HEALTH) == 200, deadline_s=20, what="served again")


def another(process: Process, old: psutil.Process) -> psutil.Process | None:
    found = psutil.Process(process.pid).children()
    return found[0] if found and found[0].pid != old.pid else None


def test_what_has_connected_is_answered_before_the_end(tmp_path: Path, env: dict[str, str]) -> None:
    with gateway(tmp_path, env, delay="50ms") as (process, port):
        worker = worker_of(process)
        worker.suspend()
        with queued(port, 20) as clients:
            process.signal(signal.SIGTERM)
            wait_until(lambda: door(port) == "silent", what="no new connections")
            worker.resume()
            for client in clients:
                assert answer(client).startswith("HTTP/1.1 200")
        assert process.wait(10) == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)


def door(port: int) -> str:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=0.2).close()
    except ConnectionRefusedError:
        return "closed"
    except TimeoutError:
        return "silent"  # the kernel answers no more: what is in the queue is the last
    return "open"


def test_the_supervisor_is_killed_and_what_has_connected_is_answered(
    tmp_path: Path, env: dict[str, str]
) -> None:
    with gateway(tmp_path, env) as (process, port):
        worker = worker_of(process)
        worker.suspend()
        with queued(port, 20) as clients:
            process.kill()
            worker.resume()
            for client in clients:
                assert answer(client).startswith("HTTP/1.1 200")
        wait_until(lambda: not worker.is_running(), what="the worker gone")


def test_an_answer_that_was_not_the_last_is_followed_by_another(
    tmp_path: Path, env: dict[str, str]
) -> None:
    """Its head said nothing of closing, so the client may send again on the connection."""
    with (
        socket.create_server(("127.0.0.1", 0)) as upstream,
        gateway(tmp_path, env, upstream=upstream.getsockname()[1]) as (process, port),
        socket.create_connection(("127.0.0.1", port), timeout=20) as client,
    ):
        upstream.settimeout(20)
        client.sendall(b"GET /x HTTP/1.1\r\nhost: x\r\n\r\n")
        there, _ = upstream.accept()
        with there:
            there.recv(4096)
            there.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nab")
            head = answer(client)
            assert "connection: close" not in head.lower()
            process.signal(signal.SIGTERM)
            wait_until(lambda: door(port) == "closed", what="draining")
            there.sendall(b"cd")
            body = head.partition("\r\n\r\n")[2]
            while len(body) < 4:
                body += client.recv(16).decode()
            assert body == "abcd"
            client.sendall(HEALTH)
            last = answer(client).lower()
            assert last.startswith("http/1.1 200")
            assert "\r\nconnection: close\r\n" in last
        assert process.wait(20) == 0


def test_before_it_drains_it_serves_on_but_is_not_ready(
    tmp_path: Path, env: dict[str, str]
) -> None:
    with gateway(tmp_path, env, delay="1h") as (process, port):
        worker = worker_of(process)
        assert ask(port, READY) == 200
        process.signal(signal.SIGTERM)
        wait_until(lambda: ask(port, READY) == 503, what="not ready")
        assert ask(port, HEALTH) == 200
        process.signal(signal.SIGTERM)  # enough of it
        assert process.wait(20) == 1
        assert not worker.is_running()


def test_a_second_sigterm_kills(tmp_path: Path, env: dict[str, str]) -> None:
    with gateway(tmp_path, env, drain="1h") as (process, port):
        worker = worker_of(process)
        with unfinished(port):
            process.signal(signal.SIGTERM)
            wait_until(lambda: door(port) == "closed", what="draining")
            process.signal(signal.SIGTERM)
            assert process.wait(20) == 1
        assert not worker.is_running()


def test_the_drain_limit_is_the_limit(tmp_path: Path, env: dict[str, str]) -> None:
    with gateway(tmp_path, env, drain="1s") as (process, port), unfinished(port) as client:
        assert process.terminate() == 0  # otherwise the supervisor loses its patience: 1
        assert client.recv(1) == b""


@contextmanager
def unfinished(port: int) -> Iterator[socket.socket]:
    """A request in flight: the end of its head is missing."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
        client.sendall(HEALTH)
        answer(client)  # accepted, so
        client.sendall(HEALTH[:-2])
        yield client


def test_a_worker_that_is_not_connected_takes_nobodys_place(
    tmp_path: Path, env: dict[str, str]
) -> None:
    """Postgres is away: the keys in the old one's cache are all that can be served."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG % {"drain": "5s", "delay": "0s", "upstream": 9})
    port = free_port()
    patience = "import sys, gateway.roll as r; r.COMES_UP_S = 2; "
    code = patience + "from gateway.__main__ import main; sys.exit(main(sys.argv[1:]))"
    listen = ("--config", str(config), "--listen", f"127.0.0.1:{port}")
    with Process([sys.executable, "-c", code, *listen], env=env) as process:
        process.wait_for_http(f"http://127.0.0.1:{port}/-/readyz")
        worker = worker_of(process)
        process.signal(signal.SIGUSR2)
        process.wait_for_output("it was not connected within 2 s")
        assert worker_of(process).pid == worker.pid
        assert ask(port, HEALTH) == 200
        assert process.terminate() == 0


def test_sockets_of_a_service_manager_outlive_the_gateway(
    tmp_path: Path, env: dict[str, str]
) -> None:
    """Two gateways one after the other: what connects in between waits."""
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG % {"drain": "5s", "delay": "0s", "upstream": 9})
    with (
        socket.create_server(("127.0.0.1", 0), backlog=64) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager,
    ):
        port = listener.getsockname()[1]
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        told = env | {"NOTIFY_SOCKET": str(tmp_path / "notify")}
        with activated(config, told, listener) as first:
            assert manager.recv(100) == b"READY=1"
            assert ask(port, HEALTH) == 200
            first.terminate()
            assert manager.recv(100) == b"STOPPING=1"
            assert first.wait(20) == 0
        with queued(port, 20) as clients, activated(config, env, listener):
            for client in clients:
                assert answer(client).startswith("HTTP/1.1 200")


@contextmanager
def activated(
    config: Path, env: dict[str, str], listener: socket.socket
) -> Iterator[subprocess.Popen[bytes]]:
    """Started as systemd does: sockets from 3 on, and `LISTEN_PID` is the process's own."""
    code = (
        "import os, sys; "
        "os.dup2(int(sys.argv[1]), 3); os.environ['LISTEN_PID'] = str(os.getpid()); "
        "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    )
    fd = str(listener.fileno())
    process = subprocess.Popen(
        [sys.executable, "-c", code, fd, "-m", "gateway", "--config", str(config)],
        env=os.environ | env | {"LISTEN_FDS": "1", "PYTHONPATH": str(ROOT)},
        pass_fds=(int(fd),),
        cwd=ROOT,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(20)
