"""What a client may cost: sizes and times of its requests."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from core.config.base import Section
from core.config.fields import Count, DurationMs, Size, duration, preset
from core.config.rules import MaxBody

# One piece of what a socket delivers is parsed before sizes are compared.
MIN_HEAD = 4096


class ClientSettings(Section):
    """Sizes and times of clients' requests."""

    head_timeout_ms: DurationMs = duration(
        "15s", "head_timeout", "From the first byte of a request's head to its last (408)."
    )
    body_timeout_ms: DurationMs = duration(
        "60s", "body_timeout", "Between two pieces of a request's body (408)."
    )
    idle_timeout_ms: DurationMs = duration(
        "75s",
        "idle_timeout",
        "How long a connection may be idle; longer than a load balancer in front keeps it.",
    )
    max_head: Annotated[Size, Field(ge=MIN_HEAD)] = preset(
        64 * 2**10, "64 KiB", None, "Request line and header fields together (431)."
    )
    max_url: Size = preset(16 * 2**10, "16 KiB", None, "Path and query (414).")
    max_fields: Count = preset(128, 128, None, "Number of header fields (431).")
    max_body: MaxBody = preset(
        10 * 2**20,
        "10 MiB",
        None,
        "A request's body (413), where its route says nothing; or unlimited.",
    )
