"""Reports for a person and for a program."""

from __future__ import annotations

import importlib
import json
import pkgutil
from dataclasses import replace
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

import commands
import mlxfun
from commands.output.as_json import report_json
from commands.output.console import print_report
from commands.output.progress import ProgressLines, describe
from commands.output.render.base import experts_text
from commands.output.render.dispatch import RENDERERS, render
from mlxfun.calibration.options import CollectOptions
from mlxfun.calibration.reports import WhyReport
from mlxfun.checkpoint.reports import SaveReport
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.reports import HistoryNode, HistoryReport
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.events import JobEnded, Progress
from mlxfun.generation.reports import ChatReport
from mlxfun.report import Report, TextReport
from mlxfun.scans.reports import DossierReport, TopToken
from mlxfun.session.measuring.variants import RecipeReport, Variant
from mlxfun.session.reports import DecoderRow, LayersReport
from mlxfun.techniques.prune.options import PruneOptions
from mlxfun.text import visible
from tests.commands.conftest import Bench
from tests.commands.stub_session import StubSession

SENTENCES = {
    "TextReport", "StepReport", "ProbeReport", "CollectReport", "PrepareReport", "ReplayReport",
    "ResumeReport", "RecordReport", "SettingsReport", "QuitReport", "TokensReport",
}  # fmt: skip
"""Reports whose one sentence holds all that a person is shown."""
DOSSIER = DossierReport(
    WhyReport(3, 7, "kept", {"freq": 640.0}, {"freq": 2}, 16, "freq 640 ranks 2 of 16"),
    "held-out", 512, 64, 0.41, (TopToken(" break", 9, 9), TopToken("[b]x[/b]", 4, 6)), None, 0.0,
    "its layer has no other expert",
)  # fmt: skip

EVIL = "[bold red]\x1b[31m\x07\r\u202e\x9b"


def shown(report: Report) -> str:
    stream = StringIO()
    print_report(report, stream)
    return stream.getvalue()


def all_reports() -> list[Report]:
    session = StubSession("demo")
    collected = session.collect(CollectOptions(DatasetOptions("demo:mixed")))
    plan = session.prune(PruneOptions(n_prune=2))
    return [
        collected,
        plan,
        session.info(verify=True),
        session.layers(),
        session.stats(),
        session.preview(EvaluateOptions()),
        session.steering,
        session.history(),
        session.why(1, 2),
        session.smoke_test(),
        session.discard(),
        ChatReport("hi", "hello", "base", 1, 0, 1, 9.0, "stop"),
        SaveReport("out", 5, ("a",), 4, None, {"load": "ok"}),
        DOSSIER,
    ]


def report_classes() -> set[type[Report]]:
    """Every report that the engine or a command can answer with."""
    found = set()
    for package in (mlxfun, commands):
        for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            for value in vars(importlib.import_module(info.name)).values():
                if isinstance(value, type) and issubclass(value, Report):
                    found.add(value)
    return found - {Report}


def test_every_report_has_its_own_renderer_or_is_known_to_be_one_sentence() -> None:
    found = report_classes()
    assert {c.__name__ for c in found - set(RENDERERS)} == SENTENCES
    assert set(RENDERERS) <= found


def test_the_profile_of_an_expert_shows_its_figures_and_its_tokens() -> None:
    assert [line.split() for line in shown(DOSSIER).splitlines()] == [
        ["L3:E7", "kept,", "served", "64", "of", "512", "tokens"],
        ["L3:E7", "kept:", "freq", "640", "ranks", "2", "of", "16"],
        ["metric", "score", "rank", "of", "16"],
        ["freq", "640", "2"],
        ["token", "routed", "here", "of"],
        ["'", "break'", "9", "9"],
        ["'[b]x[/b]'", "4", "6"],
        ["note:", "topic:", "not", "significant"],
        ["note:", "its", "layer", "has", "no", "other", "expert"],
    ]


@pytest.mark.parametrize("report", all_reports(), ids=lambda r: r.kind)
def test_every_report_has_a_text_and_a_json_form(report: Report) -> None:
    found = report_json(JobEnded(1, "line", report, None, 0.25, "abc"))
    assert list(found) == ["command", "ok", "state", "seconds", "report", "data"]
    assert found["data"]["kind"] == report.kind
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert shown(report).strip()


def test_a_failure_keeps_its_keys_and_gains_the_error() -> None:
    found = report_json(JobEnded(1, "undo", None, "nothing to undo", 0.5, "abc"))
    assert found == {
        "command": "undo", "ok": False, "state": "abc", "seconds": 0.5, "report": None, "data": {},
        "error": "nothing to undo",
    }  # fmt: skip


def test_infinite_and_undefined_numbers_become_null_in_json() -> None:
    node = HistoryNode(0, None, "load", "abc", 0, {"kl": float("nan"), "ppl": float("inf"), "x": 1})
    found = report_json(JobEnded(1, "h", HistoryReport((node,), 0, 0, None), None, 0.1, "abc"))
    assert found["data"]["nodes"][0]["scores"] == {"kl": None, "ppl": None, "x": 1}


def test_markup_stays_text_and_control_characters_lose_their_power() -> None:
    for report in (
        ChatReport("p", EVIL, "base", 1, 0, 1, 9.0, "stop"),
        TextReport(EVIL),
        SaveReport(EVIL, 5, ("a",), 4, None, {"load": "ok"}),
        HistoryReport((HistoryNode(0, None, EVIL, "abc", 0),), 0, 0, None),
    ):
        text = shown(report)
        assert "[bold red]" in text
        assert not set("\x1b\x07\r\u202e\x9b") & set(text)


def test_harmless_text_is_left_alone() -> None:
    text = "naïve 日本語 👩\u200d🔬 tab\tline\n"
    assert visible(text) == text


