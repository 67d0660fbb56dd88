"""Ending a process that served HTTP."""

from __future__ import annotations

import atexit
import os
import sys
from typing import NoReturn


def leave(status: int) -> NoReturn:
    """Ends the process at once; the caller has closed everything that must be closed.

    The interpreter is not taken down: a thread of the server that still asks for it meanwhile would
    abort the process, after a clean stop, with a panic on standard error. Exit handlers do run.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
