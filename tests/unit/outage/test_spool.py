"""A worker's spool in one process: group commit, its bound, the replay."""

from __future__ import annotations

import asyncio
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest

from gateway.outage.commit import SpoolUnavailable
from gateway.outage.segment import DATA_START, MAX_PAYLOAD, OVERHEAD
from gateway.outage.spool import Batch, SpoolFull
from tests.support.wait import wait_until_async
from tests.unit.outage.disk import BIG, NOW, Disk, drain, run


def test_concurrent_appends_share_an_fsync(tmp_path: Path) -> None:
    disk = Disk()

    async def main() -> None:
        spool = disk.spool(tmp_path)
        sequences = await asyncio.gather(*(spool.append(b"%d" % at) for at in range(500)))
        assert sequences == list(range(1, 501))
        assert disk.syncs <= 3
        await asyncio.gather(*(spool.append(b"alone") for _ in range(1)))
        assert (spool.state, spool.pending_records, spool.oldest_ms) == ("active", 501, NOW)
        found = await drain(spool)
        assert [payload for _, _, payload in found[:500]] == [b"%d" % at for at in range(500)]
        assert (spool.state, spool.pending_records, spool.pending_bytes) == ("idle", 0, 0)
        assert (spool.used_bytes, spool.oldest_ms) == (0, 0)
        assert list(tmp_path.iterdir()) == []
        await spool.close()

    run(main)


def test_nothing_is_on_disk_before_the_first_append(tmp_path: Path) -> None:
    async def main() -> None:
        spool = Disk().spool(tmp_path / "spool")
        assert await spool.next_batch() is None
        assert await spool.adopt() == 0
        assert not (tmp_path / "spool").exists()
        await spool.append(b"x")
        assert len(list((tmp_path / "spool").iterdir())) == 1
        await spool.close()

    run(main)


def test_an_append_waits_for_its_fsync_and_the_loop_goes_on(tmp_path: Path) -> None:
    disk = Disk()

    async def main() -> None:
        spool = disk.spool(tmp_path)
        disk.go.clear()
        append = asyncio.create_task(spool.append(b"slow"))
        for _ in range(50):
            await asyncio.sleep(0)
        assert not append.done()
        assert spool.append_written(b"at once") == 2
        disk.go.set()
        assert await append == 1
        await wait_until_async(lambda: disk.syncs >= 2, what="the fsync in the background")
        await spool.close()

    run(main)


def test_a_full_spool_refuses_before_it_writes(tmp_path: Path) -> None:
    disk = Disk()

    async def main() -> None:
        room = DATA_START + 3 * (OVERHEAD + 100)
        spool = disk.spool(tmp_path, room)
        for _ in range(3):
            await spool.append(b"x" * 100)
        (path,) = tmp_path.iterdir()
        for _ in range(5):
            with pytest.raises(SpoolFull, match="spool_max"):
                await spool.append(b"y")
        assert spool.state == "full"
        assert path.stat().st_size == spool.used_bytes == room
        assert len(await drain(spool)) == 3
        assert spool.state == "idle"
        await spool.append(b"room again")
        await spool.close()

    run(main)


def test_files_are_bounded_together_and_space_comes_back_in_parts(tmp_path: Path) -> None:
    disk = Disk()

    async def main() -> None:
        spool = disk.spool(tmp_path)
        written = 0
        while spool.state != "full":
            with suppress(SpoolFull):
                spool.append_written(b"z" * 10_000)
                written += 1
        assert spool.used_bytes <= BIG
        assert written > BIG * 0.8 / 10_000
        files = len(list(tmp_path.iterdir()))
        assert files > 4
        while len(list(tmp_path.iterdir())) == files:
            batch = await spool.next_batch(3)
            assert batch is not None
            await spool.done(batch)
        await spool.append(b"z" * 10_000)
        assert spool.pending_records < written
        rest = await drain(spool)
        assert rest[-1][2] == b"z" * 10_000
        assert spool.used_bytes == 0
        await spool.close()

    run(main)


def test_memory_does_not_grow_with_what_is_spooled(tmp_path: Path) -> None:
    async def main() -> None:
        spool = Disk().spool(tmp_path, 64 * BIG)
        for _ in range(100):
            spool.append_written(b"x" * 500)
        tracemalloc.start()
        before, _ = tracemalloc.get_traced_memory()
        for at in range(10_000):
            spool.append_written(b"x" * 500)
            if at % 100 == 0:
                await asyncio.sleep(0)
        after, _ = tracemalloc.get_traced_memory()
        assert after - before < 200_000  # of five million bytes in ten thousand records
        replayed = len(await drain(spool, 500))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert replayed == 10_100
        assert peak - before < 10 * BIG  # what `drain` itself keeps, and a batch
        await spool.close()

    run(main)


