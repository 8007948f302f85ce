"""What the parts of the main job cost, as ratios within one run: `pytest -n 0 -m bench -s tests/bench`.

Budgets of a GPU are measured by routing_cost.py itself with --preset qwen3-30b-a3b; here a small
model shows on any machine that nothing has grown by multiples. Only ratios are judged.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.techniques.prune.options import PruneOptions

pytestmark = pytest.mark.bench
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """routing_cost.py on its small preset."""
    spec = importlib.util.spec_from_file_location(
        "routing_cost", Path(__file__).with_name("routing_cost.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, Any] = module.measure(module.PRESETS["small"], 5)
    print(json.dumps(found, indent=1))
    return found


def test_collecting_costs_less_than_twice_a_plain_forward(measured: dict[str, Any]) -> None:
    assert measured["collect"]["against the forward"]["ratio"] < 2.0


def test_taps_that_do_nothing_cost_next_to_nothing_in_decoding(measured: dict[str, Any]) -> None:
    assert measured["decode"]["tapped"]["ratio"] < 1.25


def test_steering_is_decoded_at_nearly_the_same_speed(measured: dict[str, Any]) -> None:
    assert measured["decode"]["every layer steered"]["ratio"] < 1.6


def test_an_edit_holds_under_one_percent_of_the_model(measured: dict[str, Any]) -> None:
    assert measured["edits"]["held_share"] < 0.01


def seconds(work: Any) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def test_stage_apply_flip_undo_and_redo_cost_a_fraction_of_one_evaluation() -> None:
    session = Session.open("demo")
    session.collect(CollectOptions(DatasetOptions("demo:mixed", max_samples=4, max_tokens=48)))
    data = (DatasetOptions("demo:eval", max_samples=4, max_tokens=48),)
    whole = seconds(lambda: session.evaluate(EvaluateOptions(data, kl=False)))
    times: dict[str, list[float]] = {}
    for _ in range(7):
        for name, work in (
            ("stage", lambda: session.prune(PruneOptions(n_prune=4))),
            ("flip", session.flip),
            ("flip back", session.flip),
            ("apply", lambda: session.apply(ApplyOptions())),
            ("undo", session.undo),
            ("redo", session.redo),
            ("undo again", session.undo),
        ):
            times.setdefault(name, []).append(seconds(work))
    session.close()
    for name, each in times.items():
        median = statistics.median(each)
        print(f"{name:<10} {1000 * median:7.2f} ms, {median / whole:.4f} of an evaluation")
        assert median < whole / 4


def test_help_costs_a_few_times_an_interpreter_that_does_nothing() -> None:
    def python(*arguments: str) -> float:
        return min(
            seconds(
                lambda: subprocess.run(
                    [sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
                )
            )
            for _ in range(7)
        )

    nothing, shown = python("-c", "pass"), python("-m", "commands.cli", "--help")
    print(f"--help {1000 * shown:.0f} ms, an idle interpreter {1000 * nothing:.0f} ms")
    assert shown < 8 * nothing
