"""One round: load, faults, healing, draining, reading what is there."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import psutil

from tests.faults.check import check
from tests.faults.faults import FAULTS, Planned, Skip, available, schedule
from tests.faults.history import Happened, Request, Round
from tests.faults.rules import RESERVATION_S, traffic
from tests.faults.world import DEADLINE_S, World
from tests.support import wait_until
from tests.support.load import ID, get

CONNECTIONS = 12
# With these about 400 requests a second, where the machine gives them.
PAUSE_S = 0.02
FAULTS_S = 2.5  # faults begin within this time
REQUESTS = 500  # a seed's mix of requests, which is sent again and again
_OBSERVE_S = 0.1
# How long after everything else is quiet a charge may still be taken back.
SETTLE_S = RESERVATION_S + 20.0


def run_round(world: World, seed: int, faults: Sequence[str] = ()) -> tuple[Round, list[str]]:
    """Runs the round of this seed; what happened, and what does not hold afterwards.

    Args:
        faults: names to draw from; all that are available by default.
    """
    rng = random.Random(seed)
    planned = schedule(rng, list(faults) or available(world.switches), FAULTS_S)
    round_ = Round(seed, world.switches, [str(fault) for fault in planned])
    begun = time.monotonic()
    requests, index = _requests(world, rng, round_)
    world.forget(list(round_.plans))
    world.load.start(
        world.stack.ports,
        requests,
        connections=CONNECTIONS,
        records=True,
        reopen=True,
        pause_s=PAUSE_S,
        id_prefix=f"{seed}-{time.monotonic_ns()}-",
    )
    try:
        _inject(world, planned, round_)
        round_.troubles += world.died()
        world.heal()
        _recover(world)
    except AssertionError as error:
        round_.troubles.append(f"not healed: {error}")
    outcome = world.load.stop()
    round_.requests = [
        Request(name, *index[which], status, start, end)
        for name, (which, status, start, end) in zip(outcome.ids, outcome.records, strict=True)
    ]
    try:
        violations = _settle(world, round_)
    except Exception as error:  # the round is written out with what there is
        violations = [f"cannot be read: {error!r}", *check(round_)]
    round_.seconds = time.monotonic() - begun
    return round_, violations


def _settle(world: World, round_: Round) -> list[str]:
    """Drains and checks; what is taken back later, as the switches say, is waited for."""
    left = world.drain()
    if left:
        round_.troubles.append(f"not carried over after {DEADLINE_S:.0f} s: {left}")
    round_.troubles += [*world.died(), *world.errors()]
    later = world.switches.exact_503 or world.switches.reservations
    end = time.monotonic() + (SETTLE_S if later and not left else 0)
    while True:
        _read(world, round_)
        violations = check(round_)
        if not violations or time.monotonic() >= end:
            break
        time.sleep(_OBSERVE_S)
    if left:  # it would stand in the way of the next round
        world.redis.flushall()
    return violations


def _requests(
    world: World, rng: random.Random, round_: Round
) -> tuple[list[str], list[tuple[str, str]]]:
    """The requests to send, and the subject and path of each."""
    kinds = traffic(world.switches)
    subscribers = [world.stack.subscribe(kind.plan) for kind in kinds]
    round_.plans = {who.id: kind.plan for who, kind in zip(subscribers, kinds, strict=True)}
    pairs = list(zip(subscribers, kinds, strict=True))
    drawn = rng.choices(pairs, [kind.share for kind in kinds], k=REQUESTS)
    texts: list[str] = []
    index: list[tuple[str, str]] = []
    for who, kind in drawn:
        path = rng.choice(kind.paths)
        texts.append(get(path, who.key, who=who.id, request_id=ID))
        index.append((who.id, path))
    return texts, index


def _inject(world: World, planned: Sequence[Planned], round_: Round) -> None:
    """Faults at their times; the ledger is observed in between."""
    begun = time.monotonic()
    # time, whether it ends, number: at one moment faults begin before others end
    steps = [(fault.at, False, number) for number, fault in enumerate(planned)]
    steps += [(fault.at + fault.lasts, True, number) for number, fault in enumerate(planned)]
    started: dict[int, tuple[str, float]] = {}
    for at, ends, number in [*sorted(steps), (FAULTS_S + 0.3, True, -1)]:
        while (left := begun + at - time.monotonic()) > 0:
            if left > _OBSERVE_S:
                world.observe()
            time.sleep(min(_OBSERVE_S, max(0.0, begun + at - time.monotonic())))
        if number < 0:
            continue
        fault, name = FAULTS[planned[number].fault], planned[number].fault
        if not ends:
            start = time.monotonic()
            try:
                started[number] = fault.begin(world, planned[number]), start
            except (Skip, psutil.NoSuchProcess) as reason:
                now = time.monotonic()
                round_.faults.append(Happened("skipped", f"{name}: {reason}", start, now))
        elif number in started:
            fault.end(world, planned[number])
            what, start = started.pop(number)
            round_.faults.append(Happened(name, what, start, time.monotonic()))


def _recover(world: World) -> None:
    """Requests are decided again on every connection: answers other than 503 come in."""

    def decided() -> int:
        progress = world.load.progress()
        return progress.total - progress.count(503)

    before = decided()
    wait_until(
        lambda: decided() >= before + 4 * CONNECTIONS, DEADLINE_S, "decisions after the faults"
    )


def _read(world: World, round_: Round) -> None:
    """Everything that is compared, once nothing moves any more."""
    round_.served = world.journal()
    round_.ledger, round_.redis = world.ledger(), world.live()
    round_.events = world.events()
    round_.losses, round_.observations = world.losses, world.observations
    for name, count in world.stack.seen()["peak"].items():
        who = name.split(" ")[0]
        if who in round_.plans:
            round_.peaks[who] = max(round_.peaks.get(who, 0), count)
