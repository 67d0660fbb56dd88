"""What a worker does while Redis does not answer.

  segment.py  one file of the spool: format, recovery after a crash, what is already replayed
  spool.py    a worker's spool: durable appends, its size, disk trouble, batches for the replay
  local.py    `outage: local`: the share of each limit that this process gives out by itself

`closed` refuses, `open` admits as long as the spool takes it, `local` admits within its share; both
spool what they admitted, and the replay counts it in Redis once it is back. Neither file knows
Redis, routes or answers. May import `core`; nothing else of the gateway.
"""
