"""The background: copies live counters into the ledger and stores limit events.

`__main__` runs the process, `worker` puts its tasks together, `supervise` repeats them, `lease`
says which process works, `flush` is the way of a count into Postgres, `events` that of a limit
event, `ingested` that of a usage event; `reservations` takes back what nobody settled, `periods`
seals what has ended, `retention` turns old hours into days, `idle` takes out of Redis who has not
called for long, `snapshot` reads a state hash, `rows` makes ledger rows of it. May import `core`
and `lua`; never `gateway`, `control` or `cli`.
"""
