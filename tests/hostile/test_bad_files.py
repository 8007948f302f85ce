"""Whatever is spoiled about a file, it is refused: one sentence, exit 1 or 2, nothing touched.

Each input has a run of the whole program of its own, with bounds of its own: 20 seconds, 500 MiB.
All of them run in test_all_bad_*.py, which are slow.
"""

from __future__ import annotations

import random

import pytest

from tests.hostile.kinds import KINDS
from tests.hostile.spoiled import DATA, MODELS, SCRIPTS, Place, refuse

SAMPLE = 7
"""In a hundred, how many run by default."""


def test_there_are_a_thousand_and_all_are_of_spoiled_files() -> None:
    assert sum(kind.share for kind in KINDS.values()) >= 1000
    assert sorted((*SCRIPTS, *MODELS, *DATA)) == sorted(KINDS)  # all of them run somewhere


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
