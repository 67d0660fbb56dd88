"""`tallygate creators|customers|subscriptions|keys` and the demo data, as processes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cli.demo import ensure_demo
from core import secrets
from core.db import connect_pool
from core.directory import list_keys, lookup_keys, set_plan
from core.secrets import KeyHasher

ROOT = Path(__file__).parents[3]
PEPPER = "a pepper for tests"
CONFIG = """
upstreams: {echo: {urls: [http://127.0.0.1:9]}}
routes: [{match: {path: /*}, upstream: echo}]
plans:
  free: {limits: {per_day: {window: 1d, limit: 10}}}
  pro: {limits: {per_day: {window: 1d, limit: 100}}}
"""


class Cli:
    """Runs commands in an empty directory, so that no configuration is found by chance."""

    def __init__(self, directory: Path, **env: str) -> None:
        self.directory = directory
        self.env = {k: v for k, v in os.environ.items() if not k.startswith("TALLYGATE_")}
        self.env |= {"PYTHONPATH": str(ROOT)} | env

    def run(self, *args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "cli.manage", *args],
            cwd=self.directory,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def json(self, *args: str) -> Any:
        done = self.run(*args, "--json")
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def customer(self) -> str:
        creator = self.json("creators", "create", "--name", "Ann", "--email", "ann@example.com")
        customer = self.json(
            *("customers", "create", "--creator", creator["id"]),
            *("--name", "Bob [b]", "--email", "bob@example.com"),
        )
        return str(customer["id"])


@pytest.fixture
def cli(database: str, tmp_path: Path) -> Cli:
    return Cli(tmp_path, TALLYGATE_POSTGRES_URL=database, TALLYGATE_KEY_PEPPER=PEPPER)


def test_from_a_creator_to_a_revoked_key(cli: Cli, database: str) -> None:
    customer = cli.customer()
    sub = cli.json(
        *("subscriptions", "create", "--customer", customer, "--plan", "free"),
        *("--anchor", "2026-01-31"),
    )
    assert (sub["status"], sub["anchor"]) == ("active", "2026-01-31T00:00:00.000Z")
    key = cli.json("keys", "create", "--subscription", sub["id"], "--name", "ci")
    assert secrets.looks_valid(key["secret"])

    async def stored() -> int:
        db = await connect_pool(database, size=1, timeout_s=5)
        digest = KeyHasher(PEPPER).digest(key["secret"].encode())
        found = len(await lookup_keys(db, [digest]))
        await db.close()
        return found

    assert asyncio.run(stored()) == 1
    [listed] = cli.json("keys", "list", "--subscription", sub["id"])
    assert listed == {k: v for k, v in key.items() if k != "secret"}
    assert cli.json("subscriptions", "change-plan", sub["id"], "pro")["plan"] == "pro"
    assert cli.json("subscriptions", "set-status", sub["id"], "paused")["status"] == "paused"
    moved = cli.json("subscriptions", "set-anchor", sub["id"], "2026-02-01T01:00:00+01:00")
    assert moved["anchor"] == "2026-02-01T00:00:00.000Z"
    assert cli.json("subscriptions", "show", sub["id"]) == moved
    changed = cli.json("keys", "update", key["id"], "--inactive", "--expires", "2030-01-01")
    assert (changed["active"], changed["expires_at"]) == (False, "2030-01-01T00:00:00.000Z")
    assert cli.json("keys", "update", key["id"], "--expires", "never")["expires_at"] is None
    assert cli.json("keys", "revoke", key["id"]) == {"id": key["id"], "revoked": True}
    assert cli.json("keys", "list") == []


def test_tables_for_people_show_whole_identifiers(cli: Cli) -> None:
    customer = cli.customer()
    shown = cli.run("customers", "list").stdout
    assert customer in shown
    assert "Bob [b]" in shown
    sub = cli.json("subscriptions", "create", "--customer", customer, "--plan", "free")["id"]
    created = cli.run("keys", "create", "--subscription", sub)
    assert "tg_live_" in created.stdout
    assert "Copy the secret now" in created.stderr
    assert cli.run("keys", "list", "--subscription", "sub_none").stdout == "None yet.\n"


@pytest.mark.parametrize(
    ("args", "code", "message"),
    [
        (("subscriptions", "show", "sub_x"), 1, "tallygate: subscription 'sub_x' does not exist"),
        (("creators", "create", "--name", "A", "--email", "x"), 1, "email: 'x' is no address"),
        (("subscriptions", "set-anchor", "sub_x", "soon"), 1, "anchor: 'soon' is no time"),
        (("subscriptions", "set-status", "sub_x", "asleep"), 2, "asleep"),
        (("creators", "create", "--name", "A"), 2, "--email"),
        (("keys", "update", "key_x"), 2, "nothing to change"),
    ],
)
def test_failures_have_a_message_and_a_code(
    cli: Cli, args: tuple[str, ...], code: int, message: str
) -> None:
    done = cli.run(*args)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_plan_that_the_configuration_lacks_is_refused(cli: Cli, tmp_path: Path) -> None:
    customer = cli.customer()
    config = tmp_path / "other.yaml"
    config.write_text(CONFIG)
    create = ("subscriptions", "create", "--customer", customer, "--config", str(config))
    done = cli.run(*create, "--plan", "por")
    assert done.returncode == 1
    assert "plan: 'por' is not in the configuration: use one of free, pro" in done.stderr
    assert cli.json(*create, "--plan", "por", "--any-plan")["plan"] == "por"
    sub = cli.json(*create, "--plan", "pro")["id"]
    (tmp_path / "config.yaml").write_text(CONFIG)  # the default one
    done = cli.run("subscriptions", "change-plan", sub, "max")
    assert done.returncode == 1
    assert "plan: 'max'" in done.stderr


def test_the_database_of_a_running_up_is_found(database: str, tmp_path: Path) -> None:
    none = Cli(tmp_path).run("creators", "list")
    assert none.returncode == 1
    assert "set TALLYGATE_POSTGRES_URL" in none.stderr
    left = json.dumps({"TALLYGATE_POSTGRES_URL": database, "TALLYGATE_KEY_PEPPER": PEPPER})
    for directory in (".tallygate", "data"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "env.json").write_text(left)
    assert Cli(tmp_path).json("creators", "list") == []
    elsewhere = Cli(tmp_path, TALLYGATE_POSTGRES_URL="postgresql://127.0.0.1:1/x")
    assert elsewhere.run("creators", "list").returncode == 1
    assert elsewhere.json("creators", "list", "--data-dir", "data") == []
    missing = elsewhere.run("creators", "list", "--data-dir", "nowhere")
    assert missing.returncode == 1
    assert "--data-dir" in missing.stderr


def test_a_key_without_a_pepper_is_refused(database: str, tmp_path: Path) -> None:
    cli = Cli(tmp_path, TALLYGATE_POSTGRES_URL=database)
    done = cli.run("keys", "create", "--subscription", "sub_x")
    assert done.returncode == 1
    assert "TALLYGATE_KEY_PEPPER" in done.stderr


def test_demo_data_is_repeatable_and_mends_what_is_lost(database: str, tmp_path: Path) -> None:
    keys_file = tmp_path / "deep" / "demo.json"

    async def run() -> None:
        first = await ensure_demo(database, PEPPER, keys_file)
        assert [demo.plan for demo in first] == ["free", "pro"]
        assert keys_file.stat().st_mode & 0o777 == 0o600
        assert await ensure_demo(database, PEPPER, keys_file) == first

        db = await connect_pool(database, size=1, timeout_s=5)
        digests = [KeyHasher(PEPPER).digest(demo.key.encode()) for demo in first]
        assert len(await lookup_keys(db, digests)) == 2

        for key in await list_keys(db):  # the database's half is lost: the same keys again
            await db.fetchval("delete_key", key.id)
        assert await ensure_demo(database, PEPPER, keys_file) == first
        assert len(await lookup_keys(db, digests)) == 2

        keys_file.unlink()  # the file is lost: new keys, and the old ones end
        await set_plan(db, first[0].subscription, "max")
        second = await ensure_demo(database, PEPPER, keys_file)
        assert second[0].plan == "max"
        assert {demo.key for demo in first}.isdisjoint(demo.key for demo in second)
        assert await lookup_keys(db, digests) == []
        assert len(await list_keys(db)) == 2

        keys_file.write_text("{damaged")
        assert len({demo.key for demo in await ensure_demo(database, PEPPER, keys_file)}) == 2
        assert len(await list_keys(db)) == 2
        await db.close()

    asyncio.run(run())
