"""Checks the Lua files: compiled by Lua 5.1 with includes resolved, then luacheck when it is there.

luacheck (Debian: lua-check) finds undefined globals and unused variables; the compile check alone
finds syntax errors. Exit status 1 on any finding.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from lupa import LuaError
from lupa.lua51 import LuaRuntime

ROOT = Path(__file__).resolve().parents[1]


def compile_error(name: str, source: str) -> str | None:
    """What Lua 5.1 says against the source as a function body; None when nothing."""
    runtime = LuaRuntime(unpack_returned_tuples=True)
    load = runtime.eval("function(source, name) local f, e = loadstring(source, name) return e end")
    try:
        error = load(source, f"={name}")
    except LuaError as raised:
        error = str(raised)
    return None if error is None else str(error)


def sources(folder: Path) -> dict[str, str]:
    """File name -> what Redis would be sent. Includes count as part of each script they are in."""
    sys.path.insert(0, str(ROOT))
    from core.redis.scripts import render

    found = {}
    for path in sorted(folder.glob("*.lua")):
        found[path.name] = render(path.stem)
    for path in sorted(folder.glob("includes/*.lua")):
        found[f"includes/{path.name}"] = path.read_text(encoding="utf-8")
    return found


def main() -> int:
    """Check `lua/`; print findings; 0 when there are none."""
    folder = ROOT / "lua"
    scripts = sources(folder)
    if not scripts:
        print("lua: no scripts found", file=sys.stderr)
        return 1
    errors = [error for name, text in scripts.items() if (error := compile_error(name, text))]
    for error in errors:
        print(f"lua: {error}", file=sys.stderr)
    luacheck = shutil.which("luacheck")
    if luacheck is None:
        print(f"lua: {len(scripts)} files compile (no luacheck here: apt install lua-check)")
        return 1 if errors else 0
    status = 0
    for name, text in scripts.items():
        if name.startswith("includes/"):
            continue  # checked where they are included: alone, they miss each other's locals
        command = [luacheck, "--config", str(ROOT / ".luacheckrc"), "--filename", f"lua/{name}"]
        command += ["--quiet", "--no-color", "-"]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if done.returncode:
            print(done.stdout + done.stderr, file=sys.stderr, end="")
            status = 1
    print(f"lua: {len(scripts)} files compile, luacheck {'has findings' if status else 'agrees'}")
    return 1 if errors or status else 0


if __name__ == "__main__":
    sys.exit(main())
