"""A recipe leaves the steering as it found it, whatever its variants bake."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlxfun.session.measuring.variants import RecipeReport
from tests.e2e.conftest import Program, Shell, typed

STEER = "steer --rule additive --boost-value 1.25 --activate 2:5 --level 4:9=1.5"
BAKE = "bake --dataset demo:mixed --max-samples 4 --max-tokens 48"
RECIPE = f"""\
#!mlxfun-recipe 1
at most {{target}}
judge --dataset demo:eval --max-samples 2 --max-tokens 32
try {BAKE} then prune --n-prune 2 --allow-stale
try {BAKE}
try prune --n-prune 1
"""


def steered(shell: Shell) -> object:
    steering = shell.engine.view().steering
    assert steering is not None
    return steering.activated, steering.levels, steering.rule, steering.boost_value


def write(target: str) -> None:
    Path("a.recipe").write_text(RECIPE.format(target=target))


def test_a_variant_that_bakes_leaves_the_steering_to_the_next_ones(shell: Shell) -> None:
    shell.do(STEER)
    before = steered(shell)
    assert before == ({2: (5,)}, {4: {9: 1.5}}, "additive", 1.25)
    write("900 MB")
    report = shell.do("recipe a.recipe").report
    assert isinstance(report, RecipeReport)
    assert [v.error for v in report.variants] == ["", "", ""]
    assert report.variants[1].kl < report.variants[2].kl, "the second one did bake something"
    if report.kept == 2:
        assert steered(shell) == before
    shell.do("goto 0", STEER)
    write("1 kB")
    assert "none of the 3 measured variants" in (shell.run("recipe a.recipe").error or "")
    assert steered(shell) == before, "nothing was applied, so nothing is baked"


@pytest.mark.slow
def test_a_recording_of_such_a_recipe_replays_to_the_same_states(
    program: Program, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(program.directory)
    write("900 MB")
    collect = "collect --dataset demo:mixed --max-samples 4 --max-tokens 48"
    everywhere = "select --drop 0:15,1:15,2:15,3:15,4:15,5:15"
    steer = (STEER, "steer --level 1:15=1")  # the second one names an expert that goes
    lines = [*steer, everywhere, "apply", collect, "recipe a.recipe"]
    first = program.run("--headless", "--demo", "--record", "s.mlxfun", *typed(lines))
    assert first.returncode == 0, first.stderr
    text = Path("s.mlxfun").read_text()
    back = "steer --clear --activate 2:5 --level 4:9=1.5 --rule additive --boost-value 1.25"
    assert text.count(back) > 0
    again = program.run("--headless", "--replay", "s.mlxfun")
    assert again.returncode == 0, again.stderr
