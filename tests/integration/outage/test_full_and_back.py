"""One worker through a full disk and out of it again, without a restart."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from gateway.outage.commit import SpoolUnavailable
from gateway.outage.spool import Spool


@pytest.mark.parametrize("size", [100, 2_900])
def test_a_worker_recovers_by_itself_when_space_is_back(tmp_path: Path, size: int) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"cannot mount here: {done.stderr.decode().strip()}")
    try:
        asyncio.run(_fill_and_free(disk, size))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


async def _fill_and_free(disk: Path, size: int) -> None:
    ballast = disk / "ballast"
    ballast.write_bytes(bytes(60 * 1024))
    seconds = 0.0
    spool = Spool(disk / "spool", 1 << 20, monotonic=lambda: seconds, timeout_s=60)
    written: list[bytes] = []

    async def fill() -> None:
        while True:
            payload = b"%d-" % len(written) + b"x" * size
            await spool.append(payload)
            written.append(payload)

    with pytest.raises(SpoolUnavailable, match="No space left"):
        await fill()
    assert spool.state == "full"
    assert spool.pending_records == len(written) > 3
    ballast.unlink()
    with pytest.raises(SpoolUnavailable):
        await spool.append(b"too soon")

    seconds += 1
    before = len(written)
    with pytest.raises(SpoolUnavailable, match="No space left"):
        await fill()

    assert len(written) > before + 3
    found: list[bytes] = []
    while (batch := await spool.next_batch(20)) is not None:
        found += [payload for _, payload in batch.records]
        await spool.done(batch)  # in place: a full disk does not keep it from freeing space
    assert found == written
    await spool.append(b"at once")
    assert spool.state == "active"
    await spool.close()
