"""Keys known to this process: digest -> KeyEntry, bounded, with O(1) hits.

Eviction is second-chance (CLOCK): a hit only sets a flag, and the hand passes over flagged entries
once. Unlike least-recently-used order that costs a hit no write to a shared structure, and unlike
an OrderedDict no 100 bytes a key. Unknown keys live in a map of their own with its own bound, so
that somebody who tries made-up keys cannot push good ones out.

Subscriptions are shared by their keys and replaced, never changed: a request that took
`entry.subscription` sees one state of it to its end.

Single-threaded: used from one event loop.
"""

from __future__ import annotations

import sys
from collections import OrderedDict
from collections.abc import Iterator

from core.directory import KeyRow, SubscriptionRow
from core.policy import Status

# A hand that meets only flagged entries gives up after so many and evicts the next one: an
# insertion must not walk 100,000 entries while requests wait.
_MAX_HAND_STEPS = 128


class Subscription:
    """What the gateway needs of a subscription; shared by all its cached keys.

    `period_start_ms` and `period_end_ms` are the limiter's to fill (0: not yet computed); a
    changed subscription comes as a new object with both 0. Identifiers of plan, status and creator
    are shared between objects.
    """

    __slots__ = (
        "anchor_ms",
        "creator_id",
        "customer_id",
        "id",
        "period_end_ms",
        "period_months",
        "period_start_ms",
        "plan",
        "status",
    )

    def __init__(self, row: SubscriptionRow) -> None:
        self.id = row.id
        self.plan = sys.intern(row.plan)
        self.status: Status = row.status
        self.anchor_ms = row.anchor_ms
        self.customer_id = row.customer_id
        self.creator_id = sys.intern(row.creator_id)
        self.period_start_ms = 0
        self.period_end_ms = 0
        self.period_months = 0

    def matches(self, row: SubscriptionRow) -> bool:
        """Whether `row` says the same."""
        return (
            self.plan == row.plan
            and self.status is row.status
            and self.anchor_ms == row.anchor_ms
            and self.customer_id == row.customer_id
            and self.creator_id == row.creator_id
        )


class KeyEntry:
    """A key that exists. `expires_at_ms` 0: never; `fresh_until_ms`: look it up again after."""

    __slots__ = ("active", "expires_at_ms", "fresh_until_ms", "referenced", "subscription")

    def __init__(
        self, subscription: Subscription, active: bool, expires_at_ms: int, fresh_until_ms: int
    ) -> None:
        self.subscription = subscription
        self.active = active
        self.expires_at_ms = expires_at_ms
        self.fresh_until_ms = fresh_until_ms
        self.referenced = False


