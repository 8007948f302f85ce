"""Ablation on a trained model that refuses: few refusals left, harmless answers as they were."""

from __future__ import annotations

import pytest

from mlxfun import Session
from mlxfun.data.options import DatasetOptions
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
    base, ablated = rows(session, find, judge, [("search", AblateOptions(search=24))])
    session.close()
    print(f"\n{HEADING}\n{base}\n{ablated}")
    assert base.count.harmful >= 60
    assert ablated.count.of_harmful == 100
    assert ablated.count.harmful <= 10
    assert ablated.count.harmless <= 2
    assert ablated.first_token_kl <= 0.1
