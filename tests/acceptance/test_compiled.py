"""The compiled hot path does what its source does: built in a copy of the tree and tested there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUITES = (
    "tests/integration/proxy",
    "tests/integration/h2/test_requests.py",
    "tests/integration/websocket/test_through.py",
    "tests/hardening/test_order.py",
    "tests/unit/answers/test_headers.py",
    "tests/unit/answers/test_repeat.py",
    "tests/unit/proxy/test_request.py",
)


def _can_compile() -> bool:
    header = Path(sysconfig.get_path("include")) / "Python.h"
    return header.exists() and shutil.which("cc") is not None


@pytest.mark.timeout(900)
@pytest.mark.skipif(not _can_compile(), reason="no C compiler, or no headers of this Python")
def test_the_compiled_gateway_passes_the_same_tests(tmp_path: Path) -> None:
    copy = tmp_path / "tree"
    skipped = shutil.ignore_patterns(".venv", ".git", ".tallygate", "*.so", "__pycache__", ".cache")
    shutil.copytree(ROOT, copy, ignore=skipped)
    subprocess.run([sys.executable, "tools/compile.py"], cwd=copy, check=True)
    environment = os.environ | {"PYTHONPATH": str(copy)}

    where = "import gateway.http.h1, gateway.responder as r; from gateway import compiled; "
    where += "print(compiled.check(), r.__file__)"
    loaded = subprocess.run(
        [sys.executable, "-c", where],
        cwd=copy, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert loaded.startswith(f"True {copy}")

    found = subprocess.run(
        [sys.executable, "-m", "pytest", "--numprocesses", "2", "--dist", "loadfile", *SUITES],
        cwd=copy, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert found.returncode == 0, found.stdout[-4000:]

    # Changed source beside an older extension is no gateway that anybody would understand.
    source = copy / "gateway" / "responder.py"
    os.utime(source, (2**31, 2**31))
    refused = subprocess.run(
        [sys.executable, "-c", where], cwd=copy, env=environment, capture_output=True, text=True
    )
    assert refused.returncode != 0
    assert "make compile" in refused.stderr
