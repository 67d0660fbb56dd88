"""redis-py clients from one URL, for everything off the hot path.

    redis://:password@host:6379/0      rediss:// with TLS      unix:///path/to/socket
    redis+cluster://host:6379          any node of a cluster; it names the others
    redis+sentinel://:password@host1:26379,host2:26379/name/0   the master of that name

Connections open when they are first used, so a Redis that is down is no error here.
"""

from __future__ import annotations

from inspect import signature
from typing import Any
from urllib.parse import unquote, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis, RedisCluster, Sentinel
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError
from redis.maint_notifications import MaintNotificationsConfig

from core.errors import StoreUnavailableError, TallygateError

Client = Redis | RedisCluster

_SENTINEL_PORT = 26_379
# Of 40 hexadecimal digits: enough to tell servers apart, and it stands in every subject's state.
RUN_LENGTH = 16
# More calls at once wait for one of these; without a bound that waits, they would fail.
_CONNECTIONS = 32
# Notices of a vendor's service. While they are wanted, redis-py takes a connection that the server
# has closed for a good one: after a restart of Redis, the first call on each would fail.
_MAINTENANCE = "maint_notifications_config"


def connect(url: str, timeout_s: float) -> Client:
    """A client whose every wait is at most `timeout_s` seconds: to connect, for an answer, and for
    a connection that is free.

    Replies are bytes. A call that finds its connection closed is made once more on another: a
    server that was restarted closes all that are kept. So every call must be repeatable.

    Raises:
        TallygateError: the URL is no Redis URL. The message does not hold it.
    """
    waits: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        # The default is three more attempts with seconds between them, after a time-out too.
        "retry": Retry(NoBackoff(), 1, supported_errors=(RedisConnectionError,)),
    }
    quiet: dict[str, Any] = {}
    if _MAINTENANCE in signature(Redis.__init__).parameters:
        quiet[_MAINTENANCE] = MaintNotificationsConfig(enabled=False)
    scheme, _, kind = url.partition("://")[0].partition("+")
    plain = scheme + url[url.index("://") :] if "://" in url else url
    try:
        if kind == "cluster":
            return RedisCluster.from_url(plain, **waits, **quiet)
        if kind == "sentinel":
            return _sentinel(plain, scheme == "rediss", waits)
        return Redis.from_pool(
            BlockingConnectionPool.from_url(
                plain, max_connections=_CONNECTIONS, timeout=timeout_s, **waits, **quiet
            )
        )
    except (ValueError, RedisError) as error:
        raise TallygateError(
            "redis.url: not a Redis URL; it looks like redis://:password@host:6379/0"
        ) from error


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
