"""Where a command finds its stores: flags, environment, configuration, or what `up` left behind.

`tallygate up` writes `<data dir>/env.json` (mode 0600): a JSON object of environment variables
that hold the URLs of the servers it runs and the key pepper. Other commands read it, so that they
work in a second terminal without any setting.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from core import clock
from core.errors import InvalidValueError, TallygateError
from core.policy import Plan
from core.secrets import KeyHasher

if TYPE_CHECKING:
    from core.config import Snapshot

DEFAULT_CONFIG = Path("config.yaml")
DEFAULT_DATA_DIR = Path(".tallygate")
ENV_FILE = "env.json"
POSTGRES_URL = "TALLYGATE_POSTGRES_URL"
REDIS_URL = "TALLYGATE_REDIS_URL"
KEY_PEPPER = "TALLYGATE_KEY_PEPPER"


def read_env(data_dir: Path = DEFAULT_DATA_DIR) -> dict[str, str]:
    """What `tallygate up` left in `data_dir`; empty when it never ran there.

    Raises:
        TallygateError: the file is there and cannot be read.
    """
    path = data_dir / ENV_FILE
    try:
        found = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except NotADirectoryError:
        return {}
    except (OSError, ValueError) as error:
        raise TallygateError(
            f"{path}: cannot be read: {error}; start `tallygate up` anew"
        ) from None
    if not isinstance(found, dict):
        raise TallygateError(f"{path}: not a JSON object; start `tallygate up` anew")
    return {str(key): str(value) for key, value in found.items()}


class Context:
    """What the management commands work with.

    A configuration that gives a value itself goes first, as it does for the processes. `${NAME}`
    in it, and what it leaves out, come from the data directory of `--data-dir`, then from the
    environment, then from the default data directory.
    """

    def __init__(
        self,
        config_path: Path | None = None,
        data_dir: Path | None = None,
        environment: Mapping[str, str] = os.environ,
    ) -> None:
        self._config_path = config_path
        self._data_dir = data_dir
        self._environment = environment
        self._loaded: Snapshot | None = None

    def variables(self) -> dict[str, str]:
        """The environment together with what `up` left.

        Raises:
            TallygateError: `--data-dir` was given and `up` never ran there.
        """
        given = {key: value for key, value in self._environment.items() if value}
        if self._data_dir is None:
            return read_env() | given
        left = read_env(self._data_dir)
        if not left:
            raise TallygateError(
                f"--data-dir: {self._data_dir / ENV_FILE} does not exist: give the directory that "
                "`tallygate up` uses"
            )
        return given | left

    def postgres_url(self) -> str:
        """The database to manage.

        Raises:
            TallygateError: nothing names one.
            ConfigError: the configuration has problems.
        """
        snapshot = self._snapshot()
        url = snapshot.settings.postgres.url if snapshot else None
        url = url or self.variables().get(POSTGRES_URL)
        if not url:
            raise TallygateError(
                f"no database: set {POSTGRES_URL}, give --config with postgres.url, or run this "
                "where `tallygate up` runs (or give its --data-dir)"
            )
        return url

    def hasher(self) -> KeyHasher:
        """Digests keys as the gateway does.

        Raises:
            InvalidValueError: nothing gives the pepper.
            ConfigError: the configuration has problems.
        """
        snapshot = self._snapshot()
        secret = snapshot.settings.secrets.key_pepper if snapshot else None
        pepper = secret.get_secret_value() if secret is not None else None
        return KeyHasher(pepper or self.variables().get(KEY_PEPPER, ""))

    def plans(self) -> Mapping[str, Plan] | None:
        """Plans of `--config`, or of ./config.yaml; None when there is no configuration.

        Raises:
            ConfigError: the configuration has problems.
        """
        snapshot = self._snapshot()
        return None if snapshot is None else snapshot.plans

    def check_plan(self, plan: str) -> None:
        """
        Raises:
            InvalidValueError: there is a configuration and `plan` is not in it.
        """
        plans = self.plans()
        if plans is not None and plan not in plans:
            known = ", ".join(sorted(plans)) or "none"
            raise InvalidValueError(
                f"plan: {plan!r} is not in the configuration: use one of {known}, add it there, "
                "or give --any-plan"
            )

    def _snapshot(self) -> Snapshot | None:
        path = self._config_path or DEFAULT_CONFIG
        if self._loaded is None and (self._config_path is not None or path.exists()):
            from core import config  # only when needed: it pulls in pydantic, 150 ms

            self._loaded = config.load(path, env=self.variables())
        return self._loaded


def parse_time(field_name: str, text: str) -> int:
    """An ISO 8601 date or time, UTC unless it says otherwise, as epoch milliseconds.

    Raises:
        InvalidValueError: it is none.
    """
    try:
        value = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidValueError(
            f"{field_name}: {text!r} is no time: write it as 2026-01-31 or 2026-01-31T12:00:00Z"
        ) from None
    return clock.from_datetime(value if value.tzinfo else value.replace(tzinfo=UTC))
