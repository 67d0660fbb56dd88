"""Keys: one hash tag a subject, and back from a key to its subject."""

from __future__ import annotations

import pytest

from core.keyspace import PREFIX, Keyspace, subject_of

SUBJECTS = ["sub_1", "ip:free:2001:db8::1", "a:s:b", "{x}", "ümlaut", "s" * 300]


@pytest.mark.parametrize("subject", SUBJECTS)
@pytest.mark.parametrize("shards", [1, 7])
def test_all_keys_of_a_subject_share_one_hash_tag(subject: str, shards: int) -> None:
    keyspace = Keyspace(shards)
    shard = keyspace.shard(subject)
    assert 0 <= shard < shards
    keys = [
        keyspace.state(subject),
        keyspace.leases(subject, "slots"),
        keyspace.dirty(shard),
        keyspace.idle(shard),
        keyspace.events(shard),
    ]
    assert len(set(keys)) == 5
    # what Redis Cluster hashes: between the first { and the first } after it
    assert {key[key.index("{") + 1 : key.index("}")] for key in keys} == {str(shard)}
    assert all(key.startswith(f"{PREFIX}:") for key in keys)
    assert subject_of(keyspace.state(subject)) == subject


def test_shards_are_stable_and_spread() -> None:
    keyspace = Keyspace(16)
    assert [keyspace.shard(f"sub_{number}") for number in range(5)] == [
        Keyspace(16).shard(f"sub_{number}") for number in range(5)
    ]
    assert {keyspace.shard(f"sub_{number}") for number in range(500)} == set(range(16))
    assert Keyspace(1).state("sub_1") == "tg1:{0}:s:sub_1"
    assert Keyspace(16).shard("sub_1") == 3  # part of the layout: never changes


@pytest.mark.parametrize("key", ["", "sub_1", "tg1:{0}:dirty", "tg2:{0}:s:x", "tg1:0:s:x"])
def test_what_is_no_state_key(key: str) -> None:
    with pytest.raises(ValueError, match="not a state key"):
        subject_of(key)
