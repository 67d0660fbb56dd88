"""The configuration and both stores' URLs, for commands that read both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from cli.context import DEFAULT_DATA_DIR, POSTGRES_URL, REDIS_URL, Context
from core.errors import TallygateError

if TYPE_CHECKING:
    from core.config import Snapshot

_F = TypeVar("_F", bound=Callable[..., Any])


def place_options(command: _F) -> _F:
    """`--config` and `--data-dir`, as `config_path` and `data_dir`: where a command looks."""
    config = click.option(
        "--config",
        "config_path",
        type=click.Path(path_type=Path, exists=True, dir_okay=False),
        help="Configuration  [default: ./config.yaml, or else the one that comes with tallygate]",
    )
    data_dir = click.option(
        "--data-dir",
        type=click.Path(path_type=Path, file_okay=False),
        help=f"Data directory of `tallygate up`  [default: {DEFAULT_DATA_DIR}]",
    )
    return config(data_dir(command))


def find_stores(context: Context, config_path: Path | None) -> tuple[Snapshot, str, str]:
    """The configuration, Redis' URL, Postgres' URL.

    Raises:
        ConfigError: the configuration has problems.
        TallygateError: no configuration, or nothing names a store.
    """
    from cli.up_settings import default_config  # lazily: only where no file is named
    from core.config import load  # lazily: it pulls in pydantic

    variables = context.variables()
    snapshot = load(config_path or default_config(), variables)
    urls = []
    for url, name in (
        (snapshot.settings.redis.url or variables.get(REDIS_URL), REDIS_URL),
        (snapshot.settings.postgres.url or variables.get(POSTGRES_URL), POSTGRES_URL),
    ):
        if not url:
            raise TallygateError(
                f"no store: set {name}, give --config with its URL, or run this where "
                "`tallygate up` runs (or give its --data-dir)"
            )
        urls.append(url)
    return snapshot, urls[0], urls[1]
