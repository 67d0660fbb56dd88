"""Configuration: typed models, a loader that reports every problem at once, live reload.

`load` gives a `Snapshot`; `ConfigWatcher.current` is the one in force. Compiled plans and routes
are `core.policy` types. Imports `core.policy`, `core.errors`, `core.clock`, PyYAML and pydantic;
never a driver, an event loop outside `reload`, or another part of `core`.
"""

from core.config.fields import Address
from core.config.loader import load, loads
from core.config.models import Config
from core.config.reload import ConfigWatcher, plans_removed, restart_needed
from core.config.schema import json_schema
from core.config.snapshot import Snapshot

__all__ = [
    "Address",
    "Config",
    "ConfigWatcher",
    "Snapshot",
    "json_schema",
    "load",
    "loads",
    "plans_removed",
    "restart_needed",
]
