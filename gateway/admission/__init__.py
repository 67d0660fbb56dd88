"""Admission in the gateway: from a matched request to a decision.

`batcher` gathers the checks of one event-loop tick into one EVALSHA, `limiter` turns a
subscription, a plan and a route into a check and its answer into a `Decision`, `seeder` answers
cold subjects from the ledger, `leases` gives concurrency slots back. May import `core` and
`gateway.answers`.
"""
