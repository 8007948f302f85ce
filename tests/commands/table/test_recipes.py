"""Recipes: what is tried, what is kept, and that nothing stays behind when nothing fits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from commands.scripts.recipe_file import expand, read_recipe
from mlxfun.context import SILENT
from mlxfun.errors import UsageError
from mlxfun.events import JobEnded, Notice
from mlxfun.session.measuring.variants import RecipeReport
from tests.commands.conftest import Bench
from tests.commands.stub_session import StubSession

MakeBench = Callable[..., Bench]

RECIPE = """\
#!mlxfun-recipe 1
#: model demo
collect --dataset demo:mixed --max-samples 4

# the stub model has 24 experts of 1000 bytes
at most {target}
judge --dataset demo:eval
try prune --n-prune {{1,2,3}} --metric {{freq,reap}}
try prune --n-prune 1 then prune --n-prune 3 --allow-stale
save small
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(here: Path, target: str, text: str = RECIPE) -> str:
    (here / "a.recipe").write_text(text.format(target=target))
    return "recipe a.recipe"


def lines(bench: Bench) -> list[str]:
    return [e.line for e in bench.events if isinstance(e, JobEnded)]


def report_of(bench: Bench, line: str) -> RecipeReport:
    report = bench.do(line)[0].report
    assert isinstance(report, RecipeReport)
    return report


def test_a_size_keeps_the_least_loss_within_it_and_goes_on(make_bench: MakeBench, here: Path):
    bench = make_bench()
    report = report_of(bench, write(here, "19 kB"))
    assert [v.line for v in report.variants] == [
        "prune --n-prune 1 --metric freq", "prune --n-prune 1 --metric reap",
        "prune --n-prune 2 --metric freq", "prune --n-prune 2 --metric reap",
        "prune --n-prune 3 --metric freq", "prune --n-prune 3 --metric reap",
        "prune --n-prune 1 then prune --n-prune 3 --allow-stale",
    ]  # fmt: skip
    assert [v.bytes for v in report.variants] == [21000, 21000, 18000, 18000, 15000, 15000, 12000]
    assert report.kept == 2
    assert lines(bench)[-4:] == [
        "prune --n-prune 2 --metric freq", "apply", "save small", "recipe a.recipe"
    ]  # fmt: skip
    assert bench.engine.view().plan is None
    assert "kept prune --n-prune 2 --metric freq" in report.summary()


def test_a_loss_keeps_the_smallest_within_it(make_bench: MakeBench, here: Path):
    text = RECIPE.replace("save small\n", "")
    assert report_of(make_bench(), write(here, "0.03 KL", text)).kept == 4
    assert report_of(make_bench(), write(here, "0.5 KL", text)).kept == 6


def test_variants_of_several_steps_leave_the_model_where_it_was(make_bench: MakeBench, here: Path):
    bench = make_bench()
    report = report_of(bench, write(here, "0.5 KL"))
    assert report.variants[6].kl == pytest.approx(0.04)
    tried = lines(bench)
    last = len(tried) - 1 - tried[::-1].index("preview --dataset demo:eval")
    assert tried[last - 3 : last] == [
        "prune --n-prune 1", "apply", "prune --n-prune 3 --allow-stale"
    ]  # fmt: skip
    by_hand = make_bench()
    by_hand.do("load demo", "collect --dataset demo:mixed --max-samples 4")
    by_hand.do("prune --n-prune 1", "apply", "prune --n-prune 3 --allow-stale", "apply")
    assert bench.engine.view().state == by_hand.engine.view().state


def test_variants_that_are_measured_while_steering_are_kept_with_a_warning(
    make_bench: MakeBench, here: Path
):
    plain = RECIPE.replace("save small\n", "")
    steered = plain.replace("# the stub", "steer --activate 1:2\n# the stub")
    warning = Notice(
        "warning", "variants were measured while steering, which is no part of what is kept"
    )
    for text, warnings in ((plain, 0), (steered, 1)):
        bench = make_bench()
        bench.do(write(here, "19 kB", text))
        assert bench.events.count(warning) == warnings


def test_the_report_is_written_as_data_and_as_a_picture(make_bench: MakeBench, here: Path):
    report = report_of(make_bench(), write(here, "19 kB") + " --output found/here")
    assert report.files == ("found/here/report.json", "found/here/loss.svg")
    data = json.loads((here / "found" / "here" / "report.json").read_text())
    assert data["target"] == "at most 19000 bytes"
    assert data["judge"] == "preview --dataset demo:eval"
    assert data["kept"] == 2
    assert [v["meets"] for v in data["variants"]] == [False, False, True, True, True, True, True]
    drawn = (here / "found" / "here" / "loss.svg").read_text()
    assert "KL from the checkpoint" in drawn
    assert drawn.count("prune<") == 7


def test_when_nothing_fits_nothing_is_applied_and_the_report_is_there(
    make_bench: MakeBench, here: Path
):
    bench = make_bench()
    bench.do("load demo")
    state = bench.engine.view().state
    ended = bench.run(write(here, "0.001 KL"))
    assert ended.error == (
        "none of the 7 measured variants keeps within at most 0.001 KL; the nearest has 0.0100 KL: "
        "prune --n-prune 1 --metric freq; see a-report/report.json"
    )
    view = bench.engine.view()
    assert (view.state, view.plan) == (state, None)
    assert "save small" not in lines(bench)
    assert json.loads((here / "a-report" / "report.json").read_text())["kept"] is None


