"""One file of a spool: what recovery makes of every way in which its bytes can be wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gateway.outage.files import NEW, SUFFIX, create, orphans
from gateway.outage.segment import DAMAGED, DATA_START, OVERHEAD, PAGE, Segment

NOW = 1_790_000_000_000
PAYLOADS = [b"first", b"", b"x" * 5_000, b"fourth", b"the last of them"]
Events = list[tuple[str, int]]


def spool_of(directory: Path, payloads: list[bytes], done: int = 0) -> Path:
    """The file of a process that is gone."""
    segment = create(directory, NOW)
    for at, payload in enumerate(payloads):
        segment.write(payload, NOW + at)
    if done:
        segment.mark(done, os.fdatasync)
    segment.close()
    return segment.path


def adopted(directory: Path, events: Events | None = None) -> list[Segment]:
    found = events if events is not None else []
    return list(orphans(directory, lambda event, amount: found.append((event, amount))))


def everything(directory: Path, events: Events | None = None) -> list[tuple[int, bytes]]:
    records: list[tuple[int, bytes]] = []
    for segment in adopted(directory, events):
        records += segment.read(1, 1_000)
        assert segment.pending == len(records)
        segment.close()
    return records


def numbered(payloads: list[bytes]) -> list[tuple[int, bytes]]:
    return list(enumerate(payloads, 1))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    directory = tmp_path / "spool"
    path = spool_of(directory, PAYLOADS)

    assert everything(directory) == numbered(PAYLOADS)
    assert path.stat().st_mode & 0o777 == 0o600
    assert directory.stat().st_mode & 0o777 == 0o700


def test_a_torn_tail_is_cut_off_wherever_it_is_torn(tmp_path: Path) -> None:
    whole = spool_of(tmp_path, PAYLOADS).read_bytes()
    path = next(tmp_path.iterdir())
    last = OVERHEAD + len(PAYLOADS[-1])
    for missing in range(1, last + 1):
        path.write_bytes(whole[: len(whole) - missing])
        events: Events = []

        assert everything(tmp_path, events) == numbered(PAYLOADS[:-1])

        torn = last - missing
        assert events == ([("tail_cut", torn)] if torn else [])
        assert path.stat().st_size == len(whole) - last
        assert everything(tmp_path, events := []) == numbered(PAYLOADS[:-1])
        assert not events


def test_a_corrupt_tail_is_cut_off_whatever_byte_is_wrong(tmp_path: Path) -> None:
    whole = spool_of(tmp_path, PAYLOADS).read_bytes()
    path = next(tmp_path.iterdir())
    last = OVERHEAD + len(PAYLOADS[-1])
    for back in range(1, last + 1):
        broken = bytearray(whole)
        broken[-back] ^= 0x41
        path.write_bytes(broken)
        events: Events = []

        assert everything(tmp_path, events) == numbered(PAYLOADS[:-1])
        assert events == [("tail_cut", last)]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    payloads=st.lists(st.binary(max_size=300), min_size=1, max_size=12),
    cut=st.integers(0, 4_000),
    junk=st.binary(max_size=200),
)
def test_any_prefix_with_any_junk_behind_it_gives_its_whole_records(
    tmp_path_factory: pytest.TempPathFactory, payloads: list[bytes], cut: int, junk: bytes
) -> None:
    directory = tmp_path_factory.mktemp("spool")
    path = spool_of(directory, payloads)
    kept = path.read_bytes()[: DATA_START + cut]
    path.write_bytes(kept + junk)
    whole, at = 0, DATA_START
    for payload in payloads:
        at += OVERHEAD + len(payload)
        whole += at <= len(kept)

    found = everything(directory)

    # junk may happen to be the bytes that were cut off
    assert found[:whole] == numbered(payloads)[:whole]
    assert found == numbered(payloads)[: len(found)]


def test_damage_in_the_middle_costs_one_record_and_is_reported(tmp_path: Path) -> None:
    whole = spool_of(tmp_path, PAYLOADS).read_bytes()
    path = next(tmp_path.iterdir())
    start = DATA_START + sum(OVERHEAD + len(p) for p in PAYLOADS[:3])
    for at in range(start, start + OVERHEAD + len(PAYLOADS[3])):
        broken = bytearray(whole)
        broken[at] ^= 0x81
        path.write_bytes(broken)
        events: Events = []

        (segment,) = adopted(tmp_path, events)
        assert segment.read(1, 10) == [row for row in numbered(PAYLOADS) if row[0] != 4]
        assert events == [("lost", 1)]
        segment.close()

    (segment,) = adopted(tmp_path, events)
    segment.mark(5, os.fdatasync)
    assert segment.pending == 0
    segment.remove()
    assert [entry.suffix for entry in tmp_path.iterdir()] == [DAMAGED]


def test_a_zeroed_page_loses_what_was_on_it_and_nothing_else(tmp_path: Path) -> None:
    payloads = [b"%06d" % at * 20 for at in range(200)]
    path = spool_of(tmp_path, payloads)
    broken = bytearray(path.read_bytes())
    first = DATA_START + PAGE
    broken[first : first + PAGE] = bytes(PAGE)
    path.write_bytes(broken)
    events: Events = []

    found = everything(tmp_path, events)

    size = OVERHEAD + 120
    hit = range(PAGE // size, -(-2 * PAGE // size))
    assert found == [row for row in numbered(payloads) if row[0] - 1 not in hit]
    assert events == [("lost", len(hit))]


def test_a_record_that_the_disk_gives_twice_is_read_once(tmp_path: Path) -> None:
    path = spool_of(tmp_path, [b"one", b"two", b"six", b"ten"])
    broken = bytearray(path.read_bytes())
    size = OVERHEAD + 3
    second, third = DATA_START + size, DATA_START + 2 * size
    broken[third : third + size] = broken[second : second + size]
    path.write_bytes(broken)
    events: Events = []

    assert everything(tmp_path, events) == [(1, b"one"), (2, b"two"), (4, b"ten")]
    assert events == [("lost", 1)]


def test_a_payload_cannot_pretend_to_be_a_record(tmp_path: Path) -> None:
    foreign = create(tmp_path / "other", NOW)
    for payload in (b"", b"", b"forged"):
        foreign.write(payload, NOW)
    records = foreign.path.read_bytes()[DATA_START:]
    path = spool_of(tmp_path, [b"a", records, b"c"])
    broken = bytearray(path.read_bytes())
    broken[DATA_START + OVERHEAD + 1] ^= 1  # the search begins in front of the payload
    path.write_bytes(broken)

    assert everything(tmp_path) == [(1, b"a"), (3, b"c")]


def test_what_is_done_never_comes_back(tmp_path: Path) -> None:
    spool_of(tmp_path, PAYLOADS, done=3)
    (segment,) = adopted(tmp_path)
    assert segment.read(segment.done + 1, 10) == numbered(PAYLOADS)[3:]
    assert (segment.pending, segment.oldest_ms) == (2, NOW + 3)
    segment.mark(4, os.fdatasync)
    segment.close()

    (segment,) = adopted(tmp_path)
    assert segment.read(segment.done + 1, 10) == numbered(PAYLOADS)[4:]
    segment.mark(5, os.fdatasync)
    segment.close()

    assert adopted(tmp_path) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("page", [1, 2])
def test_a_torn_slot_leaves_the_progress_before_it(tmp_path: Path, page: int) -> None:
    path = spool_of(tmp_path, PAYLOADS)
    for done in (1, 2) if page == 1 else (1, 2, 3):
        (segment,) = adopted(tmp_path)
        segment.mark(done, os.fdatasync)
        segment.close()
    broken = bytearray(path.read_bytes())
    broken[page * PAGE + 3] ^= 1
    path.write_bytes(broken)

    (segment,) = adopted(tmp_path)

    assert segment.done == done - 1
    assert segment.read(segment.done + 1, 10) == numbered(PAYLOADS)[done - 1 :]
    segment.mark(4, os.fdatasync)  # and goes on over the torn one
    segment.close()
    assert adopted(tmp_path)[0].done == 4


def test_a_withdrawn_record_is_not_replayed_nor_a_gap(tmp_path: Path) -> None:
    segment = create(tmp_path, NOW)
    kept = segment.write(b"kept", NOW)
    gone = segment.write(b"gone", NOW)
    segment.write(b"kept too", NOW)
    segment.withdraw(gone)
    segment.withdrew()
    segment.close()
    events: Events = []

    assert kept.sequence == 1
    assert everything(tmp_path, events) == [(1, b"kept"), (3, b"kept too")]
    assert not events


def test_leftovers_are_removed_and_a_broken_header_is_kept(tmp_path: Path) -> None:
    path = spool_of(tmp_path, PAYLOADS)
    broken = bytearray(path.read_bytes())
    broken[20] ^= 1
    path.write_bytes(broken)
    (tmp_path / ("A" * 26 + NEW)).write_bytes(b"half a header")
    (tmp_path / ("B" * 26 + SUFFIX)).write_bytes(b"")
    (tmp_path / "notes.txt").write_text("not ours")
    events: Events = []

    assert adopted(tmp_path, events) == []

    assert events == [("damaged", 1)]
    assert {entry.suffix for entry in tmp_path.iterdir()} == {DAMAGED, ".txt"}
    assert path.with_suffix(DAMAGED).read_bytes() == broken


def test_a_file_with_an_owner_is_no_orphan(tmp_path: Path) -> None:
    owner = create(tmp_path, NOW)
    owner.write(b"mine", NOW)

    assert adopted(tmp_path) == []

    owner.close()
    (first,) = adopted(tmp_path)
    assert adopted(tmp_path) == []
    first.close()


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    elsewhere = spool_of(tmp_path / "elsewhere", PAYLOADS)
    spool = tmp_path / "spool"
    spool.mkdir()
    (spool / elsewhere.name).symlink_to(elsewhere)

    assert adopted(spool) == []
    assert elsewhere.exists()
