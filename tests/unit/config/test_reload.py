"""Reload: a valid file is swapped in whole, any other one changes nothing."""

from __future__ import annotations

import asyncio
import itertools
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from core.config import ConfigWatcher, Snapshot, load, plans_removed, restart_needed
from core.config.reload import RESTART_SETTINGS
from core.errors import ConfigError, TallygateError

FIRST = "plans: {free: {limits: {fast: {rate: 10/s}}}}\n"
SECOND = "plans: {free: {limits: {fast: {rate: 20/s}}}}\n"
BROKEN = "plans: {free: {limits: {fast: {rate: lots}}}}\n"


class Seen:
    def __init__(self) -> None:
        self.reloads: list[tuple[Snapshot, Snapshot]] = []
        self.refusals: list[ConfigError] = []

    def watch(self, path: Path) -> ConfigWatcher:
        return ConfigWatcher(
            path,
            load(path),
            on_reload=lambda old, new: self.reloads.append((old, new)),
            on_refused=self.refusals.append,
            interval_s=0.01,
        )


def replace(path: Path, text: str) -> None:
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    os.replace(fresh, path)


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.005)


def watching(path: Path, scenario: Callable[[ConfigWatcher, Seen], object]) -> None:
    async def main() -> None:
        seen = Seen()
        watcher = seen.watch(path)
        task = asyncio.create_task(watcher.run())
        try:
            await scenario(watcher, seen)  # type: ignore[misc]
            assert not task.done()
        finally:
            task.cancel()

    asyncio.run(main())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "config.yaml"
    file.write_text(FIRST)
    return file


def test_a_change_is_swapped_in_whole(path: Path) -> None:
    async def scenario(watcher: ConfigWatcher, seen: Seen) -> None:
        before = watcher.current
        replace(path, SECOND)
        await until(lambda: seen.reloads)
        assert seen.reloads == [(before, watcher.current)]
        assert watcher.current.plans["free"].limits[0].burst == 20  # type: ignore[union-attr]
        assert before.plans["free"].limits[0].burst == 10  # type: ignore[union-attr]
        assert seen.refusals == []

    watching(path, scenario)


def test_a_refused_file_keeps_the_old_one_and_mending_it_is_reported(path: Path) -> None:
    async def scenario(watcher: ConfigWatcher, seen: Seen) -> None:
        before = watcher.current
        replace(path, BROKEN)
        await until(lambda: seen.refusals)
        assert watcher.current is before
        assert "plans.free.limits.fast.rate" in str(seen.refusals[0])
        # back to the very text in force: listeners learn that the file is valid again
        replace(path, FIRST)
        await until(lambda: seen.reloads)
        assert len(seen.refusals) == 1

    watching(path, scenario)


def test_a_file_that_is_gone_is_refused_and_its_return_is_seen(path: Path) -> None:
    async def scenario(watcher: ConfigWatcher, seen: Seen) -> None:
        before = watcher.current
        path.unlink()
        await until(lambda: seen.refusals)
        assert watcher.current is before
        path.write_text(SECOND)
        await until(lambda: seen.reloads)

    watching(path, scenario)


def test_a_symlink_swap_is_seen(tmp_path: Path) -> None:
    # Given a mounted ConfigMap: config.yaml -> ..data/config.yaml, ..data -> a dated folder
    for folder, text in (("one", FIRST), ("two", SECOND)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "config.yaml").write_text(text)
        os.utime(tmp_path / folder / "config.yaml", (1, 1))  # same time, same size
    (tmp_path / "..data").symlink_to("one")
    path = tmp_path / "config.yaml"
    path.symlink_to(Path("..data") / "config.yaml")

    async def scenario(watcher: ConfigWatcher, seen: Seen) -> None:
        (tmp_path / "..new").symlink_to("two")
        os.replace(tmp_path / "..new", tmp_path / "..data")
        await until(lambda: seen.reloads)
        assert watcher.current.plans["free"].limits[0].burst == 20  # type: ignore[union-attr]

    watching(path, scenario)


