"""Whole stacks for the acceptance tests: one that most share, others where a test breaks it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.acceptance.catalogue import SHARED
from tests.support.load import Load
from tests.support.servers import NewDatabase, server_directory
from tests.support.stack import Stack, start_stack


@pytest.fixture(scope="session")
def stack(new_database: NewDatabase) -> Iterator[Stack]:
    """Four gateways of one worker each on one Valkey and one ledger; tests bring subscribers."""
    with (
        server_directory() as path,
        start_stack(path, SHARED, new_database(), gateways=(1, 1, 1, 1)) as running,
    ):
        yield running


@pytest.fixture(scope="session")
def load() -> Iterator[Load]:
    """Three client processes."""
    with Load(3) as clients:
        yield clients


@pytest.fixture
def own_stack(new_database: NewDatabase) -> Iterator[Callable[..., Stack]]:
    """Starts a stack that the test may break: `own_stack(config, gateways=(2,))`."""
    with ExitStack() as stop:

        def start(config: str, *, gateways: tuple[int, ...] = (1,), postgres: str = "") -> Stack:
            path = stop.enter_context(server_directory())
            return stop.enter_context(
                start_stack(path, config, postgres or new_database(), gateways=gateways)
            )

        yield start
