"""A worker's spool in real processes: killed anywhere, on full disks, adopted by several."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import IO

import pytest

from core.failpoints import VARIABLE
from gateway.outage.files import orphans

DEADLINE_S = 120


def start(failpoints: str = "", **given: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "tests.integration.outage.spooler", json.dumps(given)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {VARIABLE: failpoints},
    )


def lines(process: subprocess.Popen[str], *, status: int = 0) -> list[str]:
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == status
    return out.splitlines()


def pending(directory: Path) -> dict[str, list[tuple[int, str]]]:
    """What every file would replay: by its id, in order."""
    found = {}
    for segment in orphans(directory):
        records = segment.read(segment.done + 1, 1 << 30)
        found[segment.id] = [(sequence, payload.decode()) for sequence, payload in records]
        segment.close()
    return found


def read_some(stream: IO[str], count: int) -> list[str]:
    """So many lines, or fewer where it ends before: one that was killed late left fewer."""
    return [line for _ in range(count) if (line := stream.readline().strip())]


def test_killed_at_any_moment_everything_acknowledged_is_there_once(tmp_path: Path) -> None:
    process = start(
        mode="rounds", directory=str(tmp_path), rounds=40, writers=4, size=40, seed=tmp_path.name
    )
    acknowledged: dict[str, dict[int, str]] = {}
    for line in lines(process):
        child, sequence, payload = line.split(" ")
        acknowledged.setdefault(child, {})[int(sequence)] = payload

    found = pending(tmp_path)

    assert len(acknowledged) == 40
    by_child: dict[str, list[tuple[int, str]]] = {}
    for records in found.values():
        assert [sequence for sequence, _ in records] == list(range(1, len(records) + 1))
        by_child.setdefault(records[0][1].split("-")[0], []).extend(records)
    for child, expected in acknowledged.items():
        there = by_child.pop(child)
        assert len({payload for _, payload in there}) == len(there)
        assert expected.items() <= dict(there).items()
        # what was not acknowledged is what was on its way: one a writer
        assert len(there) - len(expected) <= 4
    assert not by_child


@pytest.mark.parametrize(
    ("failpoint", "acknowledged"),
    [("spool.appended:9", 8), ("spool.fsynced:9", 13)],
)
def test_killed_at_each_step_of_an_append(
    tmp_path: Path, failpoint: str, acknowledged: int
) -> None:
    process = start(failpoint, mode="append", directory=str(tmp_path), writers=1, size=40)
    seen = [line.split(" ") for line in lines(process, status=-signal.SIGKILL)]

    (records,) = pending(tmp_path).values()

    assert 0 < len(seen) <= acknowledged
    assert records[: len(seen)] == [(int(sequence), payload) for sequence, payload in seen]
    assert len(records) <= len(seen) + 1


@pytest.mark.parametrize("failpoint", ["spool.done:3", "spool.removed", "spool.removed:2"])
def test_killed_in_a_replay_what_is_not_done_comes_again_under_the_same_name(
    tmp_path: Path, failpoint: str
) -> None:
    for _ in range(2):
        lines(start(mode="append", directory=str(tmp_path), writers=3, size=40, times=40))
    everything = {
        (name, sequence, payload)
        for name, records in pending(tmp_path).items()
        for sequence, payload in records
    }
    assert len(everything) >= 80
    killed = start(failpoint, mode="replay", directory=str(tmp_path), count=7)
    first = [tuple(line.split(" ")) for line in lines(killed, status=-signal.SIGKILL)]
    second = [
        tuple(line.split(" "))
        for line in lines(start(mode="replay", directory=str(tmp_path), count=7))
    ]

    # a kill after `done` is after the mark, so nothing comes twice here
    assert len(first) + len(second) == len({*first, *second}) == len(everything)
    assert {(a, int(b), c) for a, b, c in [*first, *second]} == everything
    assert list(tmp_path.iterdir()) == []


def test_a_replay_that_is_killed_at_random_loses_and_skips_nothing(tmp_path: Path) -> None:
    lines(start(mode="append", directory=str(tmp_path), writers=5, size=60, times=300))
    everything = sorted(record for records in pending(tmp_path).values() for record in records)
    seen: list[tuple[int, str]] = []
    repeated = 0
    for count in (11, 60, 95, 0):
        process = start(mode="replay", directory=str(tmp_path), count=20)
        assert process.stdout is not None
        got = read_some(process.stdout, count)
        if count:
            process.kill()
        got += process.stdout.read().splitlines()
        process.wait(DEADLINE_S)
        # a line may be cut by the kill, but not a record: each is one write
        records = [(int(b), c) for _, b, c in (line.split(" ") for line in got)]
        assert [sequence for sequence, _ in records] == sorted(s for s, _ in records)
        repeated += len({*records} & {*seen})
        seen += records

    assert sorted({*seen}) == everything
    assert repeated <= 3 * 20  # a batch a kill
    assert list(tmp_path.iterdir()) == []


def test_adopters_never_get_the_same_file(tmp_path: Path) -> None:
    for _ in range(3):
        lines(start(mode="append", directory=str(tmp_path), writers=2, size=4_000, times=60))
    everything = sorted(
        (name, sequence, payload)
        for name, records in pending(tmp_path).items()
        for sequence, payload in records
    )
    assert len({name for name, _, _ in everything}) == 3

    adopters = [start(mode="replay", directory=str(tmp_path), count=5) for _ in range(3)]
    seen = [line.split(" ") for adopter in adopters for line in lines(adopter)]

    assert sorted((a, int(b), c) for a, b, c in seen) == everything
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_may_not_grow_takes_whole_records_only(tmp_path: Path) -> None:
    process = start(
        mode="append", directory=str(tmp_path), writers=3, size=700, file_size=40_001, refusals=50
    )
    seen = lines(process)

    refused = [line for line in seen if line.startswith("refused")]
    assert len(refused) >= 50
    assert {line.split(" ")[1] for line in refused} == {"full"}
    expected = sorted((int(a), b) for a, b in (x.split(" ") for x in seen if x not in refused))
    found = pending(tmp_path)
    assert sorted(record for records in found.values() for record in records) == expected
    assert all(path.stat().st_size <= 40_001 for path in tmp_path.iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(path)]
    try:
        done = subprocess.run(mount, capture_output=True, timeout=DEADLINE_S, check=False)
    except OSError as error:
        pytest.skip(f"cannot mount here: {error}")
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.decode().strip()}")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True, timeout=DEADLINE_S)


def test_a_full_disk_takes_whole_records_only_and_is_freed_by_the_replay(small_disk: Path) -> None:
    first = lines(
        start(mode="append", directory=str(small_disk), writers=3, size=3_000, refusals=9)
    )
    refused = [line for line in first if line.startswith("refused")]
    expected = sorted((int(a), b) for a, b in (x.split(" ") for x in first if x not in refused))
    found = pending(small_disk)
    assert {line.split(" ")[1] for line in refused} == {"full"}
    assert sorted(record for records in found.values() for record in records) == expected
    assert len(expected) > 30

    replayed = lines(start(mode="replay", directory=str(small_disk), count=10))

    assert len(replayed) == len(expected)
    assert list(small_disk.iterdir()) == []
    again = lines(start(mode="append", directory=str(small_disk), writers=1, size=3_000, times=20))
    assert len(again) == 20
    assert [name for name, _ in groupby(line.startswith("refused") for line in again)] == [False]
