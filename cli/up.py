"""`tallygate up`: gateway, control, reconciler, Valkey and Postgres in one terminal.

Order: lock the data directory, check the ports, start the stores, migrate, seed, start the
processes, wait until they are ready, print what to try. Stopping goes the other way round; data
stay. Every process dies with this one, so after a SIGKILL the next `up` just starts again.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cli import up_report
from cli.context import ENV_FILE, KEY_PEPPER, POSTGRES_URL, REDIS_URL
from cli.embedded import POSTGRES_MAJOR, DataDir, EmbeddedPostgres, EmbeddedValkey, free_port
from cli.embedded.datadir import write_private
from cli.embedded.process import require_free
from cli.supervise import Child, Supervisor, command, find_own_packages
from cli.up_settings import SPOOL_DIR, UPSTREAM, Settings, default_config, read_settings
from core.errors import TallygateError

if TYPE_CHECKING:
    from cli.demo import DemoKey

_READY_S = 60.0  # imports on a slow, busy machine


@click.command(help="Run everything in this terminal, stores included. Ctrl-C stops it.")
@click.option(
    "--config",
    "config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Config file. [default: ./config.yaml, or else the one that comes with tallygate]",
)
@click.option(
    "--data-dir",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path(".tallygate"),
    show_default=True,
    help="Where the embedded stores keep their data.",
)
@click.option("--gateway-port", type=click.IntRange(1, 65535), help="Instead of the config's.")
@click.option("--control-port", type=click.IntRange(1, 65535), help="Instead of the config's.")
@click.option("--no-demo", is_flag=True, help="Do not create the demo creator and its keys.")
def up(
    config: Path | None,
    data_dir: Path,
    gateway_port: int | None,
    control_port: int | None,
    no_demo: bool,
) -> None:
    settings = read_settings(config or default_config(), os.environ, free_port())
    settings = settings.with_ports(gateway_port, control_port)
    with DataDir(data_dir, POSTGRES_MAJOR) as data:
        require_free(*settings.gateway, "--gateway-port")
        require_free(*settings.control, "--control-port")
        asyncio.run(_Up(settings, data, demo=not no_demo).run())


class _Up:
    """One run, from starting the stores to stopping them."""

    def __init__(self, settings: Settings, data: DataDir, demo: bool) -> None:
        self._settings = settings
        self._data = data
        self._demo = demo
        self._env = dict(os.environ)
        if settings.upstream_port is not None:
            self._env[UPSTREAM] = f"http://127.0.0.1:{settings.upstream_port}"
        self._log = data.directory("log")
        self._stop = asyncio.Event()
        self._signals = 0
        self._stores: list[Child] = []
        self._ours: list[Child] = []

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self._supervisor = Supervisor(up_report.say)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(signum, self._on_signal)
        try:
            self._start_stores()
            keys = await self._prepare_database()
            self._start_processes()
            await self._wait_ready()
            up_report.show(self._settings, self._data.path, keys)
            await self._until_stopped()
        finally:
            if self._ours:
                up_report.say("up", "stopping; Ctrl-C again to hurry")
            await self._supervisor.stop(_stop_order(self._ours))
            (self._data.path / ENV_FILE).unlink(missing_ok=True)  # it names what ends now
            await self._supervisor.stop(self._stores)
            if self._ours:
                up_report.say("up", f"stopped; the data stay in {self._data.path}")

    def _on_signal(self) -> None:
        self._signals += 1
        self._stop.set()
        if self._signals > 1:
            self._supervisor.hurry()

    async def _until_stopped(self) -> None:
        """Return when asked to stop.

        Raises:
            TallygateError: a process that cannot be restarted ended.
        """
        stop = asyncio.create_task(self._stop.wait())
        failure = asyncio.create_task(self._supervisor.failure())
        await asyncio.wait({stop, failure}, return_when=asyncio.FIRST_COMPLETED)
        stop.cancel()
        failure.cancel()
        if failure.done() and not failure.cancelled() and not self._stop.is_set():
            raise TallygateError(f"{failure.result()}; its output is in {self._log}")

    def _start_stores(self) -> None:
        """Start the stores that are not configured. They block the loop: nothing else runs yet."""
        if self._settings.redis_url is None:
            up_report.say("up", "starting Valkey")
            valkey = EmbeddedValkey(self._data.path / "valkey").start()
            self._env[REDIS_URL] = valkey.url
            child = Child("valkey", valkey.restart, valkey.log, popen=valkey.process)
            self._watch_store(child)
        else:
            self._env[REDIS_URL] = self._settings.redis_url
        if self._settings.postgres_url is None:
            up_report.say("up", "starting Postgres")
            postgres = EmbeddedPostgres(self._data.path / "postgres").start()
            self._env[POSTGRES_URL] = postgres.url
            child = Child("postgres", postgres.restart, postgres.log, popen=postgres.process)
            child.stop_signal, child.kill_signal = signal.SIGINT, signal.SIGQUIT
            self._watch_store(child)
        else:
            self._env[POSTGRES_URL] = self._settings.postgres_url

    def _watch_store(self, child: Child) -> None:
        child.restart, child.show_log = True, False
        self._stores.append(self._supervisor.start(child))

    async def _prepare_database(self) -> list[DemoKey]:
        from core.db.migrate import migrate  # lazily: drags the driver in

        self._env[KEY_PEPPER] = self._settings.key_pepper or self._data.secret("key-pepper")
        self._env.setdefault(SPOOL_DIR, str(self._data.path / "spool"))
        self._leave_env()
        url = self._env[POSTGRES_URL]
        applied = await migrate(url)
        if applied:
            up_report.say("up", f"brought the database up to date: {', '.join(applied)}")
        plans = self._settings.demo_plans
        if not self._demo or not plans:
            return []
        from cli.demo import ensure_demo

        # The database has only digests of the keys; the file lets every start print them.
        keys_file = self._data.path / "demo-keys.json"
        return await ensure_demo(url, self._env[KEY_PEPPER], keys_file, plans)

    def _leave_env(self) -> None:
        """What `tallygate usage`, `keys`, … read in a second terminal; see `cli.context`."""
        names = (REDIS_URL, POSTGRES_URL, KEY_PEPPER, UPSTREAM, SPOOL_DIR)
        found = {name: self._env[name] for name in names if name in self._env}
        write_private(self._data.path / ENV_FILE, json.dumps(found, indent=2) + "\n")

    def _start_processes(self) -> None:
        self._env["TALLYGATE_METRICS_DIR"] = str(self._data.fresh("metrics"))
        find_own_packages(self._env)
        self._env["PYTHONUNBUFFERED"] = "1"
        port = self._settings.upstream_port
        if port is not None:
            self._start("upstream", ["cli.demo_upstream", "--port", str(port)])
        config = ["--config", str(self._settings.config)]
        self._start("reconciler", ["reconciler", *config])
        for name, (host, port) in (
            ("control", self._settings.control),
            ("gateway", self._settings.gateway),
        ):
            self._start(name, [name, *config, "--listen", f"{host}:{port}"])

    def _start(self, name: str, words: list[str]) -> None:
        launch = command(name, [sys.executable, "-m", *words], self._env, self._log)
        child = Child(name, launch, self._log / f"{name}.log")
        self._ours.append(self._supervisor.start(child))

    async def _wait_ready(self) -> None:
        """All at once; a stop request or the first failure ends the waiting."""
        urls = {
            "gateway": up_report.http(self._settings.gateway) + "/-/readyz",
            "control": up_report.http(self._settings.control) + "/readyz",
            "upstream": self._env.get(UPSTREAM, "") + "/current",
        }
        ready = asyncio.gather(
            *(
                self._supervisor.ready(child, urls[child.name], _READY_S)
                for child in self._ours
                if child.name in urls
            )
        )
        failure = asyncio.create_task(self._supervisor.failure())
        stop = asyncio.create_task(self._stop.wait())
        waiting: list[asyncio.Future[Any]] = [ready, failure, stop]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            if stop.done():
                raise TallygateError("stopped before everything was ready")
            if not ready.done():
                raise TallygateError(f"{failure.result()} before everything was ready")
            ready.result()
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
        for child in self._ours:
            child.restart = True  # the reconciler has no port of its own to ask


def _stop_order(children: list[Child]) -> list[Child]:
    """New requests end first, then what answers questions; the reconciler flushes what is left."""
    order = ("gateway", "control", "reconciler", "upstream")
    return sorted(children, key=lambda child: order.index(child.name))
