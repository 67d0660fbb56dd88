"""HTTP clients in processes of their own: many keep-alive connections, raw bytes, closed loop.

`Load` drives the processes. Each runs this module: jobs and questions come in as JSON lines, each
is answered by one. Connections stay open from job to job. Times are CLOCK_MONOTONIC, which all
processes of a machine share.
"""

from __future__ import annotations

import asyncio
import json
import random
import select
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from tests.support.processes import ROOT

# Stands in a request for an identifier that no other request has: see `Load.start`.
ID = "@request-id@"
# A client process that says nothing for so long is waiting for an answer that never comes.
_DEADLINE_S = 120.0


@dataclass
class Outcome:
    """`statuses` by index of the request and status; `lost` are requests that had no answer.

    `closed` are connections that the other end closed, `refused` attempts to open one that failed.
    `records` (when asked for): index of the request, status (0: lost), start and end in seconds.
    `ids`: the identifier of each record, where the request has room for one (`ID`).
    """

    statuses: Counter[tuple[int, int]] = field(default_factory=Counter)
    lost: int = 0
    closed: int = 0
    refused: int = 0
    records: list[tuple[int, int, float, float]] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)

    def count(self, status: int, request: int | None = None) -> int:
        return sum(
            n
            for (index, code), n in self.statuses.items()
            if code == status and request in (None, index)
        )

    @property
    def total(self) -> int:
        return sum(self.statuses.values())

    def all_statuses(self) -> set[int]:
        return {status for _, status in self.statuses}


def get(
    path: str,
    key: str | None = None,
    *,
    who: str = "",
    method: str = "GET",
    request_id: str = "",
    close: bool = False,
) -> str:
    """The bytes of one request; `who` is what the upstream counts it under.

    `close` makes it the last one on its connection.
    """
    lines = [f"{method} {path} HTTP/1.1", "host: api.test"]
    if key:
        lines.append(f"authorization: Bearer {key}")
    if who:
        lines.append(f"x-who: {who}")
    if request_id:
        lines.append(f"x-request-id: {request_id}")
    if close:
        lines.append("connection: close")
    return "\r\n".join([*lines, "", ""])


class Load:
    """`processes` client processes; a context manager. One job at a time."""

    def __init__(self, processes: int = 2) -> None:
        self._processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.support.load"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                cwd=ROOT,
            )
            for _ in range(processes)
        ]

    def start(
        self,
        ports: Sequence[int],
        requests: Sequence[str],
        *,
        connections: int,
        total: int | None = None,
        records: bool = False,
        reopen: bool = False,
        pause_s: float = 0.0,
        id_prefix: str = "",
    ) -> None:
        """Sends `requests` in turn, `total` of them or until `stop`; spread over the processes.

        Args:
            reopen: a connection that is lost is replaced; otherwise its share stays undone.
            pause_s: a connection rests so long on average between answer and request.
            id_prefix: what `ID` in a request is replaced by begins with this.
        """
        count = len(self._processes)
        for number, process in enumerate(self._processes):
            job = {
                "do": "run",
                "ports": list(ports),
                "requests": list(requests),
                "connections": _share(connections, number, count),
                "total": None if total is None else _share(total, number, count),
                "first": number,
                "records": records,
                "reopen": reopen,
                "pause_s": pause_s,
                "id_prefix": f"{id_prefix}{number}-",
            }
            self._say(process, job)

    def progress(self) -> Outcome:
        """What was answered so far of the job under way; without records."""
        return self._gather("progress")

    def stop(self) -> Outcome:
        """Ends the job: what is in flight is waited for."""
        return self._gather("stop")

    def wait(self) -> Outcome:
        """Waits for the end of a job with a `total`."""
        return self._gather("wait")

    def run(
        self, ports: Sequence[int], requests: Sequence[str], *, connections: int, total: int
    ) -> Outcome:
        self.start(ports, requests, connections=connections, total=total)
        outcome = self.wait()
        assert outcome.lost == 0, f"{outcome.lost} requests without an answer"
        assert outcome.total == total
        return outcome

    def _gather(self, question: str) -> Outcome:
        merged = Outcome()
        for process in self._processes:
            self._say(process, {"do": question})
        for process in self._processes:
            assert process.stdout is not None
            ready, _, _ = select.select([process.stdout], [], [], _DEADLINE_S)
            assert ready, f"a client process waits for an answer since {_DEADLINE_S:.0f} s"
            line = process.stdout.readline()
            assert line, "a client process ended"
            answer = json.loads(line)
            merged.lost += answer["lost"]
            merged.closed += answer["closed"]
            merged.refused += answer["refused"]
            merged.records += [tuple(row) for row in answer["records"]]
            merged.ids += answer["ids"]
            for index, status, number in answer["statuses"]:
                merged.statuses[index, status] += number
        return merged

    @staticmethod
    def _say(process: subprocess.Popen[bytes], message: dict[str, Any]) -> None:
        assert process.stdin is not None
        process.stdin.write(json.dumps(message).encode() + b"\n")
        process.stdin.flush()

    def __enter__(self) -> Load:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.kill()
            process.communicate()


def _share(total: int, number: int, count: int) -> int:
    return total // count + (number < total % count)


# --- the client process --------------------------------------------------------------------------


_NO_RECORDS: dict[str, list[Any]] = {"records": [], "ids": []}


