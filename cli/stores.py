"""The configuration and both stores' URLs, for commands that read both."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cli.context import POSTGRES_URL, REDIS_URL, Context
from core.errors import TallygateError

if TYPE_CHECKING:
    from core.config import Snapshot


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
