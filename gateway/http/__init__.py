"""The client's side of the gateway: sockets, HTTP framing, time-outs of idle and slow clients.

message.py   a request as it was sent; status lines and the Date field
exchange.py  one request and its answer, whatever protocol the client speaks: what handlers get
h1.py        HTTP/1.1 connections; h1_reader.py, h1_exchange.py: how requests are read with llhttp,
             and how they are answered
h2.py        HTTP/2 connections; h2_request.py, h2_exchange.py, h2_guard.py: what is asked, how it
             is answered, and what a client may cost
tls.py       accepting connections of TLS; choice.py: which protocol is spoken on one
base.py      what the server knows of a connection of either protocol
body.py      a request body on its way from the socket to the handler, with back-pressure
server.py    listening, limits, sweeping, draining
errors.py    what a client can do wrong once its request is being answered

May import `core` only: it knows neither routes nor keys nor upstreams.
"""