class KeyCache:
    """Up to `size` keys and up to `negative_size` digests known to be no key.

    Times are epoch milliseconds and come from the caller. `evictions` counts for the metrics.
    """

    def __init__(
        self,
        *,
        size: int = 100_000,
        ttl_ms: int = 300_000,
        negative_size: int = 10_000,
        negative_ttl_ms: int = 30_000,
    ) -> None:
        self.evictions = 0
        self._size = size
        self._ttl_ms = ttl_ms
        self._negative_size = negative_size
        self._negative_ttl_ms = negative_ttl_ms
        self._entries: dict[bytes, KeyEntry] = {}
        # CLOCK's circle of digests. A slot whose digest is no longer cached counts as free.
        self._ring: list[bytes] = []
        self._hand = 0
        self._negative: OrderedDict[bytes, int] = OrderedDict()
        # Subscription id -> its cached digests; alone, a digest stands for itself (a set of one
        # takes 216 bytes).
        self._digests: dict[str, bytes | set[bytes]] = {}
        self._stamp = (0, 0)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, digest: bytes) -> bool:
        """Whether it is cached as a key; does not count as use."""
        return digest in self._entries

    @property
    def negative_count(self) -> int:
        return len(self._negative)

    def get(self, digest: bytes) -> KeyEntry | None:
        """The entry, fresh or not; None when unknown. The hot path."""
        entry = self._entries.get(digest)
        if entry is not None:
            entry.referenced = True
        return entry

    def is_negative(self, digest: bytes, now_ms: int) -> bool:
        """Whether `digest` is known to be no key, as of not long ago."""
        until = self._negative.get(digest)
        if until is None:
            return False
        if until > now_ms:
            return True
        del self._negative[digest]
        return False

    def store(self, row: KeyRow, now_ms: int) -> KeyEntry:
        """Take in what Postgres says of a key now; a known entry is brought up to date in place."""
        self._negative.pop(row.digest, None)
        subscription = self._adopt(row.subscription)
        fresh_until_ms = self._fresh_until(now_ms)
        entry = self._entries.get(row.digest)
        if entry is None:
            self._make_room(row.digest)
            entry = KeyEntry(subscription, row.active, row.expires_at_ms, fresh_until_ms)
            self._entries[row.digest] = entry
            self._index(subscription.id, row.digest)
            return entry
        if entry.subscription.id != subscription.id:
            self._unindex(entry.subscription.id, row.digest)
            self._index(subscription.id, row.digest)
        entry.subscription = subscription
        entry.active = row.active
        entry.expires_at_ms = row.expires_at_ms
        entry.fresh_until_ms = fresh_until_ms
        return entry

    def store_negative(self, digest: bytes, now_ms: int) -> None:
        """Take in that there is no such key."""
        self.drop(digest)
        if self._negative_ttl_ms <= 0 or self._negative_size <= 0:
            return
        if len(self._negative) >= self._negative_size:
            self._negative.popitem(last=False)
        self._negative[digest] = now_ms + self._negative_ttl_ms

    def update_subscription(self, row: SubscriptionRow) -> None:
        """Take in what Postgres says of a subscription now; all its cached keys follow."""
        if row.id in self._digests:
            self._adopt(row)

    def drop(self, digest: bytes) -> None:
        """Forget all that is known of a digest."""
        self._negative.pop(digest, None)
        entry = self._entries.pop(digest, None)
        if entry is not None:
            self._unindex(entry.subscription.id, digest)

    def drop_subscription(self, subscription_id: str) -> None:
        """Forget all keys of a subscription."""
        for digest in list(self.digests_of(subscription_id)):
            self.drop(digest)

    def has_subscription(self, subscription_id: str) -> bool:
        return subscription_id in self._digests

    def digests(self) -> list[bytes]:
        """All digests cached as keys."""
        return list(self._entries)

    def drop_negatives(self) -> None:
        """Forget what is known to be no key."""
        self._negative.clear()

    def digests_of(self, subscription_id: str) -> Iterator[bytes]:
        """The cached digests of a subscription."""
        held = self._digests.get(subscription_id)
        if held is None:
            return iter(())
        return iter((held,)) if isinstance(held, bytes) else iter(held)

    def _fresh_until(self, now_ms: int) -> int:
        # One integer object for all rows of a batch: 32 bytes less a key.
        if self._stamp[0] != now_ms:
            self._stamp = (now_ms, now_ms + self._ttl_ms)
        return self._stamp[1]

    def _adopt(self, row: SubscriptionRow) -> Subscription:
        """The shared object for `row`; keys that hold an outdated one are moved to it."""
        current = None
        for digest in self.digests_of(row.id):
            current = self._entries[digest].subscription
            break
        if current is not None and current.matches(row):
            return current
        adopted = Subscription(row)
        for digest in self.digests_of(row.id):
            self._entries[digest].subscription = adopted
        return adopted

    def _index(self, subscription_id: str, digest: bytes) -> None:
        held = self._digests.get(subscription_id)
        if held is None:
            self._digests[subscription_id] = digest
        elif isinstance(held, bytes):
            self._digests[subscription_id] = {held, digest}
        else:
            held.add(digest)

    def _unindex(self, subscription_id: str, digest: bytes) -> None:
        held = self._digests[subscription_id]
        if isinstance(held, set):
            held.discard(digest)
            if held:
                return
        del self._digests[subscription_id]

    def _make_room(self, digest: bytes) -> None:
        """Find `digest` a place in the ring, evicting at most one entry."""
        ring = self._ring
        if len(ring) < self._size:
            ring.append(digest)
            return
        for step in range(_MAX_HAND_STEPS):
            position = self._hand
            self._hand = (position + 1) % len(ring)
            candidate = ring[position]
            entry = self._entries.get(candidate)
            if entry is None:
                ring[position] = digest
                return
            if not entry.referenced or step == _MAX_HAND_STEPS - 1:
                self.drop(candidate)
                self.evictions += 1
                ring[position] = digest
                return
            entry.referenced = False
