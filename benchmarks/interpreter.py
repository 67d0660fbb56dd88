"""Which Python runs the gateway. Builds of one version differ in speed.

A Python built without profile-guided and link-time optimisation, as pyenv does by default, is no
fair match for peers that are release builds. Distributions and official images ship optimised ones.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

from benchmarks.tools import CACHE
from gateway import compiled as hot

_ROOT = Path(__file__).resolve().parents[1]

# Typical work of an interpreter loop; seconds of CPU, the best of five.
_PROBE = """
import time
def work():
    seen = {}
    for number in range(60_000):
        seen[number % 100] = str(number).encode() + b"x"
        _ = [each for each in (1, 2, 3)], seen.get(number % 50)
best = 9.0
for _ in range(5):
    started = time.process_time()
    work()
    best = min(best, time.process_time() - started)
print(best)
"""
_BETTER = 0.9  # of the time of our own: less is no reason to take another one
_TIMEOUT_S, _INSTALL_S = 30, 300


def choose(wanted: str = "auto") -> Path:
    """The interpreter asked for, with the project's dependencies; `auto` is this one, unless the
    system has a faster build of the same version."""
    own = Path(sys.executable)
    if wanted != "auto":
        return own if Path(wanted).absolute() == own else _equipped(Path(wanted))
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    system = Path("/usr/bin") / version
    if not system.exists() or system.resolve() == own.resolve():
        return own
    try:
        return _equipped(system) if _probe(system) < _BETTER * _probe(own) else own
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        print(f"{system} would be faster, but: {error}", file=sys.stderr)
        return own


def _equipped(python: Path) -> Path:
    """A virtual environment of that interpreter with requirements/run.txt, made once and kept."""
    wanted = _ROOT / "requirements/run.txt"
    stamp = hashlib.sha256(f"{python.resolve()}{wanted.read_text()}".encode()).hexdigest()[:12]
    folder = CACHE / f"venv-{stamp}"
    found = folder / "bin/python"
    if (folder / "complete").exists():
        return found
    print(f"installing the gateway's dependencies for {python}", file=sys.stderr)
    uv = [sys.executable, "-m", "uv"]
    for command in (
        [*uv, "venv", "--clear", "--python", str(python), str(folder)],
        [*uv, "pip", "install", "--python", str(found), "--require-hashes", "-r", str(wanted)],
    ):
        subprocess.run(command, check=True, capture_output=True, timeout=_INSTALL_S)
    (folder / "complete").touch()
    return found


def environment(python: Path) -> dict[str, str]:
    """What another interpreter needs to find the project, which is installed for this one."""
    return {} if python == Path(sys.executable) else {"PYTHONPATH": str(_ROOT)}


def describe(python: Path) -> str:
    """CPython's version and compiler."""
    code = "import platform as p; print(p.python_version(), 'by', p.python_compiler())"
    found = subprocess.run(
        [str(python), "-c", code], check=True, capture_output=True, text=True, timeout=_TIMEOUT_S
    )
    other = "" if python == Path(sys.executable) else " of the system"
    compiled = any(Path(hot.__file__).parent.glob("responder.*.so"))
    return f"CPython{other} {found.stdout.strip()}" + (", `make compile`" if compiled else "")


def _probe(python: Path) -> float:
    found = subprocess.run(
        [python, "-I", "-c", _PROBE],
        check=True,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
    )
    return float(found.stdout)
