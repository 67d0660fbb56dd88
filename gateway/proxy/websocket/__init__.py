"""WebSockets (RFC 6455) through the gateway, from handshake to close.

handshake.py  what a client asks for, what the upstream is asked, and whether its answer fits
frames.py     finds frames, messages and closes in a stream of bytes; nothing is decoded
side.py       one end of a tunnel: passes on what the other sends, counted first where it costs
tunnel.py     both ends together: how a connection ends, and what each end is told
watch.py      one timer for all tunnels: who is idle, who does not take its leave

Knows neither keys nor limits: what is to be counted is asked through a function.
"""
