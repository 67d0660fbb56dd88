"""Dead processes' counts in one file a kind, so that restarts do not fill the metrics directory.

Each worker that ever ran leaves its counters and histograms behind: totals must not fall. A page
reads all of them, so beyond a few they are added up.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from prometheus_client.mmap_dict import MmapedDict

# Named as a process of that identity would name its file.
_SUMS = "dead"
_KINDS = ("counter", "histogram")
# Fewer are not worth it.
_MANY = 16


def fold(directory: Path, living: Iterable[str]) -> None:
    """Adds up the counts of all identities but `living`; the caller keeps everybody else out.

    A crash after the sums were written and before their files are gone counts these twice, in the
    metrics alone.
    """
    kept = {*living, _SUMS}
    for kind in _KINDS:
        files = [
            path
            for path in directory.glob(f"{kind}_*.db")
            if path.stem.partition("_")[2] not in kept
        ]
        if len(files) >= _MANY:
            _fold(directory / f"{kind}_{_SUMS}.db", files)


def _fold(sums: Path, files: list[Path]) -> None:
    totals: dict[str, float] = defaultdict(float)
    for path in [sums, *files] if sums.exists() else files:
        for key, value, _, _ in MmapedDict.read_all_values_from_file(path):  # type: ignore[no-untyped-call]
            totals[key] += value
    draft = sums.with_suffix(".new")
    draft.unlink(missing_ok=True)
    written = MmapedDict(str(draft))  # type: ignore[no-untyped-call]
    for key, value in totals.items():
        written.write_value(key, value, 0.0)  # type: ignore[no-untyped-call]
    written.close()  # type: ignore[no-untyped-call]
    os.replace(draft, sums)
    for path in files:
        path.unlink()
