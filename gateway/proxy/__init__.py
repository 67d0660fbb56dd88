"""The reverse-proxy half of the gateway: what happens to a request once it is admitted.

connection.py  one upstream connection: framing, buffering, flow control
pool.py        keep-alive connections of one upstream
headers.py     response header rules and what requests and responses share
request.py     the upstream request head, compiled per route
watch.py       one timer for all requests: time-outs and clients that went away
relay.py       one request there and its answer back: the entry point
errors.py      everything that can go wrong, with the status to answer

May import `core` and `gateway.forwarded`; never `control`, `reconciler` or `cli`, and nothing of
admission: the relay knows neither keys nor limits.
"""