def test_a_touched_file_with_the_same_text_is_no_news(path: Path) -> None:
    async def scenario(watcher: ConfigWatcher, seen: Seen) -> None:
        before = watcher.current
        replace(path, FIRST)
        replace(path, FIRST)
        # the watcher has settled on the new inode: it was read, and found to be the same text
        await until(lambda: watcher._done[2] == path.stat().st_ino)  # type: ignore[index]
        assert watcher.current is before
        assert seen.reloads == []

    watching(path, scenario)


def test_a_change_between_load_and_watch_is_not_missed(path: Path) -> None:
    async def main() -> None:
        seen = Seen()
        snapshot = load(path)
        replace(path, SECOND)
        watcher = ConfigWatcher(
            path, snapshot, on_reload=lambda *pair: seen.reloads.append(pair), interval_s=0.01
        )
        task = asyncio.create_task(watcher.run())
        await until(lambda: seen.reloads)
        task.cancel()

    asyncio.run(main())


def test_a_file_that_is_still_being_written_is_left_alone(path: Path) -> None:
    # Given a file that looks different at every poll, and is not valid yet
    polls = itertools.count()

    async def main() -> None:
        seen = Seen()
        watcher = seen.watch(path)
        path.write_text(BROKEN)
        watcher._signature = lambda: (next(polls), 0, 0, 0)  # type: ignore[method-assign]
        task = asyncio.create_task(watcher.run())
        await until(lambda: next(polls) > 20)
        assert (seen.reloads, seen.refusals) == ([], [])
        # When it is whole and stays so
        path.write_text(SECOND)
        watcher._signature = lambda: (-7, 0, 0, 0)  # type: ignore[method-assign]
        # Then it is taken, once
        await until(lambda: seen.reloads)
        assert len(seen.reloads) == 1
        assert seen.refusals == []
        task.cancel()

    asyncio.run(main())


def test_a_poll_that_was_overtaken_by_a_reload_does_not_undo_it(path: Path) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        seen = Seen()
        watcher = seen.watch(path)
        load_now, reloaded, overtaken = watcher._load, threading.Event(), threading.Event()

        def by_hand() -> None:
            watcher._load = load_now  # type: ignore[method-assign]
            replace(path, SECOND)
            watcher.reload()
            reloaded.set()

        def slow_load() -> Snapshot | ConfigError:
            stale = load_now()
            loop.call_soon_threadsafe(by_hand)
            assert reloaded.wait(20)
            overtaken.set()
            return stale

        watcher._load = slow_load  # type: ignore[method-assign]
        replace(path, FIRST.replace("10/s", "30/s"))
        task = asyncio.create_task(watcher.run())
        await until(overtaken.is_set)
        polls, look = itertools.count(), watcher._signature
        watcher._signature = lambda: (next(polls), look())[1]  # type: ignore[method-assign]
        await until(lambda: next(polls) > 10)
        bursts = [new.plans["free"].limits[0].burst for _, new in seen.reloads]  # type: ignore[union-attr]
        assert bursts == [20]
        task.cancel()

    asyncio.run(main())


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("listener"), "cannot be applied: RuntimeError: listener"),
        (TallygateError("no such thing"), "cannot be applied: no such thing"),
        (ConfigError("config.yaml", ["routes[0]: bad"]), "routes[0]: bad"),
    ],
)
def test_a_reload_that_cannot_be_applied_is_refused_and_watching_goes_on(
    path: Path, error: Exception, reason: str
) -> None:
    fails, during = True, []

    async def scenario() -> None:
        seen = Seen()
        first = load(path)

        def apply(old: Snapshot, new: Snapshot) -> None:
            during.append(watcher.current)
            if fails:
                raise error
            seen.reloads.append((old, new))

        watcher = ConfigWatcher(
            path, first, on_reload=apply, on_refused=seen.refusals.append, interval_s=0.01
        )
        task = asyncio.create_task(watcher.run())
        replace(path, SECOND)
        await until(lambda: seen.refusals)
        assert seen.refusals[0].problems == [reason]
        assert watcher.current is first
        nonlocal fails
        fails = False
        # The same file again, by hand: taken, with the snapshot in force as the old one.
        assert watcher.reload() is True
        assert seen.reloads == [(first, watcher.current)]
        assert during == [first, first], "swapped before it was applied"
        replace(path, FIRST)
        await until(lambda: len(seen.reloads) == 2)
        assert not task.done()
        task.cancel()

    asyncio.run(scenario())


