"""The client's side of the gateway: sockets, HTTP framing, time-outs of idle and slow clients.

message.py   a request as it was sent; status lines and the Date field
exchange.py  one request and its answer, whatever protocol the client speaks: what handlers get
h1.py        HTTP/1.1 connections, parsed by llhttp
body.py      a request body on its way from the socket to the handler, with back-pressure
server.py    listening, limits, sweeping, draining
errors.py    what a client can do wrong once its request is being answered

May import `core` only: it knows neither routes nor keys nor upstreams.
"""
