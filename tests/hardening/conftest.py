"""One gateway of one worker in front of a recording upstream, for every test here."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hardening.check import Victim, World
from tests.support.recorder import Recorder
from tests.support.servers import NewDatabase, server_directory
from tests.support.stack import start_stack

# 127.0.0.2 is the one trusted proxy: a client can bind to it.
_CONFIG = """
gateway:
  drain: 1s
  %(client)s
  key: {query: api_key}
  trusted_proxies: [127.0.0.2/32]
redis: {url: "${TALLYGATE_REDIS_URL}", timeout: 5s}
postgres: {url: "${TALLYGATE_POSTGRES_URL}", timeout: 5s}
secrets: {key_pepper: "${TALLYGATE_KEY_PEPPER}"}
log: {format: json, level: warning}
meters: {credits: {unit: credit}}
upstreams:
  recorder: {urls: ["http://127.0.0.1:%(port)d"], timeout: {connect: 10s}}
routes:
  - {match: {path: /paid/dear}, upstream: recorder, meters: {requests: 1, credits: 100}}
  - {match: {path: /paid/*}, upstream: recorder, meters: {requests: 1, credits: 1}}
  - {match: {path: /public/*}, upstream: recorder, keyless: true, plan: anonymous}
  - {match: {path: /small/*}, upstream: recorder, max_body: 1 KiB}
  - {match: {path: /*}, upstream: recorder}
plans:
  anonymous:
    limits: {hour: {window: 1h, limit: 1000}}
  all:
    limits: {year: {period: billing, limit: 100_000}}
"""


def config(port: int, client: str = "") -> str:
    """The configuration in front of a recorder; `client` is the section of that name."""
    return _CONFIG % {"port": port, "client": client}


@pytest.fixture(scope="session")
def world(new_database: NewDatabase) -> Iterator[World]:
    with (
        server_directory() as path,
        Recorder() as recorder,
        start_stack(path, config(recorder.port), new_database(), reconcilers=0) as stack,
    ):
        victim = Victim()
        yield World(stack, recorder, victim, stack.subscribe("all"), stack.subscribe("all"))
        victim.close()


@pytest.fixture(autouse=True)
def _clean(world: World) -> None:
    world.recorder.strays.clear()
    world.recorder.answers.clear()
