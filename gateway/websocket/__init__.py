"""WebSockets as customers use them: admitted, counted, closed when their limits say so.

metering.py  what messages and bytes cost, asked before they are passed on
serve.py     one WebSocket from its handshake to the line in the log
"""
