"""What a configuration is compiled to for the worker."""

from __future__ import annotations

import pytest

from core.config import loads
from gateway.runtime import Runtime

CONFIG = """
gateway: {outage: {spool_dir: /var/spool/tallygate}}
meters: {tokens: {}}
upstreams: {live: {urls: ["http://127.0.0.1:9000"]}}
routes:
  - match: {path: /frames}
    upstream: live
    charge: %s
    outage: open
    websocket: {meters: {requests: {per: message, from: client}}}
  - match: {path: /tokens}
    upstream: live
    charge: %s
    outage: open
    meters: {tokens: {estimate: 5, from: {header: x-tokens}}}
plans: {free: {unlimited: true}}
"""


@pytest.mark.parametrize("charge", ["on_admit", "on_response"])
def test_in_an_outage_only_what_its_answer_decides_waits_for_it(charge: str) -> None:
    runtime = Runtime(loads(CONFIG % (charge, charge), env={}), {})
    waits = charge == "on_response"
    for path in ("/frames", "/tokens"):
        route = runtime.router.match(path, "GET", "")
        assert route is not None
        on_route = route.plans["free"]  # type: ignore[union-attr]
        assert on_route.admission.outage.waits is waits
        if on_route.metering is not None:
            message = on_route.metering.admission("client", 1, 20)
            assert message is not None
            assert message.outage.waits is False, "a message is journalled before it is passed on"
