"""The rule for spoiled files, and the kinds of files in groups: one test file each, so that all inputs
can run on several workers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hostile_text import shown_characters

from tests.hostile.kinds import KINDS, Kind
from tests.hostile.warm import SECONDS, Ended, Warm, tree

SCRIPTS = ("replay", "replay in a session", "kept session", "recipe", "configuration")
MODELS = tuple(name for name, kind in KINDS.items() if kind.file.startswith("model/"))
DATA = tuple(name for name in KINDS if name not in (*SCRIPTS, *MODELS))
MEBIBYTES = 500
FAULT = re.compile(r"unexpected [A-Z]|Traceback")  # what nobody foresaw
Place = tuple[Warm, dict[str, bytes]]


def require_refused(ended: Ended, what: str) -> None:
    """The rule for all that is spoiled."""
    said = f"{what}: exit {ended.code}: {ended.err[-600:]!r}"
    assert not ended.late, f"{what}: took more than {SECONDS} seconds"
    assert ended.grown < MEBIBYTES << 20, f"{what}: {ended.grown >> 20} MiB"
    assert ended.code in (1, 2), said
    assert not FAULT.search(ended.err), said
    sentences = [ln for ln in ended.err.split("\n") if ln.startswith(("error: ", "mlxfun-shell: "))]
    assert sentences == [ended.last], said
    assert 20 < len(ended.last) < 4200, said
    assert not shown_characters(ended.err), said


def refuse(place: Place, name: str, kind: Kind, seeds: Iterable[int]) -> None:
    warm, good = place
    path = warm.directory / kind.file
    kept = path.read_bytes() if path.exists() else None
    try:
        for seed in seeds:
            path.write_bytes(kind.damaged(good[name], seed))
            before = tree(warm.directory)
            ended = warm.run(*kind.command())
            what = f"{name}, seed {seed}: {path.read_bytes()[:200]!r}"
            require_refused(ended, what)
            after = tree(warm.directory)
            touched = sorted(p for p in {*before, *after} if before.get(p) != after.get(p))
            assert not touched, f"{what}: touched {touched}"
    finally:
        path.write_bytes(kept) if kept is not None else path.unlink()


def refuse_all(place: Place, name: str) -> None:
    """All inputs of a kind."""
    refuse(place, name, KINDS[name], range(KINDS[name].share))
