"""What `tallygate up` decides before it starts anything: the config, the addresses, the stores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from core.config import Snapshot, load
from core.errors import TallygateError

DEMO_PLANS = ("free", "pro")
UPSTREAM = "TALLYGATE_DEMO_UPSTREAM"
SPOOL_DIR = "TALLYGATE_SPOOL_DIR"
# Set for the processes by `up` itself, so a config may refer to them without a default.
_PROVIDED = (
    "TALLYGATE_REDIS_URL",
    "TALLYGATE_POSTGRES_URL",
    "TALLYGATE_KEY_PEPPER",
    "TALLYGATE_METRICS_DIR",
    SPOOL_DIR,
)


@dataclass(frozen=True)
class Settings:
    """Addresses are (host, port). A store's URL is None when it is to be embedded.

    `key_pepper` is None when one of the data directory's own is to be used. `upstream_port` is
    where the demo API is to listen, None when none is to be started. What can be tried with a
    demo key: `demo_plans`, a GET of `try_path` (None when no route takes a key), `key_header` up to
    the key itself.
    """

    config: Path
    gateway: tuple[str, int]
    control: tuple[str, int]
    redis_url: str | None
    postgres_url: str | None
    key_pepper: str | None = field(repr=False)
    upstream_port: int | None
    demo_plans: tuple[str, ...]
    try_path: str | None
    key_header: str

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
    provided = dict.fromkeys(_PROVIDED, "") | {SPOOL_DIR: "a directory of the data directory"}
    if wanted:
        provided[UPSTREAM] = f"http://127.0.0.1:{upstream_port}"
    given = {name: text for name, text in environ.items() if text}
    snapshot = load(config, provided | given)
    settings = snapshot.settings
    pepper = settings.secrets.key_pepper
    return Settings(
        config=config,
        gateway=(settings.gateway.listen.host, settings.gateway.listen.port),
        control=(settings.control.listen.host, settings.control.listen.port),
        redis_url=settings.redis.url,
        postgres_url=settings.postgres.url,
        key_pepper=pepper.get_secret_value() if pepper else None,
        upstream_port=upstream_port if wanted else None,
        demo_plans=tuple(plan for plan in DEMO_PLANS if plan in snapshot.plans),
        try_path=_try_path(snapshot),
        key_header=_key_header(settings.gateway.key.headers),
    )


def _try_path(snapshot: Snapshot) -> str | None:
    """A path below the first route that takes a key and answers a GET; else such a route's own."""
    open_routes = [
        route.path
        for route in snapshot.routes
        if route.upstream
        and not route.keyless
        and not route.host
        and (not route.methods or "GET" in route.methods)
    ]
    for path in open_routes:
        if path.endswith("/*"):
            return path.removesuffix("*") + "current"
    return open_routes[0] if open_routes else None


def _key_header(headers: tuple[str, ...]) -> str:
    if "x-api-key" in headers:
        return "X-API-Key: "
    first = headers[0] if headers else "authorization"
    return "Authorization: Bearer " if first == "authorization" else f"{first}: "