def test_a_record_that_is_too_long_is_an_error_of_the_caller(tmp_path: Path) -> None:
    async def main() -> None:
        spool = Disk().spool(tmp_path, 4 * BIG)
        with pytest.raises(ValueError, match="at most"):
            await spool.append(b"x" * (MAX_PAYLOAD + 1))
        await spool.append(b"x" * MAX_PAYLOAD)
        assert len(await drain(spool)) == 1
        await spool.close()

    run(main)


def test_a_cancelled_append_is_withdrawn(tmp_path: Path) -> None:
    disk = Disk()

    async def main() -> None:
        spool = disk.spool(tmp_path)
        disk.go.clear()
        gone = asyncio.create_task(spool.append(b"gone"))
        kept = asyncio.create_task(spool.append(b"kept"))
        await asyncio.sleep(0)
        gone.cancel()
        disk.go.set()
        assert await kept == 2
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert [payload for _, _, payload in await drain(spool)] == [b"kept"]
        await spool.close()

    run(main)


def test_a_batch_comes_again_until_it_is_done(tmp_path: Path) -> None:
    async def main() -> None:
        spool = Disk().spool(tmp_path)
        for at in range(10):
            await spool.append(b"%d" % at)
        first = await spool.next_batch(4)
        assert first == await spool.next_batch(4)
        assert first == Batch(first.spool_id, [(at + 1, b"%d" % at) for at in range(4)])
        await spool.done(first, upto=2)
        again = await spool.next_batch(4)
        assert again is not None
        assert (again.spool_id, again.records[0]) == (first.spool_id, (3, b"2"))
        await spool.close()
        # what others do not find done, they get with the same names
        other = Disk().spool(tmp_path)
        assert await other.adopt() == 1
        assert other.pending_records == 8
        assert await other.next_batch(4) == again
        assert len(await drain(other)) == 8
        await other.close()

    run(main)


def test_appends_go_on_in_a_new_file_while_one_is_replayed(tmp_path: Path) -> None:
    async def main() -> None:
        spool = Disk().spool(tmp_path)
        await spool.append(b"old")
        old = await spool.next_batch()
        assert old is not None
        assert await spool.append(b"new") == 1
        await spool.done(old)
        new = await spool.next_batch()
        assert new is not None
        assert new.spool_id != old.spool_id
        assert new.records == [(1, b"new")]
        await spool.done(old)  # a second time changes nothing
        assert await spool.next_batch() == new
        await spool.close()
        with pytest.raises(SpoolUnavailable, match="closed"):
            await spool.append(b"late")

    run(main)


def test_a_replay_beside_appends_gives_each_record_once(tmp_path: Path) -> None:
    async def main() -> None:
        spool = Disk().spool(tmp_path)
        appended: list[bytes] = []
        found: list[tuple[str, int, bytes]] = []

        async def append(writer: int) -> None:
            for at in range(60):
                payload = b"%d-%d" % (writer, at)
                await spool.append(payload)
                appended.append(payload)

        async def replay() -> None:
            while len(found) < 8 * 60:
                found.extend(await drain(spool, 16))
                await asyncio.sleep(0)

        await asyncio.wait_for(asyncio.gather(replay(), *map(append, range(8))), 120)
        assert sorted(payload for _, _, payload in found) == sorted(appended)
        assert len({(spool_id, sequence) for spool_id, sequence, _ in found}) == len(found)
        assert list(tmp_path.iterdir()) == []
        await spool.close()

    run(main)


def test_adoption_keeps_to_the_bound_and_goes_on_after_the_replay(tmp_path: Path) -> None:
    async def main() -> None:
        for _ in range(4):
            left = Disk().spool(tmp_path)
            await left.append(b"x" * 100_000)
            await left.close()
        spool = Disk().spool(tmp_path, 250_000)
        assert await spool.adopt() == 2
        assert spool.used_bytes <= 250_000
        with pytest.raises(SpoolFull):
            await spool.append(b"x" * 30_000)
        assert len(await drain(spool)) == 2
        small = Disk().spool(tmp_path, 50_000)  # lowered since: one at a time all the same
        assert await small.adopt() == 1
        assert await spool.adopt() == 1
        assert len(await drain(spool)) == len(await drain(small)) == 1
        assert list(tmp_path.iterdir()) == []
        await spool.close()
        await small.close()

    run(main)


def test_files_are_replayed_in_their_order_when_the_clock_goes_back(tmp_path: Path) -> None:
    async def main() -> None:
        disk = Disk()
        spool = disk.spool(tmp_path)
        for at in range(90):
            disk.seconds -= 10
            spool.append_written(b"%02d" % at + b"x" * 5_000)
        assert len(list(tmp_path.iterdir())) > 2
        found = await drain(spool)
        assert [payload[:2] for _, _, payload in found] == [b"%02d" % at for at in range(90)]
        await spool.close()

    run(main)
