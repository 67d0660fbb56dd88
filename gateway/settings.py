"""The settings without which a gateway cannot run, checked before any worker is started."""

from __future__ import annotations

from typing import NamedTuple

from core.config import Snapshot
from core.errors import TallygateError


class Required(NamedTuple):
    """Where the stores are, and the secret that keys are hashed with."""

    redis_url: str
    postgres_url: str
    pepper: str


def required(snapshot: Snapshot) -> Required:
    """The required settings.

    Raises:
        TallygateError: one of them is missing; the message names it and its variable.
    """
    settings = snapshot.settings
    pepper = settings.secrets.key_pepper
    return Required(
        _given(settings.redis.url, "redis.url", "TALLYGATE_REDIS_URL"),
        _given(settings.postgres.url, "postgres.url", "TALLYGATE_POSTGRES_URL"),
        _given(
            pepper.get_secret_value() if pepper else None,
            "secrets.key_pepper",
            "TALLYGATE_KEY_PEPPER",
        ),
    )


def _given(value: str | None, name: str, variable: str) -> str:
    if not value:
        raise TallygateError(
            f"{name}: not set: give it in the configuration or set {variable}; "
            "`tallygate up` provides it by itself"
        )
    return value