def test_a_variant_that_fails_is_passed_over_with_its_reason(make_bench: MakeBench, here: Path):
    text = (
        "#: model demo\ncollect --dataset demo:mixed\nat most 1 KL\ntry prune --n-prune {{2,7}}\n"
    )
    report = report_of(make_bench(), write(here, "", text))
    assert report.kept == 0
    assert "at most 6" in report.variants[1].error
    assert report.variants[1].kl is None


@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("figure", ["kl_mean", "perplexity"])
def test_a_variant_that_computes_no_numbers_any_more_has_failed(
    make_bench: MakeBench,
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    figure: str,
    broken: float,
):
    sound = StubSession.preview

    def preview(self, options, ctx=SILENT):
        report = sound(self, options, ctx)
        if self._staged().experts_after != 6:
            return report
        value = broken if figure == "kl_mean" else dict.fromkeys(report.perplexity, broken)
        return replace(report, **{figure: value})

    monkeypatch.setattr(StubSession, "preview", preview)
    report = report_of(make_bench(), write(here, "9 KL"))
    failed = [v for v in report.variants if "--n-prune 2" in v.line]
    assert [(v.kl, v.ratio) for v in failed] == [(None, None)] * 2
    assert all("computes no numbers any more: KL" in v.error for v in failed)
    assert "--n-prune 3" in report.variants[report.kept].line

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (here / "a-report" / "report.json").read_text()
    meets = [v["meets"] for v in json.loads(text, parse_constant=refuse)["variants"]]
    assert meets == [True, True, False, False, True, True, True]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("try prune --n-prune 2", "a.recipe has no target: add a line such as at most 5.2 MB"),
        ("at most 1 KL\ncollect", "a.recipe tries nothing: add a line such as try prune"),
        ("at most 1 KL\nat most 2 KL\ntry prune", "a.recipe:2: a second target"),
        ("at most 1 parsec\ntry prune", "a.recipe:1: 'at most 1 parsec' is no target"),
        ("at most 1 KL\ntry prune --n-prune {2,4", "a.recipe:2: a brace of"),
        ("at most 1 KL\ntry prune --n-prune {2,,4}", "a.recipe:2: a list in"),
        ("at most 1 KL\ntry prun --n-prune 2", "a.recipe:2: unknown command 'prun'"),
        ("at most 1 KL\ntry prune --n-prune {2,x}", "a.recipe:2: prune: invalid value for"),
        ("at most 1 KL\ntry apply", "a.recipe:2: apply cannot be tried"),
        ("at most 1 KL\ntry evaluate", "a.recipe:2: evaluate cannot be tried"),
        ("at most 1 KL\ntry prune --n-prune 2\nundo\ntry prune --n-prune 3", "a.recipe:4: 'try"),
        ("at most 1 KL\nrecipe b\ntry prune", "a.recipe:2: recipe cannot be part of a recipe"),
        ("at most 1 KL\njudge --dataste x\ntry prune", "a.recipe:2: preview: no such option"),
    ],
)
def test_what_cannot_run_is_refused_with_file_and_line_before_anything_ran(
    bench: Bench, here: Path, text: str, message: str
):
    (here / "a.recipe").write_text(text)
    before = len(bench.events)
    ended = bench.run("recipe a.recipe")
    assert ended.usage
    assert message in (ended.error or "")
    assert [line for line in lines(bench)[1:] if not line.startswith("recipe")] == [], before


def test_a_recipe_needs_a_model_and_nothing_staged(make_bench: MakeBench, here: Path):
    (here / "a.recipe").write_text("at most 1 KL\ntry prune --n-prune 2\n")
    bench = make_bench()
    assert "no model is loaded" in (bench.run("recipe a.recipe").error or "")
    bench.do("load demo", "collect --dataset demo:mixed", "prune --n-prune 1")
    assert "a plan is staged" in (bench.run("recipe a.recipe").error or "")
    assert bench.engine.view().plan is not None


def test_a_recording_of_a_recipe_replays_to_the_same_states(make_bench: MakeBench, here: Path):
    bench = make_bench()
    bench.engine.record(here / "s.mlxfun")
    bench.do(write(here, "0.5 KL"))
    bench.engine.close()
    again = make_bench()
    assert again.run("replay s.mlxfun").error is None
    assert again.engine.view().state == bench.engine.view().state


def test_a_recipe_inside_a_replay_is_refused(bench: Bench, here: Path):
    write(here, "1 KL")
    (here / "s.mlxfun").write_text("recipe a.recipe\n")
    assert "cannot run inside a replay" in (bench.run("replay s.mlxfun").error or "")


def test_lists_in_braces_stand_for_all_their_combinations():
    assert expand("a {1, 2} b {x,y} c") == ["a 1 b x c", "a 1 b y c", "a 2 b x c", "a 2 b y c"]
    assert expand("plain") == ["plain"]


def test_too_many_variants_are_refused(tmp_path: Path):
    numbers = ",".join(map(str, range(40)))
    (tmp_path / "a.recipe").write_text(f"at most 1 KL\ntry prune {{{numbers}}} {{{numbers}}}\n")
    with pytest.raises(UsageError, match="1600 variants are more than 1000"):
        read_recipe(tmp_path / "a.recipe", lambda *_: None)
