"""What Redis or Valkey is set to, and what that would lose. Pure functions over INFO and CONFIG."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from core.doctor.findings import Crash, Finding, Severity, ok

SETTINGS = (
    "appendonly",
    "appendfsync",
    "no-appendfsync-on-rewrite",
    "save",
    "stop-writes-on-bgsave-error",
    "min-replicas-to-write",
    "min-replicas-max-lag",
)
OLDEST = (6, 2)
_NEARLY_FULL_PERCENT = 90
_KEEP = "then CONFIG REWRITE, or the same line in the server's configuration file"

Texts = Mapping[str, str]


def examine(info: Texts | None, settings: Texts | None, unflushed: str) -> list[Finding]:
    """Findings about one server.

    `info` and `settings` as core.redis.survey gives them, None where the server forbids it;
    `unflushed` says in words what the ledger lacks at any moment.
    """
    if info is None:
        return [
            Finding(
                "redis.info",
                Severity.WARNING,
                "this user may not run INFO, so nothing can be said about the server",
                dict.fromkeys((Crash.PROCESS, Crash.POWER, Crash.FULL), "not known"),
                "ACL SETUSER <user> +info +config|get, or run this with a user that may",
            )
        ]
    return [
        _version(info),
        *_serving(info),
        _append_only(info, unflushed),
        *_fsync(info, settings),
        *_write_errors(info, settings or {}),
        *_memory(info),
        _evicted(info, unflushed),
        *_replication(info, settings, unflushed),
        *_cluster(info),
    ]


def _number(texts: Texts, name: str) -> int:
    try:
        return int(texts.get(name, "0"))
    except ValueError:
        return 0


def _version(info: Texts) -> Finding:
    version = info.get("redis_version", "")
    name = "Valkey" if "valkey_version" in info else "Redis"
    shown = f"{name} {info.get('valkey_version', version)}"
    try:
        numbers = tuple(int(part) for part in version.split(".")[:2])
    except ValueError:
        numbers = OLDEST  # a fork with names of its own: the scripts will tell
    if numbers < OLDEST:
        return Finding(
            "redis.version",
            Severity.CRITICAL,
            f"{shown}: older than 6.2, so the scripts that count may fail",
            {},
            "run Redis 6.2 or later, or Valkey",
        )
    return ok("redis.version", f"{shown}")


def _serving(info: Texts) -> Iterator[Finding]:
    if _number(info, "loading"):
        yield Finding(
            "redis.loading",
            Severity.CRITICAL,
            "the server is still loading its data and answers nothing: 503 until it is done",
            {},
            "wait; INFO persistence shows loading_eta_seconds",
        )
    if info.get("role", "master") != "master":
        host = f"{info.get('master_host', '?')}:{info.get('master_port', '?')}"
        yield Finding(
            "redis.role",
            Severity.CRITICAL,
            f"this is a replica of {host}: it takes no writes, so every request is answered 503",
            {},
            f"point redis.url to {host}",
        )


def _append_only(info: Texts, unflushed: str) -> Finding:
    if _number(info, "aof_enabled"):
        return ok("redis.appendonly", "appendonly yes: counts are kept in a file")
    return Finding(
        "redis.appendonly",
        Severity.CRITICAL,
        "appendonly no: counts are in memory, and in a snapshot now and then",
        {
            Crash.PROCESS: f"{unflushed}; an older copy that comes back is repaired from the "
            "ledger, rates and bursts start afresh",
            Crash.POWER: f"{unflushed}, as in a process crash",
        },
        f"CONFIG SET appendonly yes, {_KEEP}",
    )


def _fsync(info: Texts, settings: Texts | None) -> Iterator[Finding]:
    if settings is None:
        yield _forbidden(info)
        return
    if not _number(info, "aof_enabled"):
        return
    mode = settings.get("appendfsync", "")
    fix = f"CONFIG SET appendfsync always, {_KEEP}"
    if mode == "always":
        yield ok("redis.appendfsync", "appendfsync always: a count is on disk before it is served")
    elif mode == "everysec":
        delayed = _number(info, "aof_delayed_fsync")
        slow = f"; {delayed} writes waited for a slow disk so far" if delayed else ""
        yield Finding(
            "redis.appendfsync",
            Severity.WARNING,
            f"appendfsync everysec: the file is synchronised once a second{slow}",
            {
                Crash.PROCESS: "nothing, or what was counted in the last 2 s while the disk is so "
                "slow that the second before is still being written",
                Crash.POWER: "at most the requests of the last 1 to 2 s: one fsync a second, and "
                "while one is slow the next writes are held back for up to 2 s; those of them "
                "that were flushed are in the ledger",
            },
            fix,
        )
    else:
        yield Finding(
            "redis.appendfsync",
            Severity.CRITICAL,
            f"appendfsync {mode or 'no'}: the kernel decides when a count reaches the disk",
            {Crash.POWER: "the requests of about the last 30 s, as the kernel writes back so late"},
            fix,
        )
    if mode != "no" and settings.get("no-appendfsync-on-rewrite") == "yes":
        yield Finding(
            "redis.no-appendfsync-on-rewrite",
            Severity.WARNING,
            "no-appendfsync-on-rewrite yes: nothing is synchronised while the file is rewritten",
            {Crash.POWER: "the requests of about the last 30 s, during a rewrite or a snapshot"},
            f"CONFIG SET no-appendfsync-on-rewrite no, {_KEEP}",
        )


def _forbidden(info: Texts) -> Finding:
    loses = {}
    if _number(info, "aof_enabled"):
        loses[Crash.POWER] = (
            "not known: nothing with appendfsync always, 1 to 2 s with everysec, 30 s with no"
        )
    return Finding(
        "redis.config",
        Severity.WARNING,
        "this user may not run CONFIG GET, so appendfsync, no-appendfsync-on-rewrite, save and "
        "min-replicas-to-write cannot be known",
        loses,
        "look them up where the server is managed (its parameter group or settings page; "
        "appendfsync must be always), or ACL SETUSER <user> +config|get and run this again",
    )


def _write_errors(info: Texts, settings: Texts) -> Iterator[Finding]:
    if _number(info, "aof_enabled"):
        if info.get("aof_last_write_status", "ok") != "ok":
            yield Finding(
                "redis.aof_last_write_status",
                Severity.CRITICAL,
                "the last write to the append-only file failed: writes are refused (503) under "
                "appendfsync always, and counted in memory alone otherwise",
                {Crash.PROCESS: "what was counted since the writes fail", Crash.POWER: "the same"},
                "make room on the disk or replace it; the server goes on by itself",
            )
        if info.get("aof_last_bgrewrite_status", "ok") != "ok":
            yield Finding(
                "redis.aof_last_bgrewrite_status",
                Severity.NOTE,
                "the last rewrite of the append-only file failed: it grows until one succeeds",
                {},
                "look for room on the disk and memory for a fork, then BGREWRITEAOF",
            )
    if info.get("rdb_last_bgsave_status", "ok") != "ok":
        refuses = bool(settings.get("save")) and (
            settings.get("stop-writes-on-bgsave-error", "yes") == "yes"
        )
        yield Finding(
            "redis.rdb_last_bgsave_status",
            Severity.CRITICAL if refuses else Severity.NOTE,
            "the last snapshot failed"
            + (": the server refuses writes (MISCONF), so every request is answered 503"
               if refuses else "; counts are kept in the append-only file all the same"),
            {},
            "look for room on the disk and memory for a fork, then BGSAVE; with appendonly yes "
            'snapshots are not needed: CONFIG SET save ""',
        )  # fmt: skip


def _memory(info: Texts) -> Iterator[Finding]:
    policy, most = info.get("maxmemory_policy", "noeviction"), _number(info, "maxmemory")
    fix = f"CONFIG SET maxmemory-policy noeviction, {_KEEP}"
    if policy == "noeviction":
        yield ok("redis.maxmemory-policy", "maxmemory-policy noeviction: no counter is thrown away")
    elif not most:
        yield Finding(
            "redis.maxmemory-policy",
            Severity.NOTE,
            f"maxmemory-policy {policy}: without effect as maxmemory is 0, and it would throw "
            "counters away once it is set",
            {},
            fix,
        )
    elif policy.startswith("volatile"):
        yield Finding(
            "redis.maxmemory-policy",
            Severity.WARNING,
            f"maxmemory-policy {policy}: at {most} bytes keys that expire are thrown away",
            {Crash.FULL: "the counters of keyless routes, and the memory of which usage events "
             "were counted: one that is sent again is counted twice"},
            fix,
        )  # fmt: skip
    else:
        yield Finding(
            "redis.maxmemory-policy",
            Severity.CRITICAL,
            f"maxmemory-policy {policy}: at {most} bytes counters are thrown away",
            {Crash.FULL: "what was counted for each evicted subject and not flushed yet; it goes "
             "on from the ledger"},
            fix,
        )  # fmt: skip
    if not most:
        yield Finding(
            "redis.maxmemory",
            Severity.NOTE,
            "maxmemory 0: when memory is full the kernel ends the server, which is a process crash",
            {},
            f"CONFIG SET maxmemory <three quarters of the machine's memory>, {_KEEP}",
        )
    elif (used := _number(info, "used_memory")) * 100 >= most * _NEARLY_FULL_PERCENT:
        yield Finding(
            "redis.maxmemory",
            Severity.WARNING,
            f"{used * 100 // most} % of maxmemory are used: when it is full writes are refused, "
            "so requests are answered 503; nothing that was counted is lost",
            {},
            f"CONFIG SET maxmemory <more>, {_KEEP}, or lower reconciler.idle_after",
        )


def _evicted(info: Texts, unflushed: str) -> Finding:
    evicted = _number(info, "evicted_keys")
    if not evicted:
        return ok("redis.evicted_keys", "no key was evicted since the server started")
    return Finding(
        "redis.evicted_keys",
        Severity.WARNING,
        f"{evicted} keys were evicted since the server started: counts may be lost already",
        {Crash.FULL: f"of each evicted subject {unflushed}"},
        "CONFIG SET maxmemory-policy noeviction and more maxmemory, then CONFIG RESETSTAT; "
        "tallygate audit shows what does not add up",
    )


def _replication(info: Texts, settings: Texts | None, unflushed: str) -> Iterator[Finding]:
    replicas = _number(info, "connected_slaves")
    if info.get("role", "master") != "master":
        return
    wanted = _number(settings or {}, "min-replicas-to-write")
    if wanted and "min_slaves_good_slaves" in info:
        good = _number(info, "min_slaves_good_slaves")
        if good < wanted:
            yield Finding(
                "redis.min-replicas-to-write",
                Severity.CRITICAL,
                f"min-replicas-to-write {wanted}, but {good} replicas keep up: writes are refused, "
                "so every request is answered 503",
                {},
                f"bring a replica back, or CONFIG SET min-replicas-to-write {good}",
            )
            return
    if not replicas:
        yield Finding(
            "redis.replicas",
            Severity.NOTE,
            "no replica: there is one copy of what is not in the ledger yet",
            {Crash.DISK: f"{unflushed}; quotas go on from the ledger"},
            "none needed; a replica with min-replicas-to-write 1 makes it less",
        )
    elif settings is None:
        yield Finding(
            "redis.replicas",
            Severity.WARNING,
            f"{replicas} replicas; whether writes wait for one to be near cannot be known",
            {Crash.FAILOVER: "what the promoted replica had not received yet"},
            "min-replicas-to-write must be 1 or more",
        )
    elif not wanted:
        yield Finding(
            "redis.min-replicas-to-write",
            Severity.WARNING,
            f"{replicas} replicas and min-replicas-to-write 0: a server that is cut off from them "
            "goes on counting what the next one will never know",
            {Crash.FAILOVER: f"everything counted while it was cut off and not flushed, without "
             f"bound; otherwise {unflushed}"},
            "CONFIG SET min-replicas-to-write 1 and CONFIG SET min-replicas-max-lag 5, "
            f"{_KEEP}",
        )  # fmt: skip
    else:
        lag = _number(settings, "min-replicas-max-lag")
        yield Finding(
            "redis.min-replicas-to-write",
            Severity.NOTE,
            f"{replicas} replicas, writes need {wanted} at most {lag} s behind; copying is "
            "asynchronous, so a failover is no crash without loss",
            {Crash.FAILOVER: f"what was counted in the last {lag} s at most and not flushed; "
             "usually milliseconds"},
            "",
        )  # fmt: skip


def _cluster(info: Texts) -> Iterator[Finding]:
    if _number(info, "cluster_enabled"):
        yield Finding(
            "redis.cluster",
            Severity.WARNING,
            "cluster mode: all counters are in one slot, and once it moves to another node "
            "requests are answered 503",
            {},
            "use a server without cluster-enabled yes",
        )
