"""Redis comes back older than the ledger, or loses states: quotas go on from the ledger."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Callable
from decimal import Decimal

from cli.embedded import EmbeddedValkey
from core.keyspace import Keyspace
from tests.acceptance.catalogue import config, plan
from tests.acceptance.conftest import NewDatabase
from tests.acceptance.test_wiped_redis import ledger_stands_still
from tests.support import free_port, wait_until
from tests.support.door import Door
from tests.support.servers import server_directory
from tests.support.stack import Stack, Subscriber, start_stack

LIMIT = 20
CONFIG = config(plan("small", "monthly: {period: billing, limit: 20}"))
DEADLINE_S = 30
SEEDED = "tallygate_states_seeded_total"


def use(stack: Stack, who: Subscriber, times: int) -> list[int]:
    return [
        stack.get("/api/x", who.key, headers={"x-who": who.id}).status_code for _ in range(times)
    ]


def used(stack: Stack, who: Subscriber, times: int, total: int) -> None:
    """So many requests, which are all admitted, and in the ledger afterwards."""
    assert use(stack, who, times) == [200] * times
    stack.flushed(who, total)
    stack.quiet()


def ready(stack: Stack) -> None:
    """A gateway is ready when it has found Redis again."""
    wait_until(lambda: stack.get("/-/readyz").status_code == 200, DEADLINE_S, "ready")


def test_an_older_file_put_back(own_stack: Callable[..., Stack]) -> None:
    stack = own_stack(CONFIG)
    who, new, idle = (stack.subscribe("small") for _ in range(3))
    used(stack, who, 10, 10)
    used(stack, idle, 3, 3)
    data, backup = stack.valkey.data_dir, stack.valkey.data_dir.with_name("backup")
    stack.valkey.stop()
    subprocess.run(["cp", "-a", str(data), str(backup)], check=True)
    stack.valkey.restart()
    ready(stack)
    used(stack, who, 8, 18)
    used(stack, new, 4, 4)
    first = [("monthly", "warning", 80), ("monthly", "warning", 90)]
    assert stack.events(who) == first

    stack.valkey.stop()
    data.rename(data.with_name("newer"))
    backup.rename(data)
    stack.valkey.restart()
    ready(stack)
    assert stack.state(who)["requests"].total == 10  # this is what Redis believes
    assert stack.state(new) == {}
    # what stands in the ledger goes on standing there, before anybody calls
    assert stack.ledger(who)["requests"].total == 18

    rest = [("monthly", "critical", 95), ("monthly", "critical", 100)]
    assert stack.reconciler is not None
    with ledger_stands_still(stack):
        assert use(stack, who, 6) == [200, 200, 429, 429, 429, 429]
        # in the stream itself, not only in the table, which would swallow a repetition
        assert stack.stream(who) == rest
        assert use(stack, new, LIMIT) == [200] * (LIMIT - 4) + [429] * 4
        assert use(stack, idle, 1) == [200]
    stack.flushed(who, LIMIT)
    stack.flushed(new, LIMIT)
    stack.flushed(idle, 4)
    stack.quiet()
    wait_until(lambda: stack.events(who) == first + rest, what="each threshold once")
    assert stack.ledger_hours(who)["requests"].total == LIMIT
    assert stack.served(who.id) == stack.served(new.id) == LIMIT
    # one was behind, one was not there; the third was compared and left as it is
    wait_until(lambda: stack.metric(SEEDED, kind="rebuilt") == 1, what="one state rebuilt")


def test_a_replica_is_promoted_that_lacks_the_last_writes(new_database: NewDatabase) -> None:
    with (
        server_directory() as folder,
        start_stack(folder, CONFIG, new_database(), gateways=(), reconcilers=0) as stack,
        Door(stack.valkey.url) as door,
    ):
        import redis

        # the same password, as it is in the URL
        primary, home = stack.valkey, folder / "replica"
        home.mkdir(mode=0o700)
        password = primary.data_dir / "password"
        subprocess.run(["cp", "-a", str(password), str(home)], check=True)
        replica = EmbeddedValkey(
            home,
            port=free_port(),
            config={
                "replicaof": f"127.0.0.1 {primary.port}",
                "masterauth": password.read_text().strip(),
            },
        )
        with replica, redis.Redis.from_url(replica.url) as other:
            stack.env["TALLYGATE_REDIS_URL"] = door.url  # type: ignore[index]
            stack.start_gateway(2).wait_for_http(stack.url("/-/readyz"))
            stack.start_reconciler()
            who = stack.subscribe("small")
            used(stack, who, 10, 10)
            key = Keyspace().state(who.id)
            wait_until(lambda: other.hget(key, "ver") == b"10", DEADLINE_S, "replicated")
            assert replica.process is not None
            replica.process.send_signal(signal.SIGSTOP)
            used(stack, who, 8, 18)
            primary.kill()
            door.set("shut")
            replica.process.send_signal(signal.SIGCONT)
            other.replicaof("NO", "ONE")
            lacks = other.hget(key, "ver")
            door.lead_to(replica.url)
            door.set("open")
            assert other.hget(key, "ver") == lacks
            wait_until(lambda: use(stack, who, 1) != [503], DEADLINE_S, "a decision")
            assert 429 in use(stack, who, 4)
            stack.flushed(who, LIMIT)
            assert stack.served(who.id) == LIMIT
            assert stack.ledger_hours(who)["requests"].total == LIMIT
            wait_until(
                lambda: (
                    stack.events(who)
                    == [
                        ("monthly", kind, percent)
                        for kind, percent in (
                            ("warning", 80),
                            ("warning", 90),
                            ("critical", 95),
                            ("critical", 100),
                        )
                    ]
                ),
                what="each threshold once",
            )


def test_a_state_evicted_before_it_was_flushed_is_survived_and_reported(
    own_stack: Callable[..., Stack],
) -> None:
    stack = own_stack(CONFIG)
    who = stack.subscribe("small")
    used(stack, who, 10, 10)
    with ledger_stands_still(stack):
        assert use(stack, who, 3) == [200] * 3
        assert stack.redis.delete(Keyspace().state(who.id)) == 1
    # three are lost, as is said; the quota goes on from what the ledger has
    wait_until(lambda: stack.metric("tallygate_states_lost_total") == 1, what="reported")
    assert stack.reconciler is not None
    output = stack.reconciler.wait_for_output("state_lost")
    told = [json.loads(line) for line in output.splitlines() if "state_lost" in line]
    assert [line["subject"] for line in told] == [who.id]
    assert use(stack, who, LIMIT) == [200] * (LIMIT - 10) + [429] * 10
    stack.flushed(who, LIMIT)
    stack.quiet()


def test_a_server_that_evicts_loses_what_was_not_flushed_and_no_more(
    own_stack: Callable[..., Stack],
) -> None:
    """`allkeys-lru` is a wrong setting. With it states vanish, in use or not."""
    stack = own_stack(CONFIG)
    subscribers = [stack.subscribe("small") for _ in range(3)]
    for who in subscribers:
        used(stack, who, 12, 12)
    stack.redis.config_set("maxmemory-policy", "allkeys-lru")
    memory = int(stack.redis.info("memory")["used_memory"])
    stack.redis.config_set("maxmemory", memory + 512 * 1024)

    def all_evicted() -> bool:
        with stack.redis.pipeline(transaction=False) as pipe:
            for number in range(50):
                pipe.set(f"other:{stack.redis.time()[1]}:{number}", b"x" * 16_384)
            pipe.execute(raise_on_error=False)
        return all(stack.hash(who) == {} for who in subscribers)

    try:
        wait_until(all_evicted, DEADLINE_S, "every state is evicted")
    finally:
        stack.redis.config_set("maxmemory", 0)
        stack.redis.config_set("maxmemory-policy", "noeviction")
    for who in subscribers:
        assert use(stack, who, 10) == [200] * 8 + [429] * 2
        stack.flushed(who, LIMIT)
        assert stack.ledger_hours(who)["requests"].total == Decimal(LIMIT)
