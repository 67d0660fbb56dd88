"""The only place where a Redis key or a field of a subject's hash is spelled.

A *subject* is what is counted: a subscription id, or `ip:<plan>:<address>` on keyless routes. All
keys of a subject share one hash tag with the list of changed subjects and the event stream of its
*shard*, because one script call must write all of them atomically, also on Redis Cluster, where a
script may only touch one slot. A single node has one shard.

`tg1` is the version of this layout: a layout that is not compatible gets another number and
starts from the ledger.
"""

from __future__ import annotations

from binascii import crc32
from dataclasses import dataclass

PREFIX = "tg1"

# Fields of a subject's hash. Numbers inside one field are separated by one space.
VERSION = "ver"  # grows by one with each admitted check
EPOCH = "epoch"  # generation of the state: grows whenever it had to be seeded from the ledger
RUN = "run"  # run of the Redis server in which the state was compared with the ledger
BOUNDS = "p:"  # p:<meter>            start and end of the billing period, start of the hour
METER = "m:"  # m:<meter>             total, overage, total and overage of the hour, updates
CALENDAR = "q:"  # q:<meter>:<kind>   start, total, count at the last update
RATE = "r:"  # r:<limit>              last µs, backlog, unit
FIXED = "w:"  # w:<limit>             window start, count
SLIDING = "s:"  # s:<limit>           window start, count, count of the window before
FIRED = "t:"  # t:<limit>             period start, highest threshold fired in percent, the limit
CLOSED_HOUR = "ch:"  # ch:<meter>:<period start>:<hour>   total, overage; until flushed
CLOSED_PERIOD = "cp:"  # cp:<meter>:<period start>        end, total, overage; until flushed
RESERVED = "v:"  # v:<id>   expiry, time, then each meter's name, cost[/kept], period, hour, cap
EXPIRED = "x:"  # x:<id>    what a reservation was that expired, for a settlement that comes late


@dataclass(frozen=True, slots=True)
class Keyspace:
    """Spells keys for a deployment of `shards` shards (1 on a single node)."""

    shards: int = 1

    def shard(self, subject: str) -> int:
        """The shard of a subject, stable across processes and releases."""
        return crc32(subject.encode()) % self.shards if self.shards > 1 else 0

    def state(self, subject: str) -> str:
        """Hash: all counters of the subject."""
        return f"{PREFIX}:{{{self.shard(subject)}}}:s:{subject}"

    def states(self) -> str:
        """Pattern that every state key matches, for SCAN; `subject_of` tells whether it is one."""
        return f"{PREFIX}:{{*}}:s:*"

    def leases(self, subject: str, limit: str) -> str:
        """Sorted set: lease id by expiry in ms, one a concurrency limit."""
        return f"{PREFIX}:{{{self.shard(subject)}}}:l:{limit}:{subject}"

    def dirty(self, shard: int) -> str:
        """Sorted set: state keys with unflushed changes, by the ms of the first such change."""
        return f"{PREFIX}:{{{shard}}}:dirty"

    def due(self, shard: int) -> str:
        """Sorted set: `<reservation id> <state key>` by expiry in ms."""
        return f"{PREFIX}:{{{shard}}}:due"

    def sender(self, shard: int, name: str) -> str:
        """Text: the last numbered batch of a worker, a resolver or a spool that was applied."""
        return f"{PREFIX}:{{{shard}}}:w:{name}"

    def claim(self, subject: str) -> str:
        """Text: a subject without state is being rebuilt; gone when it is."""
        return f"{PREFIX}:{{{self.shard(subject)}}}:c:{subject}"

    def ingested(self, shard: int) -> str:
        """Stream: usage events that were counted, until stored in Postgres."""
        return f"{PREFIX}:{{{shard}}}:ingested"

    def event(self, subject: str, event_id: str) -> str:
        """Text: a usage event of this id was counted; kept until a while after it is stored."""
        return f"{PREFIX}:{{{self.shard(subject)}}}:e:{subject}:{event_id}"

    def idle(self, shard: int) -> str:
        """Sorted set: state keys of clean subjects, by the ms at which they became clean."""
        return f"{PREFIX}:{{{shard}}}:idle"

    def events(self, shard: int) -> str:
        """Stream: thresholds crossed and periods reset, until stored in Postgres."""
        return f"{PREFIX}:{{{shard}}}:events"


def subject_of(state_key: str) -> str:
    """The subject whose hash `state_key` is.

    Raises:
        ValueError: the key is not a state key of this layout.
    """
    head, marker, subject = state_key.partition(":s:")
    if not marker or not head.startswith(PREFIX + ":{"):
        raise ValueError(f"{state_key!r} is not a state key of layout {PREFIX}")
    return subject
