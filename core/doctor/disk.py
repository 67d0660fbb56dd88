"""What kind of file system a directory is on. Linux; elsewhere nothing is known."""

from __future__ import annotations

import os
from pathlib import Path

_MOUNTS = Path("/proc/self/mountinfo")


def filesystem(path: Path) -> str:
    """The type of the file system that holds `path`, such as ext4 or tmpfs; '' when not known."""
    try:
        device = os.stat(path).st_dev
        wanted = f"{os.major(device)}:{os.minor(device)}"
        found = ""
        for line in _MOUNTS.read_text().splitlines():
            # id parent major:minor root mount-point options … - type source options
            before, _, after = line.partition(" - ")
            fields = before.split(" ")
            if fields[2] == wanted and path.resolve().is_relative_to(_unescaped(fields[4])):
                found = after.split(" ")[0]
    except (OSError, IndexError, ValueError):
        return ""
    return found


def _unescaped(text: str) -> str:
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\134", "\\")):
        text = text.replace(code, character)
    return text


def free_bytes(path: Path) -> int:
    """Room for an unprivileged user where `path` is.

    Raises:
        OSError: there is no such path.
    """
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize
