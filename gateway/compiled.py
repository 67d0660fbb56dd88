"""Which modules `make compile` turns into extension modules, and whether they fit their source.

The Python files stay the source and work without it. Compiled, the hot path needs a quarter less of
the interpreter's time (docs/benchmarks.md).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from core.errors import TallygateError

MODULES: Final = (
    "gateway.admission.batcher",
    "gateway.admission.blocked",
    "gateway.admission.check",
    "gateway.admission.limiter",
    "gateway.answers.headers",
    "gateway.answers.repeat",
    "gateway.auth.authenticator",
    "gateway.auth.extract",
    "gateway.http.base",
    "gateway.http.body",
    "gateway.http.exchange",
    "gateway.http.h1",
    "gateway.http.h1_exchange",
    "gateway.http.h1_reader",
    "gateway.http.message",
    "gateway.http.target",
    "gateway.identity",
    "gateway.matching",
    "gateway.proxy.connection",
    "gateway.proxy.headers",
    "gateway.proxy.pool",
    "gateway.proxy.relay",
    "gateway.proxy.request",
    "gateway.proxy.target",
    "gateway.proxy.watch",
    "gateway.responder",
)


def check() -> bool:
    """Whether the modules, which are loaded, are compiled ones.

    Raises:
        TallygateError: some are older than their source: another program would run than is read.
    """
    compiled = []
    for name in MODULES:
        file = Path(getattr(sys.modules.get(name), "__file__", None) or "")
        if file.suffix not in (".so", ".pyd"):
            continue
        source = file.with_name(name.rpartition(".")[2] + ".py")
        if source.exists() and source.stat().st_mtime > file.stat().st_mtime:
            raise TallygateError(
                f"{name}: compiled from an older source; run `make compile`, or remove {file}"
            )
        compiled.append(name)
    return bool(compiled)
