"""Redis against the ledger: every difference found, what may be mended is, and none under load."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from core.audit import Behind, Cause, publish
from core.telemetry.exposition import render
from core.telemetry.metrics import setup
from tests.integration.audit.scene import CONFIG, Scene, play, scene
from tests.support import run_module
from tests.support.processes import ROOT
from tests.support.wait import wait_until_async


def test_what_is_not_flushed_yet_is_pending(valkey: str, database: str) -> None:
    async def act(s: Scene) -> None:
        await s.used("a", 3)
        await s.hit("a", 2)
        await s.hit("b", 2)  # the ledger has its epoch alone
        report = await s.audit()
        assert (report.drifts, report.clean) == ((), True)
        assert (report.states, report.pending) == (2, 2)
        await s.flusher.flush_all()
        assert (await s.audit()).pending == 0

    play(valkey, database, act)


def test_a_change_that_is_not_listed_is_listed_again(valkey: str, database: str) -> None:
    async def act(s: Scene) -> None:
        await s.used("a", 3)
        await s.hit("a", 2)
        s.redis.zrem(s.dirty, s.key("a"))
        drift = await s.only(Cause.REDIS_AHEAD_NOT_DIRTY)
        assert "Redis has version 5 and the ledger version 3" in drift.text
        assert (drift.expected, drift.found, drift.repaired) == (5, 3, "")
        assert not (await s.audit()).clean
        assert s.redis.zscore(s.dirty, s.key("a")) is None  # an audit alone changes nothing
        report = await s.audit(repair=True)
        assert report.repaired == {Cause.REDIS_AHEAD_NOT_DIRTY: 1}
        assert (report.clean, "listed as changed" in report.drifts[0].repaired) == (True, True)
        await s.flusher.flush_all()
        assert (await s.audit()).drifts == ()
        assert await s.sql.fetchval("SELECT total FROM ledger_periods") == 5

    play(valkey, database, act)


def test_a_ledger_from_an_older_backup(valkey: str, database: str) -> None:
    async def act(s: Scene) -> None:
        await s.used("a", 3)
        await s.used("b", 1)
        await s.sql.execute("DELETE FROM ledger_subjects; DELETE FROM ledger_periods; "
                            "DELETE FROM ledger_hours")  # fmt: skip
        report = await s.audit(repair=True)
        assert report.repaired == {Cause.REDIS_AHEAD_NOT_DIRTY: 2}
        await s.flusher.flush_all()
        assert (await s.audit()).drifts == ()
        assert await s.sql.fetchval("SELECT sum(total) FROM ledger_periods") == 4

    play(valkey, database, act)


def restore(s: Scene, subject: str, copy: Mapping[str, str]) -> None:
    s.redis.delete(s.key(subject))
    s.redis.hset(s.key(subject), mapping=dict(copy))


def test_an_older_copy_of_redis_is_found_and_rebuilt_from_the_ledger(
    valkey: str, database: str
) -> None:
    async def act(s: Scene) -> None:
        await s.used("a", 3)
        copy = s.redis.hgetall(s.key("a"))
        await s.used("a", 4)
        restore(s, "a", copy)
        drift = await s.only(Cause.REDIS_BEHIND)
        assert "Redis has version 3 and the ledger 7" in drift.text
        await s.hit("a", 2)  # counted on the older copy; listed, and still no match for the ledger
        report = await s.audit(repair=True)
        assert report.repaired == {Cause.REDIS_BEHIND: 1}
        assert "what was counted on the older copy alone is dropped" in report.drifts[0].repaired
        assert s.redis.keys("*:s:*") == []
        assert s.redis.zcard(s.dirty) == 0
        await s.used("a", 1)
        assert (await s.audit()).drifts == ()
        assert await s.sql.fetchval("SELECT total FROM ledger_periods") == 8

    play(valkey, database, act)


def test_a_state_that_moved_on_is_not_dropped(valkey: str, database: str) -> None:
    async def act(s: Scene) -> None:
        from core.audit import drop_behind

        await s.used("a", 3)
        mend = drop_behind(s.stack.store, s.stack.keyspace)
        for epoch, version in ((1, 2), (0, 3), (2, 3)):
            assert await mend([Behind("a", epoch, version)]) == {}
        assert s.redis.hget(s.key("a"), "ver") == "3"
        assert list(await mend([Behind("gone", 1, 1), Behind("a", 1, 3)])) == ["a"]

    play(valkey, database, act)


def test_another_repair_can_be_plugged_in(valkey: str, database: str) -> None:
    async def act(s: Scene) -> None:
        asked: list[Behind] = []

        async def repair_behind(behind: Sequence[Behind]) -> Mapping[str, str]:
            asked.extend(behind)
            return {item.subject: "reseeded" for item in behind if item.subject == "a"}

        for subject in ("a", "b"):
            await s.used(subject, 3)
            copy = s.redis.hgetall(s.key(subject))
            await s.used(subject, 4)
            restore(s, subject, copy)
        report = await s.audit(repair=True, repair_behind=repair_behind)
        assert sorted(asked) == [Behind("a", 1, 3), Behind("b", 1, 3)]
        assert (report.repaired, report.clean) == ({Cause.REDIS_BEHIND: 1}, False)
        assert {d.subject: d.repaired for d in report.drifts} == {"a": "reseeded", "b": ""}

    play(valkey, database, act)


@pytest.mark.parametrize(
    ("meter", "text", "words"),
    [
        ("requests", "4 0 3 0 3", "total of requests in the period from"),
        ("requests", "3 0 2 0 3", "total of requests in the hour from"),
        ("requests", "3 1 3 0 3", "overage of requests in the period from"),
        ("credits", "75 0 75 0 3", "is 0.75 in Redis and 1.5 in the ledger"),
    ],
)
def test_equal_versions_with_other_numbers(
    valkey: str, database: str, meter: str, text: str, words: str
) -> None:
    async def act(s: Scene) -> None:
        await s.used("a", 3, requests=1, credits=50)
        assert s.redis.hget(s.key("a"), f"m:{meter}") is not None
        s.redis.hset(s.key("a"), f"m:{meter}", text)
        for repair in (False, True):  # which of the two is right nobody can tell
            drift = await s.only(Cause.REDIS_DIFFERS, repair=repair)
            assert words in drift.text
            assert drift.repaired == ""
        assert s.redis.hget(s.key("a"), f"m:{meter}") == text

    play(valkey, database, act)


def test_states_that_cannot_be_read(valkey: str, database: str) -> None:
    async def act(s: Scene) -> None:
        for subject in "abcd":
            await s.used(subject)
        s.redis.hset(s.key("a"), "m:requests", "many")
        s.redis.hset(s.key("b"), mapping={"m:unheard": "1 0 1 0 1", "p:unheard": "0 99 0"})
        s.redis.hdel(s.key("c"), "ver")
        s.redis.set(s.key("e"), "a text")
        # not states, whatever they look like; and a subject of a keyless route, without a version
        s.redis.set("tg1:{0}:other", "x")
        s.redis.set("tg1:{7}:s:elsewhere", "x")
        s.redis.hset(s.key("ip:free:10.0.0.1"), "w:limit", "0 1")
        report = await s.audit(repair=True)
        assert report.found == {Cause.STATE_UNREADABLE: 4}
        assert not report.repaired
        reasons = {drift.subject: drift.text for drift in report.drifts}
        assert "its field m:requests reads 'many'" in reasons["a"]
        assert "no process ever declared its meter unheard" in reasons["b"]
        assert "it has no field ver" in reasons["c"]
        assert "it is no hash of texts" in reasons["e"]
        assert report.keyless == 1
        assert (await s.audit(subject="d")).clean
        assert not (await s.audit(subject="a")).clean

    play(valkey, database, act)


def test_batches_see_every_state_and_keep_no_more_than_asked(
    any_redis_url: str, database: str
) -> None:
    async def act(s: Scene) -> None:
        for number in range(30):
            await s.hit(f"s{number:02}")
        await s.flusher.flush_all()
        s.redis.hset(s.key("s07"), "m:requests", "many")
        for number in range(20, 30):
            await s.hit(f"s{number:02}")
            s.redis.zrem(s.dirty, s.key(f"s{number:02}"))
        told: list[tuple[str, int]] = []
        report = await s.audit(
            batch=7, keep=4, on_progress=lambda where, done: told.append((where, done))
        )
        assert (report.subjects, report.states) == (30, 30)
        assert report.found == {Cause.STATE_UNREADABLE: 1, Cause.REDIS_AHEAD_NOT_DIRTY: 10}
        assert len(report.drifts) == 4
        assert ("ledger", 30) in told
        assert told[-1] == ("redis", 30)

    play(any_redis_url, database, act)


def test_an_audit_as_a_metric(valkey: str, database: str, tmp_path: Path) -> None:
    metrics = setup(tmp_path, "test")

    def shown() -> dict[str, float]:
        families = text_string_to_metric_families(render(tmp_path).decode())
        samples = [x for family in families for x in family.samples if x.name == "tallygate_drift"]
        return {sample.labels["cause"]: sample.value for sample in samples}

    async def act(s: Scene) -> None:
        await s.used("a", 3)
        s.redis.hset(s.key("a"), "m:requests", "many")
        publish(metrics, await s.audit())
        assert shown()["state_unreadable"] == 1
        assert shown()["redis_behind"] == 0
        assert "resealed" not in shown()
        s.redis.delete(s.key("a"))
        publish(metrics, await s.audit())
        assert shown()["state_unreadable"] == 0

    play(valkey, database, act)


@contextmanager
def counters(number: int, **given: Any) -> Iterator[list[subprocess.Popen[str]]]:
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.integration.audit.counter", json.dumps(given)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for _ in range(number)
    ]  # fmt: skip
    try:
        for process in started:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def test_load_flushes_and_lost_states_during_an_audit_are_no_drift(
    valkey: str, database: str, tmp_path: Path
) -> None:
    """Two gateways count, a reconciler flushes without pause, states are evicted meanwhile."""
    subjects = [f"s{number:02}" for number in range(40)]
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG + "reconciler: {flush_interval: 1ms}\n")
    env = {
        "TALLYGATE_REDIS_URL": valkey,
        "TALLYGATE_POSTGRES_URL": database,
        "TALLYGATE_METRICS_DIR": str(tmp_path / "metrics"),
    }

    async def main() -> None:
        async with scene(valkey, database) as s:
            for round_ in range(12):
                before = await s.sql.fetchval("SELECT sum(version) FROM ledger_subjects")
                s.redis.delete(*(s.key(subject) for subject in subjects[round_::12]))
                report = await s.audit(batch=16, keep=5)
                assert report.drifts == ()
                assert report.states >= 20
                await wait_until_async(  # load went on meanwhile
                    lambda at=before: _version_above(s, at), 60, what="more flushes"
                )

    with (
        counters(2, redis=valkey, postgres=database, subjects=subjects) as processes,
        run_module("reconciler", "--config", str(config), env=env),
    ):
        asyncio.run(_started(valkey, database, len(subjects)))
        asyncio.run(main())
        assert all(process.poll() is None for process in processes)


async def _version_above(s: Scene, before: int) -> bool:
    now: int = await s.sql.fetchval("SELECT sum(version) FROM ledger_subjects")
    return now > before


async def _started(redis_url: str, postgres_url: str, number: int) -> None:
    async with scene(redis_url, postgres_url) as s:

        async def flushed() -> bool:
            count = "SELECT count(*) FROM ledger_subjects WHERE version > 0"
            return bool(await s.sql.fetchval(count) == number)

        await wait_until_async(flushed, 60, what="every subject in the ledger")
