"""Compiles the gateway's hot modules with mypyc, next to their sources: `make compile`.

Python takes an extension module before a source file of the same name; `make clean` removes them.
Needs a C compiler and Python's headers (Debian: gcc, python3-dev). Takes a minute.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from mypyc.build import mypycify
from setuptools import setup

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from gateway.compiled import MODULES  # noqa: E402 - found by the line above


def main() -> None:
    files = [name.replace(".", "/") + ".py" for name in MODULES]
    setup(
        name="tallygate-compiled",
        packages=[],
        py_modules=[],
        ext_modules=mypycify(files, opt_level="3", debug_level="0", group_name="tallygate"),
        script_args=["--quiet", "build_ext", "--inplace"],
    )
    shutil.rmtree(ROOT / "build", ignore_errors=True)


if __name__ == "__main__":
    main()
