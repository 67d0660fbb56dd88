"""All processes' metrics as one page in the Prometheus text format."""

from __future__ import annotations

from pathlib import Path

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from core.telemetry.directory import reaped

CONTENT_TYPE = CONTENT_TYPE_LATEST


def render(directory: Path) -> bytes:
    """The metrics of every process that shares `directory`, summed (gauges by their own rule).

    Blocking (reads every process's files): call it in a thread. Processes found dead are reaped
    first, so a killed worker's requests in flight disappear and its totals stay.

    Raises:
        OSError: the directory is gone or not readable.
    """
    with reaped(directory):
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(directory))  # type: ignore[no-untyped-call]
        return generate_latest(registry)
