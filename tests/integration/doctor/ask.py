"""Asking the doctor, as a library and as a command."""

from __future__ import annotations

import asyncio

from click.testing import CliRunner

from core.config import Snapshot, loads
from core.doctor import Diagnosis, Finding, diagnose

CONFIG = """
gateway: {workers: 2}
upstreams: {api: {urls: [http://127.0.0.1:1]}}
routes: [{match: {path: /*}, upstream: api}]
plans: {free: {limits: {per_second: {rate: 10/s}}}}
"""


def snapshot(text: str = CONFIG) -> Snapshot:
    return loads(text, env={})


def diagnosed(redis_url: str, postgres_url: str, config: str = CONFIG) -> Diagnosis:
    return asyncio.run(diagnose(snapshot(config), redis_url, postgres_url))


def one(found: Diagnosis, check: str) -> Finding:
    matching = [item for item in found.findings if item.check == check]
    assert len(matching) == 1, [item.check for item in found.findings]
    return matching[0]


def run(*words: str, **env: str) -> tuple[int, str, str]:
    from cli.main import main

    done = CliRunner().invoke(main, ["doctor", *words], env=env)
    return done.exit_code, done.stdout, done.stderr
