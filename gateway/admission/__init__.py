"""Admission in the gateway: from a matched request to a decision.

`check` is what travels, `batcher` gathers the checks of one event-loop tick into one EVALSHA,
`limiter` turns a subscription, a plan and a route into a check and its answer into a `Decision`,
`leases` gives concurrency slots back, `settler` settles reservations and `charge` says when. May
import `core`, `gateway.answers` and `gateway.outage`.
"""
