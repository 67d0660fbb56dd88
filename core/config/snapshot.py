"""One validated configuration: what a process reads, swapped whole on reload."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from core.config.models import Config
from core.policy import Meter, Plan, Route, Upstream


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Immutable; a request reads it once. Routes are in match order: the first match is taken.

    `settings` is the validated file (process settings in `settings.gateway`, `settings.redis`,
    …); the other fields are its compiled form. `meters` always holds `requests`. `digest` is the
    SHA-256 of the file's text, in hex, before variables were filled in.
    """

    settings: Config
    meters: Mapping[str, Meter]
    plans: Mapping[str, Plan]
    routes: tuple[Route, ...]
    upstreams: Mapping[str, Upstream]
    source: str
    digest: str
    loaded_at_ms: int
