"""What a worker does while Redis does not answer.

  spool.py    a worker's spool: appends, its bound, disk trouble, batches for the replay
  commit.py   group commit: records that wait to be on disk share an fsync
  files.py    the spool directory: files made, locked, and adopted when their process has died
  segment.py  the records of one file: format, recovery, what is replayed already
  local.py    `outage: local`: the share of each limit that this process gives out by itself

`closed` refuses, `open` admits as long as the spool takes it, `local` admits within its share; both
spool what they admitted, and the replay counts it in Redis once it is back. Nothing here knows
Redis, routes or answers. May import `core`; nothing else of the gateway.
"""
