"""The background: copies live counters into the ledger and stores limit events.

`__main__` runs the process, `worker` puts its tasks together, `supervise` repeats them, `lease`
says which process works, `flush` is the way of a count into Postgres, `events` that of a limit
event, `periods` seals what has ended, `retention` turns old hours into days, `snapshot` reads a
state hash. May import `core` and
`lua`; never `gateway`, `control` or `cli`.
"""
