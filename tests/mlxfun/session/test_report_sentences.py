"""The one sentence of a report: numbers agree with their words, ratios say of what."""

from __future__ import annotations

import pytest

from mlxfun.calibration.options import CollectOptions
from mlxfun.calibration.reports import CollectReport, CombineReport, StatsReport
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.reports import HistoryNode, HistoryReport, PlanReport
from mlxfun.evaluation.reports import CompareReport, EvaluateReport, NodeFigures, ProbeReport
from mlxfun.generation.reports import ChatReport
from mlxfun.report import Report
from mlxfun.techniques.prune.options import SelectOptions
from mlxfun.techniques.router_bias.reports import BoostReport, BoostRow
from mlxfun.text import counted


def plan(*kept: int, before: int = 16, technique: str = "prune") -> PlanReport:
    """A plan that keeps so many of `before` experts in each layer."""
    return PlanReport(
        technique, "reap_sum", "hand", before, min(kept),
        {layer: tuple(range(n)) for layer, n in enumerate(kept)},
        {layer: tuple(range(n, before)) for layer, n in enumerate(kept)},
        6 << 20, 5 << 20, 0, None, "s",
    )  # fmt: skip


def stats(samples: int, tokens: int) -> StatsReport:
    return StatsReport("show", (0,), 8, samples, tokens, 1.0, False, "s", False, None, (), ())


def evaluated(subject: str = "current") -> EvaluateReport:
    return EvaluateReport(
        subject, "s", ("a",), {"a": 24.0, "all": 24.0}, {"all": (20.0, 28.0)}, {"all": 16.0}, 99,
        {"a": 99}, None, None, None, None, (), False,
    )  # fmt: skip


def compared(gone: tuple[int, ...]) -> CompareReport:
    a, b = (NodeFigures(n, "x", "s", 9, 9, None, 16.0 * n, 1.0, None, ()) for n in (1, 2))
    return CompareReport(a, b, 99, ("a",), {0: gone}, {})


def boosted(layers: int) -> BoostReport:
    rows = tuple(BoostRow(n, "selection bias", {3: 0.5}, 1.0, 1.0, 0.0) for n in range(layers))
    return BoostReport(
        "amplify", None, "", 16, 16, {}, {}, 9, 9, 0, None, "s", rows=rows, subject="law"
    )  # fmt: skip


def combined(samples: int) -> CombineReport:
    return CombineReport(
        "merge", ("a", "b"), "c.npz", "sum", 2, (0,), 8, samples, samples, "m", "s", ()
    )  # fmt: skip


@pytest.mark.parametrize(
    ("report", "sentence"),
    [
        (plan(15, 16, 16), "staged prune: 1 expert pruned (16 -> 15 to 16 per layer), 6.0 MiB -> 5.0 MiB"),
        (plan(15), "staged prune: 1 expert pruned (16 -> 15 per layer), 6.0 MiB -> 5.0 MiB"),
        (plan(12, 12), "staged prune: 8 experts pruned (16 -> 12 per layer), 6.0 MiB -> 5.0 MiB"),
        (plan(9, 12, 10), "staged prune: 17 experts pruned (16 -> 9 to 12 per layer), 6.0 MiB -> 5.0 MiB"),
        (CollectReport("a", 1, 1, 1, 2.0, 1.0, (), None, 0, False),
         "1 sample, 1 token at 2 tokens/s; 100.0% of the experts seen"),
        (CollectReport("a", 2, 2, 1234, 2.0, 1.0, (), None, 0, False),
         "2 samples, 1,234 tokens at 2 tokens/s; 100.0% of the experts seen"),
        (stats(1, 1), "stats show: 1 sample, 1 token, coverage 100.0%, counting chat off"),
        (stats(2, 5), "stats show: 2 samples, 5 tokens, coverage 100.0%, counting chat off"),
        (ChatReport("p", "a", "base", 3, 0, 1, 9.0, "length"), "1 token at 9.0 tokens/s (length)"),
        (ChatReport("p", "a", "base", 3, 0, 7, 9.0, "stop"), "7 tokens at 9.0 tokens/s (stop)"),
        (HistoryReport((HistoryNode(0, None, "load", "s", 0),), 0, 0, None),
         "1 node, at node 0, 0 B held"),
        (boosted(1), "staged amplify law: 1 expert raised in 1 layer, exactly"),
        (boosted(2), "staged amplify law: 2 experts raised in 2 layers, exactly"),
        (combined(1), "stats merge by sum: 1 sample, 1 token from 2 files; wrote c.npz"),
        (evaluated(), "current: perplexity 24.000 [20.000, 28.000] (1.500x the checkpoint) over "
                      "99 tokens"),
        (ProbeReport("s", "a", 64, 24.0, 16.0, 0.25, 0.5),
         "probe: perplexity 24.00 (1.500x the checkpoint), KL 0.2500, top-1 agreement 50.0%, on "
         "64 tokens"),
        (compared((3,)), "node 1 against 2: perplexity 16.000 and 32.000 (2.000x node 1's) on 99 "
                         "tokens, 1 expert differs"),
        (compared((3, 4)), "node 1 against 2: perplexity 16.000 and 32.000 (2.000x node 1's) on "
                           "99 tokens, 2 experts differ"),
    ],
)  # fmt: skip
def test_the_sentence_of_a_report(report: Report, sentence: str) -> None:
    assert report.summary() == sentence


def test_large_counts_have_commas() -> None:
    assert [counted(n, "token", "tokens") for n in (0, 1, 2000)] == [
        "0 tokens", "1 token", "2,000 tokens"
    ]  # fmt: skip


def test_why_says_how_many_each_layer_keeps(session) -> None:
    session.collect(CollectOptions(DatasetOptions("demo:mixed", max_samples=2, max_tokens=24)))
    session.select(SelectOptions(drop={2: (5,)}))
    assert session.why(2, 5).verdict.endswith("; prune (hand) keeps 15 to 16 per layer")
    session.select(SelectOptions(drop=dict.fromkeys((0, 1, 3, 4, 5), (5,))))
    assert session.why(2, 5).verdict.endswith("; prune (hand) keeps 15 per layer")
