"""The line writer against real pipes: order, whole lines, a stalled reader, a reader that left."""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from core.telemetry.writer import LineWriter
from tests.support import wait_until

ROOT = Path(__file__).parents[3]


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe as small as the kernel makes it: read end, write end."""
    read_fd, write_fd = os.pipe()
    fcntl.fcntl(write_fd, fcntl.F_SETPIPE_SZ, 4096)
    yield read_fd, write_fd
    for fd in (read_fd, write_fd):
        with contextlib.suppress(OSError):  # a test may have closed it
            os.close(fd)


def _read_lines(fd: int, count: int) -> list[bytes]:
    pieces = []
    while count > 0:
        piece = os.read(fd, 65_536)
        assert piece, "the writer closed the pipe"
        count -= piece.count(b"\n")
        pieces.append(piece)
    return b"".join(pieces).splitlines()


def test_lines_arrive_in_order_without_anyone_calling_flush(pipe: tuple[int, int]) -> None:
    writer = LineWriter(pipe[1])
    for number in range(100):
        assert writer.write(b"%d\n" % number)
    assert _read_lines(pipe[0], 100) == [b"%d" % number for number in range(100)]
    assert writer.take_dropped() == 0


def test_a_stalled_reader_blocks_nobody_and_loses_only_what_is_counted(
    pipe: tuple[int, int],
) -> None:
    # given a pipe that nobody reads, and room for 64 KiB of lines
    writer = LineWriter(pipe[1], max_bytes=65_536, interval_s=0.01)
    total = 20_000
    # when a flood is written
    slowest = 0.0
    accepted = []
    for number in range(total):
        started = time.perf_counter()
        if writer.write(b"%06d %s\n" % (number, b"x" * 92)):
            accepted.append(number)
        slowest = max(slowest, time.perf_counter() - started)
    # then no call waited for the reader, and the rest was counted
    assert slowest < 0.5  # scheduling of a busy machine; a blocked write would be for ever
    assert 600 < len(accepted) < 2_000
    assert writer.take_dropped() == total - len(accepted)
    assert writer.take_dropped() == 0
    assert not writer.drain(timeout_s=0.05)
    # and when the reader comes back, everything accepted arrives whole and in order
    lines = _read_lines(pipe[0], len(accepted))
    assert [int(line[:6]) for line in lines] == accepted
    assert all(len(line) == 99 for line in lines)
    # and there is room again
    wait_until(lambda: writer.write(b"again\n"))
    assert _read_lines(pipe[0], 1)[-1] == b"again"


def test_a_reader_that_left_is_no_error_and_counted(pipe: tuple[int, int]) -> None:
    writer = LineWriter(pipe[1], interval_s=0.01)
    os.close(pipe[0])
    assert writer.write(b"nobody\nreads\n")
    assert writer.drain()
    assert writer.take_dropped() == 2
    assert writer.write(b"still alive\n")
    assert writer.close()  # before its descriptor's number means another file


def test_a_descriptor_that_came_non_blocking_is_served(pipe: tuple[int, int]) -> None:
    os.set_blocking(pipe[1], False)
    writer = LineWriter(pipe[1], interval_s=0.01)
    for number in range(1_000):
        writer.write(b"%04d\n" % number)
    assert len(_read_lines(pipe[0], 1_000)) == 1_000


def test_processes_that_share_a_pipe_do_not_cut_each_others_lines(pipe: tuple[int, int]) -> None:
    code = (
        "import os, sys\nfrom core.telemetry.writer import LineWriter\n"
        "w = LineWriter(1, interval_s=0.001)\n"
        "os.read(0, 1)\n"
        "for n in range(5000): w.write((sys.argv[1] * 150 + '\\n').encode())\n"
        "w.close(20)\n"
    )
    go_read, go_write = os.pipe()
    children = [
        subprocess.Popen(
            [sys.executable, "-c", code, letter], stdin=go_read, stdout=pipe[1], cwd=ROOT
        )
        for letter in "abc"
    ]
    # All of them at once, into a pipe that is full at once: they wait in line for each page.
    os.write(go_write, b"go!")
    lines = _read_lines(pipe[0], 15_000)
    assert [child.wait(20) for child in children] == [0, 0, 0]
    os.close(go_read)
    os.close(go_write)
    assert all(len(set(line)) == 1 and len(line) == 150 for line in lines)


def test_lines_written_just_before_the_exit_arrive(pipe: tuple[int, int]) -> None:
    code = (
        "from core.telemetry.writer import LineWriter\n"
        "w = LineWriter(1, interval_s=60)\nw.write(b'last words\\n')\n"
    )
    subprocess.run([sys.executable, "-c", code], stdout=pipe[1], cwd=ROOT, check=True, timeout=20)
    assert _read_lines(pipe[0], 1) == [b"last words"]


def test_a_stalled_reader_does_not_hold_up_the_exit(pipe: tuple[int, int]) -> None:
    code = (
        "from core.telemetry.writer import LineWriter\n"
        "w = LineWriter(1)\nfor _ in range(9000): w.write(b'x' * 99 + b'\\n')\n"
    )
    subprocess.run([sys.executable, "-c", code], stdout=pipe[1], cwd=ROOT, check=True, timeout=20)


def test_a_forked_child_writes_its_own_lines_only(pipe: tuple[int, int]) -> None:
    code = (
        "import os\nfrom core.telemetry.writer import LineWriter\n"
        "w = LineWriter(1, interval_s=0.3)\nw.write(b'parent\\n')\n"
        "pid = os.fork()\n"
        "if pid == 0:\n    w.write(b'child\\n')\n    w.close()\n    os._exit(0)\n"
        "os.waitpid(pid, 0)\n"
    )
    subprocess.run([sys.executable, "-c", code], stdout=pipe[1], cwd=ROOT, check=True, timeout=20)
    os.close(pipe[1])
    assert sorted(_read_lines(pipe[0], 2)) == [b"child", b"parent"]
    assert os.read(pipe[0], 100) == b""