def test_piped_text_is_neither_wrapped_nor_padded() -> None:
    long = "word " * 200 + "end"
    assert shown(ChatReport("p", long, "base", 1, 0, 1, 9.0, "stop")).splitlines()[0] == long
    assert all(line == line.rstrip() for line in shown(all_reports()[1]).splitlines())


def test_a_plan_shows_what_goes_in_each_layer() -> None:
    assert shown(all_reports()[1]).splitlines() == [
        "staged prune: 6 experts pruned (8 -> 6 per layer), 23.4 KiB -> 17.6 KiB",
        "layer  pruned  share lost  experts",
        "    1       2       12.5%  0 1",
        "    3       2       12.5%  0 1",
        "    5       2       12.5%  0 1",
    ]


def test_the_current_node_of_the_history_is_marked() -> None:
    nodes = (HistoryNode(0, None, "load", "aa", 0), HistoryNode(1, 0, "apply", "bb", 2048))
    assert shown(HistoryReport(nodes, 1, 2048, 4096)).splitlines() == [
        "2 nodes, at node 1, 2.0 KiB of 4.0 KiB held",
        "   node  parent  state  held     command  scores",
        "      0          aa     0 B      load",
        "*     1  0       bb     2.0 KiB  apply",
    ]


def test_long_lists_of_experts_are_cut_with_their_number() -> None:
    assert experts_text(tuple(range(3))) == "0 1 2"
    assert experts_text(tuple(range(20)), most=2) == "0 1 and 18 more"


def test_a_narrow_terminal_still_shows_every_report() -> None:
    for report in all_reports():
        console = Console(file=StringIO(), width=30)
        console.print(render(report))


def test_progress_says_how_far_how_fast_and_how_long() -> None:
    assert describe(Progress(1, "collect", 8, 32, "samples", 4.0)) == (
        "collect: 8 of 32 samples (25%), 2.0 samples/s, 12 s left"
    )
    assert describe(Progress(1, "importing MLX", 0, None, "", 0.0)) == "importing MLX"
    assert describe(Progress(1, "hash", 5, None, "files", 0.0)) == "hash: 5 files"
    assert describe(Progress(1, "load", 3 << 20, 6 << 20, "B", 1.5)) == (
        "load: 3.0 MiB of 6.0 MiB (50%), 2.0 MiB/s, 2 s left"
    )
    assert describe(Progress(1, "empty", 0, 0, "", 0.0)) == "empty: 0 of 0 (100%)"


def test_progress_lines_come_at_the_start_every_two_seconds_and_at_the_end() -> None:
    now = 0.0
    stream = StringIO()
    lines = ProgressLines(stream, lambda: now)
    for done in range(1, 52):
        now = done / 8  # exact in binary
        lines.show(Progress(1, "collect", done, 60, "", 0.0))
    lines.end()
    shown = [line.split()[1] for line in stream.getvalue().splitlines()]
    assert shown == ["1", "17", "33", "49", "51"]


def test_arrays_in_reports_become_lists() -> None:
    node = HistoryNode(0, None, "load", "abc", 0, {"kl": np.float64(0.5)})
    found = report_json(JobEnded(1, "h", HistoryReport((node,), 0, 0, None), None, 0.1, "abc"))
    assert json.dumps(found["data"]["nodes"][0]["scores"]) == '{"kl": 0.5}'


@pytest.mark.parametrize(
    ("command", "consequence"),
    [
        ("evaluate", "the history keeps no score of this"),
        ("preview", "guardrails of apply measure without it"),
    ],
)
def test_a_steered_measurement_says_what_it_is_not_used_for(
    bench: Bench, command: str, consequence: str
) -> None:
    note = f"note: steering is no part of the weights: {consequence}"
    bench.do("collect --dataset demo:mixed", "prune --n-prune 2")
    plain = bench.do(command)[0].report
    bench.do("steer --activate 1:2")
    steered = bench.do(command)[0].report
    assert plain is not None
    assert steered is not None
    assert "note:" not in shown(plain)
    assert shown(steered).splitlines()[-1] == note


def test_a_ratio_of_perplexities_says_that_it_is_over_the_checkpoints() -> None:
    variant = Variant("prune --n-prune 4", 4 << 20, 0.25, 1.5, 1.0)
    report = RecipeReport("a.recipe", "at most 5 MB", 6 << 20, (variant,), 0, ("report.json",))
    assert report.summary().endswith("KL 0.2500, of 1 variant")
    header, row = shown(report).splitlines()[1:3]
    assert header.split() == ["variant", "size", "KL", "perplexity", "x", "checkpoint"]
    assert row.split()[-2:] == ["0.2500", "1.500"]


def test_a_dense_model_is_shown_without_a_word_on_experts() -> None:
    session = StubSession("demo")
    model = replace(session.info(), moe_layers=0, experts=0, experts_kept=0, top_k=0, router="")
    said = shown(model)
    assert "6, without experts" in said
    assert "router" not in said
    assert model.summary() == "stub_moe: 6 decoder layers, no experts, 24,000 parameters, 23.4 KiB"
    rows = (
        DecoderRow(0, "state space", "dense", 2048, "model.layers.0"),
        DecoderRow(1, "attention", "", 1024, "model.layers.1"),
    )
    lines = [line.split() for line in shown(LayersReport("", (), rows)).splitlines()]
    assert lines == [
        ["2", "decoder", "layers,", "no", "experts"],
        ["layer", "mixer", "feed", "forward", "size", "path"],
        ["0", "state", "space", "dense", "2.0", "KiB", "model.layers.0"],
        ["1", "attention", "1.0", "KiB", "model.layers.1"],
    ]
    assert "experts" not in shown(SaveReport("out", 10, ("a",), 0, None, {"load": "ok"}))
