"""What can be done to a world, and how a seed makes a schedule of it."""

from __future__ import annotations

import random
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from tests.faults.history import Loss
from tests.faults.rules import Switches
from tests.faults.world import GATEWAYS, RECONCILERS, World


class Skip(Exception):
    """The fault cannot happen just now: another one has its victim."""


@dataclass(frozen=True)
class Planned:
    """A fault `at` seconds after the load began, taken back after `lasts`; `pick` says to whom."""

    fault: str
    at: float
    lasts: float
    pick: int

    def __str__(self) -> str:
        return f"{self.at:6.3f} s  for {self.lasts:.3f} s  {self.fault} ({self.pick})"


@dataclass(frozen=True)
class Fault:
    """`begin` does it and says to whom, `end` takes it back. `weight`: how often it is drawn."""

    begin: Callable[[World, Planned], str]
    end: Callable[[World, Planned], None] = lambda world, planned: None
    weight: int = 2
    lasts: tuple[float, float] = (0.0, 0.8)
    switch: str = ""


# Seconds a process is stopped: longer than the time-out of Redis, shorter than half a lease, after
# which a slot that is in use has to be renewed.
_STALL_S = (0.4, 1.2)


def _victim(kind: str, pick: int) -> str:
    if kind == "gateway":
        return f"gateway-{pick % GATEWAYS}"
    if kind == "reconciler":
        return f"reconciler-{pick % RECONCILERS}"
    return kind


def _kill(kind: str, weight: int = 2) -> Fault:
    def begin(world: World, planned: Planned) -> str:
        name = _victim(kind, planned.pick)
        if not world.family(name):
            raise Skip(f"{name} does not run")
        world.kill(name)
        return name

    return Fault(begin, lambda world, planned: world.start(_victim(kind, planned.pick)), weight)


def _stall(kind: str, weight: int = 2) -> Fault:
    def begin(world: World, planned: Planned) -> str:
        name = _victim(kind, planned.pick)
        if not world.running(name):
            raise Skip(f"{name} does not run")
        return f"{name}, {world.stop(name)} processes"

    def end(world: World, planned: Planned) -> None:
        world.resume(_victim(kind, planned.pick))

    return Fault(begin, end, weight, _STALL_S)


