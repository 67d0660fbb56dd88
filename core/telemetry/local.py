"""The hot path's metrics: plain ints and lists, moved into the shared files twice a second.

One write to a prometheus_client value takes a lock, packs two doubles and touches mapped memory,
about 3 µs with its label look-up; a request makes half a dozen. Here a count is one dict update.
Single-threaded: use from the event loop only. What a SIGKILL leaves: up to `FLUSH_INTERVAL_S` of
counts are missing from the metrics (never from the ledger, which does not depend on them).
"""

from __future__ import annotations

import asyncio
import atexit
import os
import weakref
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable

from prometheus_client import Counter

from core.telemetry import logs
from core.telemetry.metrics import BatchHistogram, Metrics

# Finer than any scrape interval, and one flush of some hundred series costs about a millisecond.
FLUSH_INTERVAL_S = 0.5


class LocalHistogram:
    """Buckets in a list. `observe` is its hot method."""

    __slots__ = ("_bounds", "_counts", "_sum", "_target")

    def __init__(self, target: BatchHistogram) -> None:
        self._target = target
        self._bounds = target.bounds
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """One observation in the metric's unit (seconds, checks)."""
        # The first bound that is not below the value: bounds are inclusive ("le").
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def flush(self) -> None:
        counts, total = self._counts, self._sum
        self.discard()
        if any(counts):
            self._target.add(counts, total)

    def discard(self) -> None:
        self._counts = [0] * (len(self._bounds) + 1)
        self._sum = 0.0


class LocalCounter:
    """Counts by label values; the labels of the catalogue's counter, in its order."""

    __slots__ = ("_children", "_target", "pending")

    def __init__(self, target: Counter) -> None:
        self._target = target
        self._children: dict[tuple[str, ...], Counter] = {}
        self.pending: defaultdict[tuple[str, ...], int] = defaultdict(int)

    def inc(self, *labels: str) -> None:
        self.pending[labels] += 1

    def add(self, count: int, *labels: str) -> None:
        self.pending[labels] += count

    def flush(self) -> None:
        counts = self.pending
        if not counts:
            return
        self.discard()
        for labels, count in counts.items():
            child = self._children.get(labels)
            if child is None:
                child = self._children[labels] = self._target.labels(*labels)
            child.inc(count)

    def discard(self) -> None:
        self.pending = defaultdict(int)


class LocalMetrics:
    """What one gateway worker counts.

    Hot: `record`, `admission.observe`, `admission_batch.observe`, `upstream(name).observe` (keep
    the histogram, do not look it up a request), the counters' `inc`, and `in_flight += 1`.
    """

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self.in_flight = 0
        self._requests = LocalCounter(metrics.requests)
        self.admission = LocalHistogram(metrics.admission_seconds)
        self.admission_batch = LocalHistogram(metrics.admission_batch_size)
        self.limit_events = LocalCounter(metrics.limit_events)  # inc(kind)
        self.redis_errors = LocalCounter(metrics.redis_errors)  # inc(kind)
        self.key_cache_hits = LocalCounter(metrics.key_cache_hits)  # inc(kind)
        self.key_cache_misses = LocalCounter(metrics.key_cache_misses)  # inc(kind)
        self.upstream_errors = LocalCounter(metrics.upstream_errors)  # inc(upstream, kind)
        self.costs_settled = LocalCounter(metrics.costs_settled)  # inc(meter, source, result)
        self.cost_units = LocalCounter(metrics.cost_units)  # add(units, meter, which)
        self.websocket_messages = LocalCounter(metrics.websocket_messages)
        self.websocket_bytes = LocalCounter(metrics.websocket_bytes)
        self.websocket_closed = LocalCounter(metrics.websocket_closed)  # inc(route, who, code)
        self.websockets: defaultdict[str, int] = defaultdict(int)  # open, by route
        self._upstreams: dict[str, LocalHistogram] = {}
        self._timer: asyncio.TimerHandle | None = None
        self.before_flush: Callable[[], object] | None = None  # brings gauges up to date
        reference = weakref.ref(self)
        os.register_at_fork(after_in_child=lambda: _discard_after_fork(reference))
        atexit.register(_flush_at_exit, reference)

    def record(self, route: str, plan: str, outcome: str) -> None:
        """One answered request; `outcome` is one of those listed at `Metrics.requests`."""
        self._requests.pending[route, plan, outcome] += 1

    def upstream(self, name: str) -> LocalHistogram:
        """The response times of one upstream, in seconds."""
        histogram = self._upstreams.get(name)
        if histogram is None:
            child = self._metrics.upstream_seconds.labels(name)
            histogram = self._upstreams[name] = LocalHistogram(child)
        return histogram

    def flush(self) -> None:
        """Moves everything counted since the last call into the shared files."""
        if self.before_flush is not None:
            self.before_flush()
        for part in self._parts():
            part.flush()
        self._metrics.requests_in_flight.set(self.in_flight)
        for route, count in self.websockets.items():
            self._metrics.websockets.labels(route).set(count)
        dropped = logs.take_dropped()
        if dropped:
            self._metrics.log_lines_dropped.inc(dropped)

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Flushes every `FLUSH_INTERVAL_S` on this loop until `stop`."""
        self.flush()
        self._timer = loop.call_later(FLUSH_INTERVAL_S, self.start, loop)

    def stop(self) -> None:
        """A last flush, and no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.flush()

    def _parts(self) -> list[LocalCounter | LocalHistogram]:
        return [
            self._requests,
            self.admission,
            self.admission_batch,
            self.limit_events,
            self.redis_errors,
            self.key_cache_hits,
            self.key_cache_misses,
            self.upstream_errors,
            self.costs_settled,
            self.cost_units,
            self.websocket_messages,
            self.websocket_bytes,
            self.websocket_closed,
            *self._upstreams.values(),
        ]

    def _discard(self) -> None:
        # A forked child must not report its parent's counts a second time.
        for part in self._parts():
            part.discard()
        self.in_flight = 0
        self.websockets.clear()
        self._timer = None
        self.before_flush = None


def _discard_after_fork(reference: weakref.ref[LocalMetrics]) -> None:
    local = reference()
    if local is not None:
        local._discard()


def _flush_at_exit(reference: weakref.ref[LocalMetrics]) -> None:
    local = reference()
    if local is not None:
        local.flush()
