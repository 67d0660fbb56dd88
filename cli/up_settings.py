"""What `tallygate up` decides before it starts anything: the config, the addresses, the stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from core.config import load
from core.errors import TallygateError

UPSTREAM = "TALLYGATE_DEMO_UPSTREAM"
# Set for the processes by `up` itself, so a config may refer to them without a default.
_PROVIDED = (
    "TALLYGATE_REDIS_URL",
    "TALLYGATE_POSTGRES_URL",
    "TALLYGATE_KEY_PEPPER",
    "TALLYGATE_METRICS_DIR",
)


@dataclass(frozen=True)
class Settings:
    """Addresses are (host, port). A store's URL is None when it is to be embedded.

    `upstream_port` is where the demo API is to listen, None when none is to be started.
    """

    config: Path
    gateway: tuple[str, int]
    control: tuple[str, int]
    redis_url: str | None
    postgres_url: str | None
    upstream_port: int | None

    def with_ports(self, gateway: int | None, control: int | None) -> Settings:
        """The same with other ports, where given.

        Raises:
            TallygateError: both would listen on the same port.
        """
        changed = replace(
            self,
            gateway=(self.gateway[0], gateway or self.gateway[1]),
            control=(self.control[0], control or self.control[1]),
        )
        if changed.gateway[1] == changed.control[1]:
            raise TallygateError(
                f"gateway and control both want port {changed.gateway[1]}: choose another for one "
                "of them with --gateway-port or --control-port"
            )
        return changed


def default_config() -> Path:
    """./config.yaml, or else the file that comes with tallygate.

    Raises:
        TallygateError: neither exists.
    """
    here = Path(__file__).parent
    for candidate in (Path("config.yaml"), here / "config.yaml", here.parent / "config.yaml"):
        if candidate.is_file():
            return candidate.absolute()
    raise TallygateError("no config.yaml here: name one with --config")


def read_settings(path: Path, environ: Mapping[str, str], upstream_port: int) -> Settings:
    """Read and check the whole config, so that its problems are seen before anything starts.

    The demo API is started when the config mentions it and the environment does not say where
    one already runs.

    Raises:
        ConfigError: the config has problems; all of them are in the message.
    """
    config = path.absolute()
    wanted = not environ.get(UPSTREAM) and UPSTREAM in config.read_text(errors="replace")
    provided = dict.fromkeys(_PROVIDED, "")
    if wanted:
        provided[UPSTREAM] = f"http://127.0.0.1:{upstream_port}"
    settings = load(config, provided | {name: text for name, text in environ.items() if text})
    return Settings(
        config=config,
        gateway=(settings.settings.gateway.listen.host, settings.settings.gateway.listen.port),
        control=(settings.settings.control.listen.host, settings.settings.control.listen.port),
        redis_url=environ.get("TALLYGATE_REDIS_URL") or settings.settings.redis.url,
        postgres_url=environ.get("TALLYGATE_POSTGRES_URL") or settings.settings.postgres.url,
        upstream_port=upstream_port if wanted else None,
    )
