"""The recipe on a saved model's card makes the same weights again, in another session."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.conftest import COLLECT, Shell

BAKE = "bake --dataset demo:mixed --max-samples 6 --max-tokens 48"
ADD = "steer --rule additive --boost-value 1.25 --activate 2:5,3:1..2 --level 4:7=-0.1,4:9=1"


@pytest.fixture(scope="module")
def shells() -> Iterator[tuple[Shell, Shell]]:
    both = Shell(), Shell()
    yield both
    for shell in both:
        shell.engine.close()


def recipe(path: Path) -> list[str]:
    """The lines on the card."""
    found = re.search(r"## Recipe\n\n```\n(.*?)\n```", (path / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1].split("\n")


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        pytest.param(
            (ADD, "steer --deactivate 2:14", BAKE, "apply"),
            ["steer --clear --activate 2:5,3:1..2 --deactivate 2:14 --level 4:7=-0.1,4:9=1 "
             "--rule additive --boost-value 1.25 --mask-value -10000", BAKE],
            id="what was baked is steered first, in one line",
        ),
        pytest.param(
            ("steer --deactivate 2:14", BAKE, "apply", "steer --deactivate 2:14", BAKE, "apply"),
            ["steer --clear --deactivate 2:14", BAKE, "steer --clear --deactivate 2:14", BAKE],
            id="and again for a second bake",
        ),
        pytest.param(
            ("steer --deactivate 2:9,2:14 --level 1:9=2",
             "select --drop 0:9,1:9,2:9,3:9,4:9,5:9", "apply", BAKE, "apply"),
            ["select --drop 0:9,1:9,2:9,3:9,4:9,5:9", "steer --clear --deactivate 2:14", BAKE],
            id="without experts that were pruned meanwhile",
        ),
        pytest.param(
            (COLLECT, "prune --n-prune 2", "apply", COLLECT, "prune --n-prune 2", "apply"),
            [COLLECT, "prune --n-prune 2", COLLECT, "prune --n-prune 2"],
            id="statistics are collected again where they were",
        ),
        pytest.param(
            (COLLECT, "prune --n-prune 2", "apply", "prune --n-prune 1 --allow-stale", "apply"),
            [COLLECT, "prune --n-prune 2", "prune --n-prune 1 --allow-stale"],
            id="but not where they serve a second time",
        ),
        pytest.param(
            (COLLECT, "prune --expert-list keep.json", "apply", "prune --n-prune 2 --allow-stale",
             "apply"),
            [COLLECT, "prune --expert-list keep.json", "prune --n-prune 2 --allow-stale"],
            id="stale statistics are of the state they were made on",
        ),
        pytest.param(
            (COLLECT, "prune --expert-list keep.json --refit-experts", "apply"),
            [COLLECT, "prune --expert-list keep.json --refit-experts"],
            id="a list names who goes, a refit needs text",
        ),
    ],
)  # fmt: skip
def test_the_recipe_on_the_card_makes_the_same_weights(
    shells: tuple[Shell, Shell],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lines: tuple[str, ...],
    told: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    first, again = shells
    keep = {str(layer): [e for e in range(16) if e not in (3, 15)] for layer in range(6)}
    (tmp_path / "keep.json").write_text(json.dumps({"keep_map": keep}))
    first.do("load demo", *lines, "save out")
    found = recipe(tmp_path / "out")
    assert found == told
    again.do("load demo")
    for line in found:
        again.do(line)
        if not line.startswith(("collect", "steer", "stats")):
            again.do("apply")
    assert again.engine.view().state == first.engine.view().state
    assert again.engine.view().state != "ab3b415a851a", "the model as loaded"
