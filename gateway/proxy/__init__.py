"""The reverse-proxy half of the gateway: what happens to a request once it is admitted.

target.py      addresses of an upstream, and what is known of each
connection.py  one upstream connection: framing, buffering, flow control
connect.py     opens one: TCP, TLS, unix socket
opener.py      opens one to a target, or else to another
pool.py        keep-alive connections of one upstream, and the queue for them
endpoints.py   which targets there are, and which of them get requests
balance.py     which of those gets this one
resolve.py     names to addresses, in the background
health.py      active checks
eject.py       passive ejection of targets that fail
breaker.py     a rest for an upstream that fails
judge.py       what each try says about both
attempts.py    the tries of one request
body.py        the request body on its way
retry.py       what may be tried again, and the budget
report.py      transitions as log lines and metrics
headers.py     response header rules and what requests and responses share
request.py     the upstream request head, compiled per route
watch.py       one timer for all requests: time-outs and clients that went away
relay.py       one request there and its answer back: the entry point
errors.py      everything that can go wrong, with the status to answer

May import `core` and `gateway.forwarded`; never `control`, `reconciler` or `cli`, and nothing of
admission: the relay knows neither keys nor limits.
"""
