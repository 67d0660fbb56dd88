"""The background: copies live counters into the ledger and stores limit events.

`__main__` runs the process, `worker` supervises its tasks, `flush` is the way of a count into
Postgres, `events` that of a limit event, `snapshot` reads a state hash, `rows` makes ledger rows of
it, `idle` takes out of Redis who has not called for long. May import `core` and `lua`; never
`gateway`, `control` or `cli`.
"""
