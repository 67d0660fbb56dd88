"""An upstream that keeps the exact bytes it gets: the witness of what the gateway let through.

It reads strictly. Whatever is not a sequence of well-formed HTTP/1.1 requests ends up in `strays`,
so that a smuggled request cannot hide in the slack of a lenient reader.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass, field

from tests.support.threaded import ThreadedServer

_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+) (/[\x21-\x7e\x80-\xff]*|\*) HTTP/1\.1\Z")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+): ([\t\x20-\x7e\x80-\xff]*)\Z")
_MAX = 64 * 1024 * 1024


class _Stray(Exception):
    pass


@dataclass
class Seen:
    """One request as it arrived. Names of fields in lower case, order and repetitions kept."""

    raw: bytes
    method: str
    target: str
    fields: list[tuple[bytes, bytes]]
    body: bytes = b""
    trailers: list[tuple[bytes, bytes]] = field(default_factory=list)

    def get(self, name: str) -> list[str]:
        wanted = name.encode()
        return [value.decode("latin-1") for key, value in self.fields if key == wanted]


class Recorder(ThreadedServer):
    """Answers 200 with the bytes of the request, or with `answers[target]`, raw, after which it
    closes the connection; `/wait` waits for `release()`. `requests` is everything that was read,
    `strays` what nobody should have sent.
    """

    def __init__(self) -> None:
        super().__init__(_MAX)
        self.requests: list[Seen] = []
        self.strays: list[bytes] = []
        self.answers: dict[str, bytes] = {}
        self.connections = 0
        self._gate = asyncio.Event()

    def release(self) -> None:
        """Lets all that waits be answered, now and later."""
        self._loop.call_soon_threadsafe(self._gate.set)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        got = bytearray()
        try:
            while True:
                got.clear()
                seen = await self._read(reader, got)
                self.requests.append(seen)
                if seen.target == "/wait":
                    await self._gate.wait()
                answer = self.answers.get(seen.target)
                if answer is not None:
                    writer.write(answer)
                    break
                body = b"" if seen.method == "HEAD" else seen.raw
                writer.write(
                    b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % len(seen.raw) + body
                )
        except _Stray:
            self.strays.append(bytes(got))
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            if got or getattr(error, "partial", b""):
                self.strays.append(bytes(got) + getattr(error, "partial", b"") + b"<the end>")
        finally:
            writer.close()

    async def _read(self, reader: asyncio.StreamReader, got: bytearray) -> Seen:
        async def line() -> bytes:
            text = await reader.readuntil(b"\n")
            got.extend(text)
            if not text.endswith(b"\r\n"):
                raise _Stray
            return text[:-2]

        async def fields() -> list[tuple[bytes, bytes]]:
            pairs = []
            while text := await line():
                match = _FIELD.match(text)
                if match is None:
                    raise _Stray
                pairs.append((match[1].lower(), match[2]))
            return pairs

        async def exactly(size: int) -> bytes:
            data = await reader.readexactly(size)
            got.extend(data)
            return data

        match = _LINE.match(await line())
        if match is None:
            raise _Stray
        pairs = await fields()
        seen = Seen(b"", match[1].decode(), match[2].decode("latin-1"), pairs)
        lengths, codings = seen.get("content-length"), seen.get("transfer-encoding")
        if len(seen.get("host")) != 1 or len(lengths) + len(codings) > 1:
            raise _Stray
        if lengths:
            if not re.fullmatch("[0-9]+", lengths[0]):
                raise _Stray
            seen.body = await exactly(int(lengths[0]))
        elif codings:
            if codings[0] != "chunked":
                raise _Stray
            while True:
                size = await line()
                if not re.fullmatch(rb"[0-9A-Fa-f]+", size):
                    raise _Stray
                if not int(size, 16):
                    break
                seen.body += await exactly(int(size, 16))
                if await line():
                    raise _Stray
            seen.trailers = await fields()
        seen.raw = bytes(got)
        return seen
