"""Statistics that name one model by its old and by its new identity: taken together only knowingly.

With the model resident both are known to be of it; without it nothing can tell, and nobody guesses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from mlxfun.calibration.routing_stats import RoutingStats
from mlxfun.model.identity import state_id
from tests.e2e.conftest import Shell

OLD = "248aa7811d9b0fae8175677fe6046da4"
"""What earlier versions called the demo model."""
COMMANDS = (
    "stats diff new.npz {} --output out.json",
    "stats diff {} new.npz --output out.json",
    "stats merge new.npz {} --output out.npz",
    "stats merge {} new.npz --by rank --output out.npz",
    "stats subtract both.npz {} --output out.npz",
    "stats rank new.npz {} --n-prune 2 --output out.json",
)
NAMED = "was made with the identity of an earlier version"


@pytest.fixture
def files(shell: Shell) -> Shell:
    """new.npz, both.npz (twice that), old.npz (under the earlier name), other.npz (of another)."""
    shell.do("stats save new.npz", "stats merge new.npz new.npz --output both.npz")
    new = RoutingStats.read(Path("new.npz"))
    for name, model in (("old", OLD), ("other", OLD[::-1])):
        replace(new, model=model, state=state_id(model, {})).save(Path(f"{name}.npz"))
    return shell


@pytest.fixture(scope="module")
def empty() -> Iterator[Shell]:
    """A shell without a model."""
    shell = Shell()
    yield shell
    shell.engine.close()


@pytest.mark.parametrize("line", COMMANDS)
def test_beside_the_model_both_names_are_its_own_and_the_old_one_is_named(
    files: Shell, line: str
) -> None:
    report = files.do(line.format("old.npz")).report
    notices: tuple[str, ...] = report.notices  # type: ignore[union-attr]
    assert [text for text in notices if f"old.npz {NAMED}" in text]
    if "out.npz" in line:
        made = RoutingStats.read(Path("out.npz"))
        assert (made.model, made.state) == (files.checkpoint, files.engine.view().state)


@pytest.mark.parametrize("line", COMMANDS)
def test_an_old_name_of_another_model_is_not_taken_for_the_new_one(files: Shell, line: str) -> None:
    refusal = files.refused(line.format("other.npz"))
    assert "other.npz names its model by the identity of an earlier version" in refusal
    assert not list(Path().glob("out.*"))


@pytest.mark.parametrize("line", COMMANDS)
def test_without_the_model_nothing_is_guessed(files: Shell, empty: Shell, line: str) -> None:
    refusal = empty.refused(line.format("old.npz"))
    assert "old.npz names its model by the identity of an earlier version" in refusal
    assert "their shapes agree. Load the model" in refusal
    assert not list(Path().glob("out.*"))
    report = empty.do(line.format("old.npz") + " --allow-stale").report
    assert [text for text in report.notices if "an earlier version" in text]  # type: ignore[union-attr]
    if "merge" in line:
        made = RoutingStats.read(Path("out.npz"))
        assert (made.model, made.state) == ("", "mixed")
