"""A few rounds of faults with fixed seeds, one for each class; `make chaos` runs many."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults import history
from tests.faults.rounds import run_round
from tests.faults.rules import EVERYTHING
from tests.faults.world import World, start_world


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with start_world(EVERYTHING) as running:
        yield running


@pytest.mark.parametrize(
    ("seed", "faults"),
    [
        (1, "worker_kill,gateway_kill,upstream_kill"),
        (2, "valkey_kill,valkey_restart,script_flush"),
        (3, "valkey_stall,gateway_stall,worker_stall"),
        (4, "postgres_kill,postgres_cut,postgres_stall"),
        (5, "reconciler_kill,reconciler_stall,valkey_kill"),
        (6, "flushall"),
        (7, "flushall,reconciler_kill,postgres_cut,worker_kill"),
        (8, "older_copy"),
        (9, "gateway_roll,worker_kill,gateway_kill"),
    ],
)
def test_nothing_is_lost_or_counted_twice(
    world: World, tmp_path: Path, seed: int, faults: str
) -> None:
    round_, violations = run_round(world, seed, faults.split(","))
    if violations:
        replay = f"again: python -m tests.faults --seed {seed} --faults {faults}"
        logs = world.logs() | world.server_logs()
        path = history.write(tmp_path, round_, violations, logs, replay)
        pytest.fail("\n".join([f"{replay}; history in {path}", *violations[:20]]))
    assert len(round_.requests) > 100
    assert [row for row in round_.faults if row.fault != "skipped"]
