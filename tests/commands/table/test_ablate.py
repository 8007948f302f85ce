"""abliterate and refusals on a stub session: what is asked for, and what is shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from commands.output.render.dispatch import render
from commands.registry import COMMANDS
from mlxfun.data.options import DatasetOptions
from mlxfun.evaluation.options import RefusalOptions
from mlxfun.techniques.ablate.options import AblateOptions
from tests.commands.conftest import Bench

SETS = "--harmful demo:harmful --harmless demo:harmless"


def asked(bench: Bench, method: str, line: str) -> AblateOptions | RefusalOptions:
    """The options that reach the session."""
    seen = []
    session = bench.sessions[0]
    original = getattr(session, method)

    def spy(options, ctx):
        seen.append(options)
        return original(options, ctx)

    setattr(session, method, spy)
    bench.do(line)
    return seen[0]


def text(report) -> str:
    console = Console(width=200, record=True, force_terminal=False)
    with console.capture() as capture:
        console.print(render(report))
    return capture.get()


def test_an_ablation_asks_for_what_was_typed(bench: Bench) -> None:
    line = (
        f"abliterate {SETS} --layers 2-5 --extraction-position mean --target dense-only "
        "--strength 1,attention=2 --max-samples 20 --seed 4 --answer-tokens 9"
    )
    limits = {"max_samples": 20, "seed": 4}
    assert asked(bench, "abliterate", line) == AblateOptions(
        DatasetOptions("demo:harmful", **limits),
        DatasetOptions("demo:harmless", **limits),
        layers="2-5",
        extraction_position="mean",
        target="dense-only",
        strength="1,attention=2",
        answer_tokens=9,
        seed=4,
    )


def test_a_search_and_a_choice_need_no_more_than_their_number(bench: Bench) -> None:
    options = asked(bench, "abliterate", f"abliterate {SETS} --search 40 --max-kl 0.05")
    assert isinstance(options, AblateOptions)
    assert (options.search, options.max_kl, options.extraction_position) == (40, 0.05, None)
    assert asked(bench, "abliterate", "abliterate --choose 2") == AblateOptions(choose=2)


def test_a_safety_map_is_found_like_every_file(bench: Bench) -> None:
    line = f"abliterate {SETS} --target safety-experts --safety-map s.json --allow-stale"
    options = asked(bench, "abliterate", line)
    assert isinstance(options, AblateOptions)
    assert (options.safety_map, options.allow_stale) == (Path("s.json"), True)


def test_refusals_are_counted_on_both_sets(bench: Bench) -> None:
    line = f"refusals {SETS} --max-samples 3 --answer-tokens 7"
    assert asked(bench, "refusals", line) == RefusalOptions(
        DatasetOptions("demo:harmful", max_samples=3),
        DatasetOptions("demo:harmless", max_samples=3),
        7,
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (f"abliterate {SETS} --choose 1", "--choose takes its prompts and directions from the"),
        ("refusals --harmful demo:harmful", "refusals: give both --harmful and --harmless"),
        (f"abliterate {SETS} --target some", "'some' is not one of 'all', 'safety-experts'"),
        (f"abliterate {SETS} --max-kl 0", "0.0 is not in the range x>0"),
    ],
)
def test_what_cannot_be_meant_is_refused(bench: Bench, line: str, message: str) -> None:
    assert message in str(bench.run(line).error)


def test_what_was_staged_is_shown_with_its_front_and_its_refusals(bench: Bench) -> None:
    ended = bench.do(f"abliterate {SETS} --search 8")[-1]
    shown = text(ended.report)
    assert (
        "staged abliterate: the difference between harmful and harmless prompts is removed from 6"
        in shown
    )
    assert "strength by layer, attention: 3:1.5" in shown
    assert "--choose stages another point" in shown
    row = next(line for line in shown.splitlines() if line.startswith("*")).split()
    assert row == ["*", "0", "3", "last", "20.0%", "0.0100", "x", "1.0000", "1", "of", "4", "0", "of", "4",
                   "attention", "1.5"]  # fmt: skip
    assert "> How?" in shown
    assert bench.do("plan show")[-1].report == ended.report


def test_counted_refusals_are_shown_before_and_after(bench: Bench) -> None:
    shown = text(bench.do(f"refusals {SETS}")[-1].report)
    assert "current: refuses 1 of 4 harmful, 0 of 4 harmless prompts" in shown
    assert "(checkpoint: 3 of 4 harmful, 0 of 4 harmless); first-token KL 0.0100" in shown


def test_the_ancestors_option_names_are_kept() -> None:
    given = {o for p in COMMANDS["abliterate"].click.params for o in p.opts}
    assert given >= {"--harmful", "--harmless", "--layers", "--extraction-position", "--target",
                     "--safety-map", "--strength", "--search", "--max-kl", "--choose"}  # fmt: skip
