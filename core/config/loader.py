"""Reads `config.yaml`: every problem at once, each with its path, its value and the fix."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import ValidationError

from core import clock
from core.config import document
from core.config.compile import Meters, Plans, mapping
from core.config.fields import Address, parse_address
from core.config.models import Config, ControlSettings, GatewaySettings
from core.config.problems import Problems
from core.config.routing import compile_routes
from core.config.snapshot import Snapshot
from core.config.tls import TLS_LISTEN
from core.config.units import UnitError
from core.config.upstream_compile import compile_upstreams
from core.errors import ConfigError

# What a file leaves out, or leaves empty, comes from these: a file need not spell `${…}` for them.
FROM_ENVIRONMENT = {
    ("redis", "url"): "TALLYGATE_REDIS_URL",
    ("postgres", "url"): "TALLYGATE_POSTGRES_URL",
    ("secrets", "key_pepper"): "TALLYGATE_KEY_PEPPER",
}


def load(path: str | os.PathLike[str], env: Mapping[str, str] | None = None) -> Snapshot:
    """The configuration in a file; `env` fills `${NAME}`, the process environment by default.

    `env` also gives what `FROM_ENVIRONMENT` lists, where the file does not.

    Raises:
        ConfigError: the file cannot be read, or has problems; it holds all of them.
    """
    source = os.fspath(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(source, [f"cannot be read: {error.strerror or error}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError(source, [f"not UTF-8 text, at byte {error.start}"]) from None
    return loads(text, source, env)


def loads(text: str, source: str = "config.yaml", env: Mapping[str, str] | None = None) -> Snapshot:
    """The configuration in YAML text; `source` names it in messages.

    Raises:
        ConfigError: it has problems; it holds all of them.
    """
    env = os.environ if env is None else env
    doc = document.read(text, source, env)
    _fill_in(doc.data, env)
    problems = Problems(doc)
    settings: Config | None = None
    try:
        settings = Config.model_validate(doc.data)
    except ValidationError as error:
        problems.add_validation(error)
    # The checks across sections run on whatever is sound, so that one look shows everything.
    meters = Meters(doc.data, problems)
    upstreams = compile_upstreams(doc.data, problems)
    plans = Plans(doc.data, meters, problems)
    routes = compile_routes(doc.data, set(mapping(doc.data, "upstreams")), meters, plans, problems)
    _check_addresses(doc.data, problems)
    if problems or settings is None:
        raise ConfigError(source, problems.lines())
    return Snapshot(
        settings=settings,
        meters=MappingProxyType(meters.compiled),
        plans=MappingProxyType(plans.compiled),
        routes=routes,
        upstreams=MappingProxyType(upstreams),
        source=source,
        digest=hashlib.sha256(text.encode()).hexdigest(),
        loaded_at_ms=clock.now_ms(),
    )


def _fill_in(data: dict[str, Any], env: Mapping[str, str]) -> None:
    for (section, name), variable in FROM_ENVIRONMENT.items():
        given = data.get(section)
        if env.get(variable) and (given is None or isinstance(given, dict)):
            data[section] = {**(given or {})}
            if data[section].get(name) in (None, ""):
                data[section][name] = env[variable]


def _check_addresses(data: Mapping[str, Any], problems: Problems) -> None:
    """No two listeners can share an address; a wildcard host shares with every other."""
    gateway = _listen(mapping(data, "gateway"), GatewaySettings().listen)
    control = _listen(mapping(data, "control"), ControlSettings().listen)
    # Said where it is written, as the other one may be a default.
    section = "control" if "listen" in mapping(data, "control") else "gateway"
    other = f"gateway.listen ({gateway})" if section == "control" else f"control.listen ({control})"
    _check_apart(gateway, control, (section, "listen"), other, problems)
    tls = mapping(mapping(data, "gateway"), "tls")
    if tls:
        address = _listen(tls, TLS_LISTEN)
        where = ("gateway", "tls", "listen")
        _check_apart(address, gateway, where, f"gateway.listen ({gateway})", problems)
        _check_apart(address, control, where, f"control.listen ({control})", problems)


def _check_apart(
    one: Address | None, two: Address | None, where: tuple[str, ...], other: str, problems: Problems
) -> None:
    if one is None or two is None or one.port != two.port:
        return
    wildcards = {"0.0.0.0", "::"}  # noqa: S104 - recognised, not listened on
    if one.host == two.host or wildcards & {one.host, two.host}:
        problems.add(where, f"already taken by {other}; change the port of one")


def _listen(section: Mapping[str, Any], default: Address) -> Address | None:
    raw = section.get("listen")
    try:
        return default if raw is None else parse_address(raw)
    except UnitError:
        return None
