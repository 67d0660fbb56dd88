"""How a server that refuses to run as root is started by root.

Three cases, decided by who owns the server's directory:
- we are not root: run as we are;
- root, and root owns the directory: a user namespace in which root appears as `nobody`
  (`unshare`). Files stay root's outside, so nothing needs to be chowned or made traversable;
- where that is not allowed (most containers), or when the directory belongs to another user:
  a real change of user with `setpriv`, to the owner, or to `nobody` after a chown.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
from pathlib import Path

from core.errors import TallygateError

NOBODY = 65534


@functools.cache
def _namespace_works() -> bool:
    """Whether root may make a user namespace here: tried once, it is a matter of the kernel."""
    unshare = shutil.which("unshare")
    if unshare is None:
        return False
    probe = subprocess.run([*_namespace(unshare), "true"], capture_output=True, check=False)
    return probe.returncode == 0


def _namespace(unshare: str) -> list[str]:
    return [unshare, "--user", f"--map-user={NOBODY}", f"--map-group={NOBODY}", "--"]


def prefix(directory: Path, binary: Path, death_signal: int) -> list[str]:
    """The words to put before a command that works in `directory`; empty when we are not root.

    Takes ownership of `directory` for the user that will run. `death_signal` is set again behind
    a change of user, which clears it.

    Raises:
        TallygateError: no way to change the user here, or that user cannot reach the files.
    """
    if os.geteuid() != 0:
        return []
    owner = directory.stat()
    if owner.st_uid == 0 and _namespace_works():
        return _namespace(shutil.which("unshare") or "unshare")
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise TallygateError(
            "Postgres does not run as root and neither unshare nor setpriv (util-linux) is usable "
            "here: run as a normal user, or set TALLYGATE_POSTGRES_URL"
        )
    uid, gid = (owner.st_uid, owner.st_gid) if owner.st_uid else (NOBODY, NOBODY)
    if owner.st_uid == 0:
        _chown_tree(directory, uid, gid)
    words = [setpriv, f"--reuid={uid}", f"--regid={gid}", "--clear-groups"]
    words += ["--pdeathsig", signal.Signals(death_signal).name, "--"]
    for needed, flag in ((directory, "-w"), (binary, "-x")):
        if subprocess.run([*words, "test", flag, needed], check=False).returncode != 0:
            raise TallygateError(
                f"user {uid}, under which root runs Postgres, cannot reach {needed}: move it out "
                "of a private directory (--data-dir), or set TALLYGATE_POSTGRES_URL"
            )
    return words


def _chown_tree(directory: Path, uid: int, gid: int) -> None:
    for folder, _, files in os.walk(directory):
        os.chown(folder, uid, gid)
        for name in files:
            os.chown(Path(folder) / name, uid, gid, follow_symlinks=False)