class _Job:
    def __init__(self, spec: dict[str, Any]) -> None:
        self.requests = [request.encode() for request in spec["requests"]]
        self.left = spec["total"]
        self.next = spec["first"]
        self.keep_records = spec["records"]
        self.reopen = spec["reopen"]
        self.pause_s = spec["pause_s"]
        self.id_prefix = spec["id_prefix"]
        self.numbered = any(ID.encode() in request for request in self.requests)
        self.ids: list[str] = []
        self.statuses: Counter[tuple[int, int]] = Counter()
        self.lost = self.closed = self.refused = 0
        self.records: list[tuple[int, int, float, float]] = []
        self.working = 0
        self.done = asyncio.Event()

    def work(self, client: _Client) -> None:
        """Gives a free connection its next request, or nothing when there is none left."""
        if self.left == 0:
            self.retire()
            return
        if self.left is not None:
            self.left -= 1
        if not client.open:  # lost while it rested: nothing was on its way
            self.gone(client)
            return
        client.index = self.next % len(self.requests)
        request = self.requests[client.index]
        if self.numbered:
            client.id = f"{self.id_prefix}{self.next}"
            request = request.replace(ID.encode(), client.id.encode())
        self.next += 1
        client.started = time.monotonic()
        client.job = self
        client.transport.write(request)

    def go_on(self, client: _Client) -> None:
        """The next request of a connection, at once or after a rest."""
        if self.pause_s:
            rest = random.uniform(0, 2 * self.pause_s)
            asyncio.get_running_loop().call_later(rest, self.work, client)
        else:
            self.work(client)

    def answered(self, client: _Client, status: int) -> None:
        client.job = None
        if status:
            self.statuses[client.index, status] += 1
        else:
            self.lost += 1
        if self.keep_records:
            row = (client.index, status, client.started, time.monotonic())
            self.records.append(row)
            if self.numbered:
                self.ids.append(client.id)

    def gone(self, client: _Client) -> None:
        """A connection was closed: another one takes its place, where that is wanted."""
        self.closed += 1
        if self.reopen:
            asyncio.ensure_future(_replace(client.port, self))  # noqa: RUF006
        else:
            self.retire()

    def retire(self) -> None:
        self.working -= 1
        if self.working == 0:
            self.done.set()

    def answer(self, whole: bool) -> bytes:
        rows = [[index, status, n] for (index, status), n in self.statuses.items()]
        records = {"records": self.records, "ids": self.ids} if whole else _NO_RECORDS
        counts = {"lost": self.lost, "closed": self.closed, "refused": self.refused}
        return json.dumps({**counts, "statuses": rows, **records}).encode() + b"\n"


class _Client(asyncio.Protocol):
    """One connection. Answers must carry Content-Length, as all in these tests do."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.job: _Job | None = None
        self.index = 0
        self.started = 0.0
        self.id = ""
        self.buffer = b""
        self.open = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport
        self.open = True

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head = self.buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        at = self.buffer.find(b"content-length: ", 0, head)
        assert at > 0, self.buffer
        length = int(self.buffer[at + 16 : self.buffer.find(b"\r\n", at)])
        if len(self.buffer) < head + 4 + length:
            return
        status = int(self.buffer[9:12])
        last = b"\r\nconnection: close" in self.buffer[: head + 2].lower()
        self.buffer = b""
        job = self.job
        assert job is not None
        job.answered(self, status)
        if last:
            self.transport.close()
            job.gone(self)
        else:
            job.go_on(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        job = self.job
        if job is not None:
            job.answered(self, 0)
            job.gone(self)


async def _connect(port: int) -> _Client:
    loop = asyncio.get_running_loop()
    _, client = await loop.create_connection(lambda: _Client(port), "127.0.0.1", port)
    return client


async def _replace(port: int, job: _Job) -> None:
    while True:
        try:
            client = await _connect(port)
            break
        except OSError:
            job.refused += 1
            if job.left == 0:
                job.retire()
                return
            await asyncio.sleep(0.01)
    job.work(client)


async def _start(spec: dict[str, Any], idle: list[_Client]) -> tuple[_Job, list[_Client]]:
    job = _Job(spec)
    ports = spec["ports"]
    clients: list[_Client] = []
    free = [client for client in idle if client.open and client.job is None]
    absent: list[int] = []  # ports where nobody listens just now
    for number in range(spec["connections"]):
        port = ports[(number + spec["first"]) % len(ports)]
        found = next((client for client in free if client.port == port), None)
        if found is not None:
            free.remove(found)
            clients.append(found)
            continue
        try:
            clients.append(await _connect(port))
        except OSError:
            if not job.reopen:
                raise
            absent.append(port)
    for client in free:
        client.transport.close()
    job.working = spec["connections"]
    if not job.working:
        job.done.set()
    for client in clients:
        job.work(client)
    for port in absent:
        asyncio.ensure_future(_replace(port, job))  # noqa: RUF006
    return job, clients


async def _main() -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=2**24)  # a job is one line, however many requests
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    job: _Job | None = None
    clients: list[_Client] = []
    while line := await reader.readline():
        message = json.loads(line)
        if message["do"] == "run":
            job, clients = await _start(message, clients)
            continue
        assert job is not None
        if message["do"] == "stop":
            job.left = 0
        if message["do"] != "progress":
            await job.done.wait()
        sys.stdout.buffer.write(job.answer(message["do"] != "progress"))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    import uvloop

    uvloop.run(_main())
