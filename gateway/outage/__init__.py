"""What a worker does while Redis does not answer.

  spool.py    a worker's spool: appends, its bound, disk trouble, batches for the replay
  commit.py   group commit: records that wait to be on disk share an fsync
  files.py    the spool directory: files made, locked, and adopted when their process has died
  segment.py  the records of one file: format, recovery, what is replayed already
  local.py    `outage: local`: the share of each limit that this process gives out by itself
  memory.py   what stands in for a spool where there is no directory for one
  entries.py  what is written down, and what it means to Redis
  decide.py   one request while Redis is away: may it pass, and is that written down
  replay.py   counts what was written down, once, when Redis is back

`closed` refuses, `open` admits as long as the spool takes it, `local` admits within its share; both
spool what they admitted, and the replay counts it in Redis once it is back. May import `core`, and
of the gateway the batch that `entries` writes down.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.outage.memory import MemoryJournal
from gateway.outage.spool import Spool


def open_journal(
    directory: str | None, max_bytes: int, report: Callable[[str, int], None]
) -> Spool | MemoryJournal:
    """The spool in `directory`; without one, a journal that ends with this process."""
    if directory is None:
        return MemoryJournal()
    return Spool(directory, max_bytes, report=report)
