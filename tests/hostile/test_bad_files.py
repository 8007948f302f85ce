"""Whatever is spoiled about a file, it is refused: one sentence, exit 1 or 2, nothing touched.

Each input has a run of the whole program of its own, with bounds of its own: 20 seconds, 500 MiB.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable

import pytest
from hostile_text import shown_characters

from tests.hostile.kinds import KINDS, Kind, good_files
from tests.hostile.warm import SECONDS, Ended, Warm, tree

SAMPLE = 7
"""In a hundred, how many run by default."""
MEBIBYTES = 500
FAULT = re.compile(r"unexpected [A-Z]|Traceback")  # what nobody foresaw
Place = tuple[Warm, dict[str, bytes]]


@pytest.fixture(scope="module")
def place(warm: Warm) -> Place:
    return warm, good_files(warm, warm.directory)


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


def test_there_are_a_thousand_and_all_are_of_spoiled_files() -> None:
    assert sum(kind.share for kind in KINDS.values()) >= 1000


def test_good_files_are_accepted(place: Place) -> None:
    """Or the others might be refused for another reason."""
    warm, good = place
    for name, kind in KINDS.items():
        path = warm.directory / kind.file
        kept = path.read_bytes() if path.exists() else None
        path.write_bytes(good[name])
        if name in ("replay", "replay in a session", "kept session"):
            path.write_bytes(b"set metric freq\n")
        ended = warm.run(*kind.command())
        assert ended.code == 0, f"{name}: {ended.err}"
        path.write_bytes(kept) if kept is not None else path.unlink()


@pytest.mark.parametrize("name", KINDS)
def test_a_sample_of_spoiled_files_is_refused(place: Place, name: str) -> None:
    kind = KINDS[name]
    refuse(
        place, name, kind, random.Random(0).sample(range(kind.share), kind.share * SAMPLE // 100)
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_spoiled_files_are_refused(place: Place, name: str) -> None:
    kind = KINDS[name]
    refuse(place, name, kind, range(kind.share))