def test_a_failing_report_of_a_refusal_does_not_stop_watching(path: Path) -> None:
    async def main() -> None:
        def fail(error: ConfigError) -> None:
            raise RuntimeError("listener")

        watcher = ConfigWatcher(path, load(path), on_refused=fail, interval_s=0.01)
        task = asyncio.create_task(watcher.run())
        before = watcher.current
        assert watcher.reload() is True
        path.write_text(BROKEN)
        assert watcher.reload() is False
        replace(path, SECOND)
        await until(lambda: watcher.current.digest != before.digest)
        assert not task.done()
        task.cancel()

    asyncio.run(main())


def test_a_meter_in_use_cannot_be_counted_in_another_way(path: Path) -> None:
    seen = Seen()
    path.write_text("meters: {credits: {}, peak: {aggregation: max, decimals: 2}}\n")
    watcher = seen.watch(path)
    before = watcher.current
    path.write_text(
        "meters: {credits: {decimals: 2}, peak: {aggregation: last, decimals: 2},"
        " requests: {decimals: 1}}\n"
    )
    assert watcher.reload() is False
    assert watcher.current is before
    assert seen.reloads == []
    problems = sorted(seen.refusals[0].problems)
    assert [problem.split(" since ")[0] for problem in problems] == [
        "meters.credits.decimals: 2: pinned as 0",
        "meters.peak.aggregation: last: pinned as max",
        "meters.requests.decimals: 1: pinned as 0",
    ]
    assert all(problem.endswith("or declare a new meter") for problem in problems)
    # Another unit's name, a meter less and one more are no matter.
    path.write_text("meters: {credits: {unit: coin}, fresh: {decimals: 6}}\n")
    assert watcher.reload() is True


def test_plans_that_disappear_are_named(path: Path) -> None:
    old = load(path)
    path.write_text("plans: {b: {unlimited: true}, c: {unlimited: true}}\n")
    new = load(path)
    assert plans_removed(old, new) == ["free"]
    assert plans_removed(new, old) == ["b", "c"]
    assert plans_removed(old, old) == []


def test_reload_by_hand_reads_an_unchanged_file_too(path: Path) -> None:
    seen = Seen()
    watcher = seen.watch(path)
    before = watcher.current
    assert watcher.reload() is True
    assert watcher.current is not before
    assert len(seen.reloads) == 1
    path.write_text(BROKEN)
    accepted = watcher.current
    assert watcher.reload() is False
    assert watcher.current is accepted
    assert len(seen.refusals) == 1


def test_settings_that_need_a_restart_are_named(path: Path) -> None:
    old = load(path)
    path.write_text(
        SECOND
        + "gateway: {listen: '127.0.0.1:9999', access_log: true}\n"
        + "redis: {url: 'redis://h'}\nsecrets: {key_pepper: salt}\n"
    )
    new = load(path)
    assert restart_needed(old, new) == ["gateway.listen", "redis.url", "secrets.key_pepper"]
    assert restart_needed(new, new) == []


def test_settings_read_at_start_only_are_named_as_the_file_spells_them(path: Path) -> None:
    old = load(path)
    path.write_text(
        "gateway:\n  key_cache: {size: 5, ttl: 1s, negative_ttl: 1s}\n"
        "  admission: {max_batch: 5, max_in_flight: 5}\n  drain: 1s\n"
        "reconciler: {batch: 5, flush_interval: 2s}\nredis: {timeout: 1s}\n"
        "postgres: {timeout: 1s}\n"
    )
    assert restart_needed(old, load(path)) == [
        "gateway.key_cache.size",
        "gateway.key_cache.ttl",
        "gateway.key_cache.negative_ttl",
        "gateway.admission.max_batch",
        "gateway.admission.max_in_flight",
        "gateway.drain",
        "reconciler.batch",
        "redis.timeout",
        "postgres.timeout",
    ]
    assert len(set(RESTART_SETTINGS)) == len(RESTART_SETTINGS)
