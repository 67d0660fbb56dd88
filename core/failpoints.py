"""Named places at which a test can end this process: how crash claims are proved.

`TALLYGATE_FAILPOINTS=flush.committed` kills the process with SIGKILL when it first reaches that
place; `flush.committed:3` at the third time; several are separated by commas. Unset, as in
production, `reach` is one look-up in an empty dictionary.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "TALLYGATE_FAILPOINTS"


def _parse(text: str) -> dict[str, int]:
    armed: dict[str, int] = {}
    for item in filter(None, text.split(",")):
        name, _, times = item.partition(":")
        armed[name] = int(times or 1)
    return armed


_armed = _parse(os.environ.get(VARIABLE, ""))


def reach(name: str) -> None:
    """Ends the process here, by SIGKILL, if a test asked for it."""
    if name not in _armed:
        return
    _armed[name] -= 1
    if _armed[name] <= 0:
        os.kill(os.getpid(), signal.SIGKILL)
