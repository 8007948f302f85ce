"""Ablation on a trained model that refuses: few refusals left, harmless answers as they were."""

from __future__ import annotations

import pytest

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.data.options import DatasetOptions
from mlxfun.evaluation.options import EvaluateOptions
from mlxfun.techniques.ablate.options import AblateOptions
from tests.slow.ablate_table import HEADING, rows
from tests.slow.conftest import Shared

pytestmark = pytest.mark.slow


def sets(shared: Shared, name: str) -> tuple[DatasetOptions, DatasetOptions]:
    harmful, harmless = (
        DatasetOptions(str(shared.data / f"{kind}_{name}.jsonl"))
        for kind in ("harmful", "harmless")
    )
    return harmful, harmless


def test_a_search_leaves_few_refusals_and_harmless_answers_as_they_were(shared: Shared) -> None:
    session = Session.open(shared.model)
    find, judge = sets(shared, "train"), sets(shared, "eval")
    mixed = DatasetOptions(str(shared.data / "calib_mixed.jsonl"), max_samples=64, max_tokens=256)
    session.collect(CollectOptions(mixed))
    names = ("drama", "markdown", "medical", "python", "solidity", "wiki")
    text = tuple(
        DatasetOptions(str(shared.data / f"eval_{n}.jsonl"), max_tokens=256) for n in names
    )
    ways = [("search", AblateOptions(search=12))]
    base, ablated = rows(session, find, judge, ways, EvaluateOptions(text, kl=False))
    session.close()
    print(f"\n{HEADING}\n{base}\n{ablated}")
    assert base.count.harmful >= 60
    assert ablated.count.of_harmful == 100
    assert ablated.count.harmful <= 3
    assert ablated.count.harmless <= 1
    assert ablated.first_token_kl <= 0.02
    assert ablated.perplexity <= 1.01