def _worker(world: World, planned: Planned) -> tuple[str, int]:
    gateway = planned.pick % GATEWAYS
    workers = world.workers(gateway)
    if not workers:
        raise Skip(f"gateway-{gateway} has no worker")
    return f"gateway-{gateway}", (planned.pick // GATEWAYS) % len(workers)


def _worker_kill(world: World, planned: Planned) -> str:
    name, index = _worker(world, planned)
    victim = world.workers(planned.pick % GATEWAYS)[index]
    victim.kill()
    return f"worker {victim.pid} of {name}"


def _worker_stall(world: World, planned: Planned) -> str:
    name, index = _worker(world, planned)
    if not world.running(name):
        raise Skip(f"{name} is stopped")
    victim = world.workers(planned.pick % GATEWAYS)[index]
    world.stop(f"worker of {name}", [victim])
    return f"worker {victim.pid} of {name}"


def _worker_resume(world: World, planned: Planned) -> None:
    world.resume(f"worker of gateway-{planned.pick % GATEWAYS}")


def _roll(world: World, planned: Planned) -> str:
    gateway = planned.pick % GATEWAYS
    if not world.workers(gateway):
        raise Skip(f"gateway-{gateway} does not run")
    world.stack.gateways[gateway].signal(signal.SIGUSR2)
    return f"gateway-{gateway}"


def _cut(world: World, planned: Planned) -> str:
    if not world.running("postgres"):
        raise Skip("postgres does not run")
    rows = world.sql(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
    )
    return f"{len(rows)} connections"


def _valkey_restart(world: World, planned: Planned) -> str:
    if not world.running("valkey"):
        raise Skip("valkey does not run")
    world.stack.valkey.stop()
    return "SIGTERM"


def _script_flush(world: World, planned: Planned) -> str:
    if not world.running("valkey"):
        raise Skip("valkey does not run")
    world.redis.script_flush()
    return "valkey"


@contextmanager
def _losing(world: World, fault: str) -> Iterator[None]:
    """Notes what the ledger had before data are lost in the block."""
    before = world.observe()
    start = time.monotonic()
    yield
    world.losses.append(Loss(fault, start, time.monotonic(), before))


def _flushall(world: World, planned: Planned) -> str:
    if not world.running("valkey"):
        raise Skip("valkey does not run")
    with _losing(world, "flushall"):
        world.redis.flushall()
    return "valkey"


def _copy(world: World, planned: Planned) -> str:
    """A copy of what Redis has on disk while it runs, as a snapshot of its volume would be."""
    if not world.running("valkey"):
        raise Skip("valkey does not run")
    copy = world.folder / "older"
    shutil.rmtree(copy, ignore_errors=True)
    try:
        shutil.copytree(world.stack.valkey.data_dir / "appendonlydir", copy)
    except shutil.Error as error:  # it was just rewriting a file
        raise Skip(str(error)) from error
    return "copied"


def _put_back(world: World, planned: Planned) -> None:
    live = world.stack.valkey.data_dir / "appendonlydir"
    with _losing(world, "older_copy"):
        world.kill("valkey")
        shutil.rmtree(live)
        shutil.copytree(world.folder / "older", live)
        world.start("valkey")


def _spool_full(world: World, planned: Planned) -> str:
    """Off unless there is a spool of its own small file system: see `World.folder`."""
    spool = world.folder / "spool"
    if not spool.is_mount():
        raise Skip("the spool is no file system of its own")
    usage = shutil.disk_usage(spool)
    (spool / "ballast").write_bytes(b"\0" * max(0, usage.free))
    return f"{usage.free} bytes filled"


def _spool_freed(world: World, planned: Planned) -> None:
    (world.folder / "spool" / "ballast").unlink(missing_ok=True)


FAULTS = {
    "worker_kill": Fault(_worker_kill, weight=4),
    "gateway_kill": _kill("gateway"),
    "gateway_roll": Fault(_roll, weight=3),
    "reconciler_kill": _kill("reconciler", 4),
    "valkey_kill": _kill("valkey", 4),
    "postgres_kill": _kill("postgres"),
    "postgres_cut": Fault(_cut, weight=3),
    "upstream_kill": _kill("upstream", 1),
    "worker_stall": Fault(_worker_stall, _worker_resume, 2, _STALL_S),
    "gateway_stall": _stall("gateway", 1),
    "reconciler_stall": _stall("reconciler"),
    "valkey_stall": _stall("valkey", 3),
    "postgres_stall": _stall("postgres"),
    "valkey_restart": Fault(_valkey_restart, lambda world, planned: world.start("valkey")),
    "script_flush": Fault(_script_flush),
    "flushall": Fault(_flushall, weight=3),
    "older_copy": Fault(_copy, _put_back, 3, (0.2, 1.0), "restored"),
    "spool_full": Fault(_spool_full, _spool_freed, 2, _STALL_S, "spool"),
}


def available(switches: Switches) -> list[str]:
    """Faults that the random schedule draws from."""
    return [n for n, fault in FAULTS.items() if not fault.switch or getattr(switches, fault.switch)]


def schedule(rng: random.Random, names: Sequence[str], seconds: float) -> list[Planned]:
    """One to three faults within so many seconds, a quarter of the times at the same moment."""
    weights = [FAULTS[name].weight for name in names]
    count = rng.choice((1, 2, 2, 3, 3))
    together = rng.random() < 0.25
    moment = rng.uniform(0.3, seconds)
    planned: list[Planned] = []
    for name in rng.choices(names, weights, k=count):
        at = moment if together else rng.uniform(0.3, seconds)
        planned.append(Planned(name, at, rng.uniform(*FAULTS[name].lasts), rng.randrange(1 << 16)))
    return sorted(planned, key=lambda fault: fault.at)
