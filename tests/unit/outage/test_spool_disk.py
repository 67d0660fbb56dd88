"""A worker's spool on a disk that fails, hangs, loses bytes, or goes away."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
from pathlib import Path

import pytest

from gateway.outage.commit import SpoolUnavailable
from gateway.outage.segment import DATA_START, OVERHEAD
from tests.support.wait import wait_until_async
from tests.unit.outage.disk import Disk, drain, run


@pytest.mark.parametrize(("error", "state"), [(errno.EIO, "broken"), (errno.ENOSPC, "full")])
def test_a_failed_fsync_refuses_and_withdraws_and_recovers(
    tmp_path: Path, error: int, state: str
) -> None:
    disk, events = Disk(), []

    async def main() -> None:
        spool = disk.spool(tmp_path, report=lambda event, amount: events.append((event, amount)))
        await spool.append(b"before")
        disk.error = error
        refused = await asyncio.gather(
            *(spool.append(b"refused") for _ in range(20)), return_exceptions=True
        )
        assert {type(answer) for answer in refused} == {SpoolUnavailable}
        assert spool.state == state
        await wait_until_async(lambda: spool.pending_records == 1, what="the withdrawals")

        syncs = disk.syncs
        for _ in range(100):
            with pytest.raises(SpoolUnavailable):
                await spool.append(b"storm")
        assert disk.syncs == syncs

        disk.seconds += 1
        probes = await asyncio.gather(
            *(spool.append(b"probe") for _ in range(20)), return_exceptions=True
        )
        assert {type(answer) for answer in probes} == {SpoolUnavailable}
        await wait_until_async(lambda: spool.pending_records == 1, what="the withdrawals")
        assert disk.syncs <= syncs + 2  # the probe, and its withdrawal

        disk.error = None
        disk.seconds += 1
        assert await spool.append(b"after") == 1
        assert spool.state == "active"
        assert [payload for _, _, payload in await drain(spool)] == [b"before", b"after"]
        assert events == [("unavailable", 1)]
        await spool.close()

    run(main)


def test_what_was_only_written_stays_when_an_fsync_fails(tmp_path: Path) -> None:
    disk = Disk()

    async def main() -> None:
        spool = disk.spool(tmp_path)
        disk.error = errno.EIO
        spool.append_written(b"served already")
        with pytest.raises(SpoolUnavailable):
            await spool.append(b"refused")
        disk.error = None
        assert [payload for _, _, payload in await drain(spool)] == [b"served already"]
        await spool.close()

    run(main)


def test_a_disk_that_hangs_refuses_in_time_and_recovers(tmp_path: Path) -> None:
    disk = Disk()

    async def main() -> None:
        spool = disk.spool(tmp_path, timeout_s=0.05)
        disk.go.clear()
        with pytest.raises(SpoolUnavailable, match="no fsync within"):
            await spool.append(b"refused")
        disk.seconds += 100
        for _ in range(100):
            with pytest.raises(SpoolUnavailable):
                await spool.append(b"not even tried")
        assert spool.state == "broken"
        disk.go.set()
        await wait_until_async(lambda: spool.state == "idle", 60, what="the recovery")

        async def accepted() -> bool:  # a busy machine's disk may be late by itself
            disk.seconds += 1
            return await spool.append(b"after") > 0

        await wait_until_async(accepted, 60, what="an append")
        assert [payload for _, _, payload in await drain(spool)] == [b"after"]
        await spool.close()

    run(main)


def test_damage_found_in_a_replay_does_not_stop_it(tmp_path: Path) -> None:
    events: list[tuple[str, int]] = []

    async def main() -> None:
        spool = Disk().spool(tmp_path, report=lambda event, amount: events.append((event, amount)))
        for at in range(6):
            await spool.append(b"%d" % at * 50)
        (path,) = tmp_path.iterdir()
        for record in (2, 5):  # the third and the last
            with path.open("r+b") as file:
                file.seek(DATA_START + record * (OVERHEAD + 50) + OVERHEAD + 9)
                file.write(b"?")
        assert [sequence for _, sequence, _ in await drain(spool, 2)] == [1, 2, 4, 5]
        assert spool.state == "idle"
        assert [entry.suffix for entry in tmp_path.iterdir()] == [".damaged"]
        await spool.close()

    run(main)
    assert [row for row in events if row[0] == "lost"] == [("lost", 1), ("lost", 1)]


def test_a_directory_that_is_removed_refuses_and_then_is_made_anew(tmp_path: Path) -> None:
    disk = Disk()

    async def main() -> None:
        spool = disk.spool(tmp_path / "spool")
        await spool.append(b"before")
        shutil.rmtree(tmp_path / "spool")
        with pytest.raises(SpoolUnavailable, match="removed"):
            await spool.append(b"refused")
        disk.seconds += 1
        await spool.append(b"after")
        assert len(list((tmp_path / "spool").iterdir())) == 1
        # what was acknowledged is still held open
        assert [payload for _, _, payload in await drain(spool)] == [b"before", b"after"]
        await spool.close()

    run(main)


def test_a_file_that_cannot_be_read_does_not_hold_up_the_others(tmp_path: Path) -> None:
    async def main() -> None:
        spool = Disk().spool(tmp_path)
        await spool.append(b"unreadable")
        stuck = await spool.next_batch()
        assert stuck is not None
        await spool.append(b"readable")
        (segment,) = spool._sealed
        whole, segment.fd = segment.fd, os.open("/proc/self/mem", os.O_RDONLY)  # EIO at its start

        batch = await spool.next_batch()
        assert batch is not None
        assert batch.records == [(1, b"readable")]
        await spool.done(batch)
        with pytest.raises(SpoolUnavailable, match="cannot be read"):
            await spool.next_batch()

        os.close(segment.fd)
        segment.fd = whole
        assert await spool.next_batch() == stuck
        await spool.close()

    run(main)
