"""The control process: operations endpoints now, usage and management APIs beside them.

  __main__.py  command line, configuration, signals, the server
  app.py       composition root: what the process holds, and its Starlette application
  health.py    /healthz, /readyz, /metrics
  problems.py  RFC 9457 answers to errors

Off the hot path: Starlette, redis-py and Postgres. May import `core`; never `gateway`,
`reconciler`, `cli`, nor a store's driver (`core.redis` and `core.db` hold those).
"""
