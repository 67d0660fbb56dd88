"""The request body on its way upstream: read ahead where it is small, pumped where it is not."""

from __future__ import annotations

import asyncio
from typing import Final

from gateway.http.errors import BadRequest, ExchangeError, PayloadTooLarge
from gateway.http.exchange import Exchange
from gateway.proxy.connection import NO_TRAILER, UpstreamConnection
from gateway.proxy.request import NOT_IN_TRAILERS
from gateway.proxy.watch import Flight

_NO_TRAILER: Final = NO_TRAILER | NOT_IN_TRAILERS

# So much of a request body, or all of it, is read before an upstream connection is taken: cheaper
# than a second task, and who sends nothing holds no connection. Its price is that an upstream does
# not see less of a body than this before its end.
INLINE_BODY: Final = 64 * 1024


async def read_body(flight: Flight, length: int, most: int) -> tuple[bytes, bool]:
    """The body, or the first `INLINE_BODY` bytes or more of it, framed as it is sent; and whether
    that was all.

    Raises:
        RequestTimeout: it stopped arriving.
        ClientDisconnected: the client went away before its end.
        BadRequest: it is not framed as it should be.
        PayloadTooLarge: it is longer than `most` bytes.
    """
    exchange = flight.exchange
    flight.blocked = task = asyncio.current_task()
    chunks: list[bytes] = []
    complete = False
    try:
        while flight.bytes_in < INLINE_BODY:
            flight.await_client_body()
            chunk = await exchange.read()
            if not chunk:
                complete = True
                break
            chunks.append(chunk)
            flight.bytes_in += len(chunk)
            if flight.bytes_in > most:
                raise PayloadTooLarge(f"a body of more than {most} bytes")
            if flight.bytes_in == length:
                complete = True
                break
    except asyncio.CancelledError:
        if flight.error is None or task is None:
            raise
        task.uncancel()
        raise flight.error from None
    finally:
        flight.blocked = None
        flight.deadline = 0
    body = chunks[0] if len(chunks) == 1 else b"".join(chunks)
    if length >= 0:
        return body, complete
    return (_framed(body) if body else b"") + (_last_chunk(exchange) if complete else b""), complete


async def send_body(flight: Flight, conn: UpstreamConnection, length: int, most: int) -> None:
    """Pump the rest of the request body, at the slower one's pace; `length` is -1 for chunked.

    What goes over `most` bytes is not sent, and ends the relay. Ends without error when the
    connection is closed: the relay learns it from the connection.
    """
    exchange = flight.exchange
    await _drained(flight, conn)
    while not conn.closed:
        flight.await_client_body()
        try:
            chunk = await exchange.read()
        except ExchangeError as error:
            flight.abort(error)
            return
        if not chunk:
            break
        flight.bytes_in += len(chunk)
        if flight.bytes_in > most:
            flight.abort(PayloadTooLarge(f"a body of more than {most} bytes"))
            return
        conn.write(chunk if length >= 0 else _framed(chunk))
        await _drained(flight, conn)
        if flight.bytes_in == length:
            break
    if conn.closed:
        return
    if length < 0:
        conn.write(_last_chunk(exchange))
    elif flight.bytes_in != length:
        # The parser frames the body, so this cannot be; if it were, the upstream must not wait.
        flight.abort(BadRequest("the body does not have the announced length"))
        return
    flight.body_sent = True
    flight.await_upstream()


async def _drained(flight: Flight, conn: UpstreamConnection) -> None:
    if conn.must_drain:
        flight.await_upload()
        await conn.drain()


def _last_chunk(exchange: Exchange) -> bytes:
    """The end of a chunked body, with the client's trailer fields if it sent some."""
    lines = [
        b"%b: %b\r\n" % (name, value)
        for name, value in exchange.trailers
        if name not in _NO_TRAILER and b"\r" not in value and b"\n" not in value
    ]
    return b"0\r\n%b\r\n" % b"".join(lines)


def _framed(chunk: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(chunk), chunk)
