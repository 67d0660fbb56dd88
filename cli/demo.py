"""The demonstration data of `tallygate up`: one creator, and a customer for each demo plan."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from core import ids, secrets
from core.db import Transaction, connect_pool
from core.secrets import KeyHasher

_CREATOR = "cre_demo"
_KEY_NAME = "demo"
_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class DemoKey:
    """`subscription` is its identifier, `key` the secret."""

    subscription: str
    plan: str
    key: str


async def ensure_demo(
    dsn: str,
    pepper: str,
    keys_file: Path | None = None,
    plans: Sequence[str] = ("free", "pro"),
) -> list[DemoKey]:
    """Create whatever is missing of the demonstration data; safe to repeat.

    The secrets are kept in `keys_file` (JSON, mode 0600), since the database has digests only. If
    the file is lost, new keys replace the old; if the database is lost, the same keys are entered
    again. A subscription that was moved to another plan stays there. Without a file each call
    replaces the keys.

    Raises:
        StoreUnavailableError: Postgres does not answer.
        InvalidValueError: the pepper is missing.
        OSError: the file cannot be written.
    """
    hasher = KeyHasher(pepper)
    known = {} if keys_file is None else _read(keys_file)
    database = await connect_pool(dsn, size=1, timeout_s=_TIMEOUT_S)
    try:
        async with database.transaction() as transaction:
            await transaction.fetchval("lock_demo")
            await transaction.execute(
                "ensure_demo_creator", _CREATOR, "Demo creator", "creator@example.com"
            )
            found = [await _ensure(transaction, hasher, plan, known) for plan in plans]
            # Before the commit: a key in the database whose secret nobody has is of no use, one in
            # the file that the database lacks is entered at the next start.
            if keys_file is not None:
                _write(keys_file, known | {demo.subscription: demo.key for demo in found})
    finally:
        await database.close()
    return found


async def _ensure(
    transaction: Transaction, hasher: KeyHasher, plan: str, known: dict[str, str]
) -> DemoKey:
    customer, subscription = f"cus_demo_{plan}", f"sub_demo_{plan}"
    await transaction.execute(
        "ensure_demo_customer",
        customer,
        _CREATOR,
        f"Demo customer ({plan})",
        f"{plan}@example.com",
    )
    await transaction.execute("ensure_demo_subscription", subscription, _CREATOR, customer, plan)
    row = await transaction.fetchrow("get_subscription", subscription)
    assert row is not None
    secret = known.get(subscription, "")
    if not secrets.looks_valid(secret):
        secret = secrets.generate_key()
    digest = hasher.digest(secret.encode())
    await transaction.execute("delete_lost_demo_keys", subscription, _KEY_NAME, digest)
    await transaction.execute(
        "ensure_demo_key", ids.new("key"), subscription, _KEY_NAME, secrets.prefix(secret), digest
    )
    return DemoKey(subscription, row["plan"], secret)


def _read(keys_file: Path) -> dict[str, str]:
    try:
        found = json.loads(keys_file.read_text("utf-8"))
    except (OSError, ValueError):
        return {}  # lost or damaged: new keys
    if not isinstance(found, dict):
        return {}
    return {str(key): value for key, value in found.items() if isinstance(value, str)}


def _write(keys_file: Path, keys: dict[str, str]) -> None:
    """Replace the file as a whole, never readable by others."""
    keys_file.parent.mkdir(parents=True, exist_ok=True)
    draft = keys_file.with_name(f"{keys_file.name}.{os.getpid()}.new")
    draft.unlink(missing_ok=True)
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        json.dump(keys, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(keys_file)
