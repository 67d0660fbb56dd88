"""The data plane: decides each request and proxies what is admitted; no Postgres on the hot path.

`__main__` supervises the workers, `worker` runs one, `app` is its composition root, `responder`
carries one request from match to answer, `runtime` is a configuration compiled for it. May import
`core` and `lua`; never `control`, `reconciler` or `cli`.
"""
