"""What the processes ask of Redis off the hot path, with one error for "no answer".

Strings are decoded as UTF-8: keys, fields and values of this layout are ASCII, but for the names of
subjects. Pipelines are not transactions: each script call is atomic by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from redis.exceptions import NoPermissionError, NoScriptError, RedisError

from core.errors import StoreUnavailableError
from core.redis import client as redis_client
from core.redis.bulk import BulkReader, is_one_server
from core.redis.scripts import Script

Argument = str | int


class Store:
    """Named operations on a redis-py client.

    Every method raises `StoreUnavailableError` when Redis does not answer within the client's
    time-out or answers with an error; `on_error(kind)` is called first, for the metrics.
    """

    def __init__(
        self,
        client: redis_client.Client,
        on_error: Callable[[str], None] | None = None,
        bulk: BulkReader | None = None,
    ) -> None:
        # redis-py types every reply as a union over all of its options: Any is what it is worth.
        self._client: Any = client
        self._on_error = on_error
        self._bulk = bulk

    @classmethod
    def connect(
        cls, url: str, timeout_s: float, on_error: Callable[[str], None] | None = None
    ) -> Store:
        """A store on a URL as `core.redis.client.connect` takes it; connects when first used."""
        bulk = BulkReader(url, timeout_s) if is_one_server(url) else None
        return cls(redis_client.connect(url, timeout_s), on_error, bulk)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except StoreUnavailableError:  # from the bulk reader, which says it as we do
            if self._on_error is not None:
                self._on_error("error")
            raise
        except RuntimeError as error:
            if "closed" not in str(error):
                raise
            # uvloop's answer to a write on a connection that was closed a moment ago
            if self._on_error is not None:
                self._on_error("connection")
            raise StoreUnavailableError(f"Redis: {error}") from error
        except (RedisError, OSError, TimeoutError) as error:
            kind = "timeout" if isinstance(error, TimeoutError) else "error"
            if self._on_error is not None:
                self._on_error(kind)
            raise StoreUnavailableError(f"Redis: {error or type(error).__name__}") from error

    async def run(self, script: Script, keys: Sequence[str], arguments: Sequence[Argument]) -> Any:
        """One script call; strings in its reply are bytes."""
        return (await self.run_many(script, [(keys, arguments)]))[0]

    async def run_many(
        self, script: Script, calls: Sequence[tuple[Sequence[str], Sequence[Argument]]]
    ) -> list[Any]:
        """Script calls in one round trip, each atomic by itself; replies in order.

        Calls that the server refuses because it does not know the script, and no others, are sent
        again with its source: so nothing runs twice, and a SCRIPT FLUSH in between does no harm.
        """
        with self._translated():
            replies = await self._pipeline("EVALSHA", script.sha, calls)
            unknown = [at for at, reply in enumerate(replies) if isinstance(reply, NoScriptError)]
            if unknown:
                again = [calls[at] for at in unknown]
                for at, reply in zip(
                    unknown, await self._pipeline("EVAL", script.source, again), strict=True
                ):
                    replies[at] = reply
            for reply in replies:
                if isinstance(reply, Exception):
                    raise reply
            return replies

    async def _pipeline(
        self, command: str, script: str, calls: Sequence[tuple[Sequence[str], Sequence[Argument]]]
    ) -> list[Any]:
        pipeline = self._client.pipeline(transaction=False)
        for keys, arguments in calls:
            pipeline.execute_command(command, script, len(keys), *keys, *arguments)
        replies: list[Any] = await pipeline.execute(raise_on_error=False)
        return replies

    async def hgetall_many(self, keys: Sequence[str]) -> list[dict[str, str]]:
        """The hashes at `keys`, in order; an empty one where there is none. Each is atomic."""
        with self._translated():
            if self._bulk is not None:
                rows = await self._bulk.run("HGETALL", keys)
                return [_decoded(zip(row[::2], row[1::2], strict=True)) for row in rows]
            pipeline = self._client.pipeline(transaction=False)
            for key in keys:
                pipeline.hgetall(key)
            found: list[Mapping[bytes, bytes]] = await pipeline.execute()
        return [_decoded(row.items()) for row in found]

    async def oldest(self, key: str, count: int, skip: int = 0) -> list[tuple[str, float]]:
        """The first members of a sorted set, but for the first `skip`, with their scores."""
        with self._translated():
            rows: list[tuple[bytes, float]] = await self._client.zrange(
                key, skip, skip + count - 1, withscores=True
            )
        return [(member.decode(), score) for member, score in rows]

    async def above(self, key: str, score: int, count: int) -> list[str]:
        """The first members of a sorted set whose score is above `score`."""
        with self._translated():
            rows: list[bytes] = await self._client.zrangebyscore(
                key, f"({score}", "+inf", start=0, num=count
            )
        return [member.decode() for member in rows]

    async def up_to(self, key: str, score: int, count: int) -> list[str]:
        """The first members of a sorted set whose score is not above `score`."""
        with self._translated():
            rows: list[bytes] = await self._client.zrangebyscore(
                key, "-inf", score, start=0, num=count
            )
        return [member.decode() for member in rows]

    async def keep_many(self, keys: Sequence[str], text: str, ms: int) -> list[str]:
        """Sets those keys that are not there to `text`, to vanish in so many ms; what each has."""
        with self._translated():
            pipeline = self._client.pipeline(transaction=False)
            for key in keys:
                pipeline.set(key, text, px=ms, nx=True)
                pipeline.get(key)
            found: list[bytes | None] = (await pipeline.execute())[1::2]
        return [(held or b"-").decode() for held in found]  # it ended just now: nobody has it

    async def expire_many(self, keys: Sequence[str], ms: int) -> None:
        """Lets keys vanish in so many ms; those that are not there stay so."""
        with self._translated():
            pipeline = self._client.pipeline(transaction=False)
            for key in keys:
                pipeline.pexpire(key, ms)
            await pipeline.execute()

    async def rescore(self, key: str, members: Sequence[str], score: int) -> None:
        """Sets the score of those of `members` that are in a sorted set."""
        with self._translated():
            await self._client.zadd(key, dict.fromkeys(members, score), xx=True)

    async def score(self, key: str, member: str) -> int | None:
        """A member's score in a sorted set, which must be whole; None when it is not in it."""
        with self._translated():
            found: float | None = await self._client.zscore(key, member)
        return None if found is None else int(found)

    async def count_above(self, key: str, score: int) -> int:
        """Members of a sorted set whose score is above `score`."""
        with self._translated():
            return int(await self._client.zcount(key, f"({score}", "+inf"))

    async def cardinality(self, key: str) -> int:
        """Members of a sorted set."""
        with self._translated():
            return int(await self._client.zcard(key))

    async def length(self, stream: str) -> int:
        """Entries of a stream."""
        with self._translated():
            return int(await self._client.xlen(stream))

    async def entries(
        self, stream: str, count: int, after: str = ""
    ) -> list[tuple[str, dict[str, str]]]:
        """The first entries of a stream, or the first after the id `after`: id and fields."""
        with self._translated():
            rows: list[tuple[bytes, dict[bytes, bytes]]] = await self._client.xrange(
                stream, min=f"({after}" if after else "-", count=count
            )
        return [
            (entry.decode(), {name.decode(): text.decode() for name, text in fields.items()})
            for entry, fields in rows
        ]

    async def delete_entries(self, stream: str, ids: Sequence[str]) -> None:
        with self._translated():
            await self._client.xdel(stream, *ids)

    async def now_ms(self) -> int:
        """Redis TIME in epoch milliseconds."""
        with self._translated():
            seconds, micros = await self._client.time()
        return int(seconds) * 1000 + int(micros) // 1000

    async def text(self, key: str) -> str | None:
        """The string at `key`, None when there is none."""
        with self._translated():
            found: bytes | None = await self._client.get(key)
        return None if found is None else found.decode()

    async def run_id(self) -> str:
        """Identifies the server process; empty where the user may not ask."""
        with self._translated():
            try:
                answer: Mapping[str, object] = await self._client.info("server")
            except NoPermissionError:
                return ""
        return str(answer.get("run_id", ""))[: redis_client.RUN_LENGTH]

    async def ping(self) -> None:
        await redis_client.ping(self._client)

    async def close(self) -> None:
        if self._bulk is not None:
            self._bulk.close()
        await self._client.aclose()


def _decoded(pairs: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode(): text.decode() for name, text in pairs}
