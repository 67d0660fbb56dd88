"""redis-py clients from one URL, for everything off the hot path.

    redis://:password@host:6379/0      rediss:// with TLS      unix:///path/to/socket
    redis+cluster://host:6379          any node of a cluster; it names the others
    redis+sentinel://:password@host1:26379,host2:26379/name/0   the master of that name

Connections open when they are first used, so a Redis that is down is no error here.
"""

from __future__ import annotations

from typing import Any
from urllib.parse import unquote, urlsplit

from redis.asyncio import Redis, RedisCluster, Sentinel
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from core.errors import StoreUnavailableError, TallygateError

Client = Redis | RedisCluster

_SENTINEL_PORT = 26_379
# Of 40 hexadecimal digits: enough to tell servers apart, and it stands in every subject's state.
RUN_LENGTH = 16


def connect(url: str, timeout_s: float) -> Client:
    """A client whose every wait (to connect, for an answer) is at most `timeout_s` seconds.

    Replies are bytes. It does not retry: a repeated call is the caller's decision.

    Raises:
        TallygateError: the URL is no Redis URL. The message does not hold it.
    """
    waits: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        # The default is three more attempts with seconds between them.
        "retry": Retry(NoBackoff(), 0),
    }
    scheme, _, kind = url.partition("://")[0].partition("+")
    plain = scheme + url[url.index("://") :] if "://" in url else url
    try:
        if kind == "cluster":
            return RedisCluster.from_url(plain, **waits)
        if kind == "sentinel":
            return _sentinel(plain, scheme == "rediss", waits)
        return _noticing(Redis.from_url(plain, **waits))
    except (ValueError, RedisError) as error:
        raise TallygateError(
            "redis.url: not a Redis URL; it looks like redis://:password@host:6379/0"
        ) from error


def _noticing(client: Redis) -> Redis:
    """The client, whose pool does not hand out connections that the server has closed.

    redis-py 8 does not look at the end of the stream, so the first command on each connection
    failed after a restart of the server.
    """
    pool: Any = client.connection_pool
    plain: Any = pool.connection_class

    class Noticing(plain):  # type: ignore[misc]
        async def can_read(self, *args: Any, **kwargs: Any) -> bool:
            reader = self._reader
            if reader is not None and reader.at_eof():
                raise ConnectionError("closed by the server")
            return bool(await super().can_read(*args, **kwargs))

    pool.connection_class = Noticing
    return client


def server_run(info: bytes) -> str:
    """The run id in the answer of INFO server: another one for each start of a server process."""
    for line in info.splitlines():
        if line.startswith(b"run_id:"):
            return line.removeprefix(b"run_id:").strip().decode()[:RUN_LENGTH]
    return ""


async def ping(client: Client) -> None:
    """One PING.

    Raises:
        StoreUnavailableError: no answer in time, or an error for one.
    """
    try:
        await client.ping()
    except (RedisError, OSError, TimeoutError) as error:
        raise StoreUnavailableError(
            f"Redis did not answer ({type(error).__name__}); check that it runs and that redis.url "
            "or TALLYGATE_REDIS_URL points to it"
        ) from error


def _sentinel(url: str, tls: bool, waits: dict[str, Any]) -> Redis:
    parts = urlsplit(url)
    credentials, _, hosts = parts.netloc.rpartition("@")
    user, _, password = credentials.partition(":")
    name, _, database = parts.path.strip("/").partition("/")
    if not name:
        raise ValueError("the master's name is missing")
    sentinels = []
    for host in hosts.split(","):
        address, _, port = host.rpartition(":")
        sentinels.append((address or host, int(port) if address else _SENTINEL_PORT))
    sentinel = Sentinel(sentinels, sentinel_kwargs=waits)  # type: ignore[no-untyped-call]
    master: Redis = sentinel.master_for(
        name,
        db=int(database or 0),
        username=unquote(user) or None,
        password=unquote(password) or None,
        ssl=tls,
        **waits,
    )
    return master
