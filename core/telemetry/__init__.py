"""What the processes say about themselves: log lines and metrics.

  redaction.py   what must never reach a log, as patterns and as field names
  writer.py      a bounded writer that never blocks the event loop
  logs.py        structlog and stdlib logging through both of the above
  directory.py   the shared metrics directory: who writes there, who died
  metrics.py     the catalogue of every metric of every process
  local.py       the hot path's counters, moved into the catalogue twice a second
  exposition.py  all processes' metrics as one Prometheus text page

May import `core.clock`, structlog, orjson and prometheus_client; no store driver, no other package.
"""
