"""What ablation costs: reading the prompts against a plain forward, and trials per minute.

Ratios within one run: `pytest -n 0 -m bench -s tests/bench/test_ablation_cost.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxfun import Session
from mlxfun.data.datasets import batches
from mlxfun.data.options import DatasetOptions
from mlxfun.evaluation.refusal_metrics import FirstToken, Prompts, ask_all
from mlxfun.generation.answers import Greedy, read_prompts
from mlxfun.model.device.batch_size import CPU_BATCH
from mlxfun.model.outputs import residual_outputs
from mlxfun.techniques.ablate.delta import Projector, projections
from mlxfun.techniques.ablate.directions import residual_means
from mlxfun.techniques.ablate.options import AblateOptions

pytestmark = pytest.mark.bench


@pytest.fixture(scope="module")
def session() -> Any:
    opened = Session.open("demo")
    yield opened
    opened.close()


def seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def ratio(one: Callable[[], Any], other: Callable[[], Any], pairs: int = 15) -> float:
    """Median of seconds(one) / seconds(other) over alternating pairs."""
    one(), other()
    return statistics.median(seconds(one) / seconds(other) for _ in range(pairs))


def test_reading_the_prompts_is_one_pass(session: Session) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(64, 192, 32)
    given = batches([rng.integers(0, 4096, n).astype(np.int32) for n in lengths], *CPU_BATCH)
    modules = session.editor.resident.tree.modules
    layers = [modules[layer.path] for layer in session.map.layers]
    backbone: Any = session.model.model

    def forward() -> None:
        for batch in given:
            mx.eval(backbone(mx.array(batch.tokens)))

    found = ratio(lambda: residual_means(session.model, session.anatomy, layers, given), forward)
    print(f"reading the residual stream: {found:.3f} of a plain forward without its head")
    assert found <= 1.1


def test_a_trial_costs_little_more_than_a_forward_of_its_prompts(session: Session) -> None:
    options = AblateOptions(
        DatasetOptions("demo:harmful"), DatasetOptions("demo:harmless"), search=30
    )
    report = session.abliterate(options)
    session.discard()
    print(
        f"{report.trials_per_minute:.0f} trials a minute on 12 harmful and 12 harmless prompts, "
        f"judged by {report.judged}"
    )
    session.abliterate(AblateOptions(choose=report.chosen))
    plan = session.editor.require_staged("bench").plan
    session.discard()
    prompts = Prompts(*(
        tuple(read_prompts(DatasetOptions(f"demo:{name}"), session.tokenizer, None)[0])
        for name in ("harmful", "harmless")
    ))  # fmt: skip
    judge = FirstToken(
        session._workspace.evaluator, ask_all(Greedy(session.model, session.tokenizer), prompts, 4)
    )
    resident = session.editor.resident
    outputs = residual_outputs(resident.tree.modules, session.map)
    projector = Projector(resident, outputs)

    def trial() -> None:
        with projector.attached():
            projector.set(projections(outputs, plan, resident))
            judge.judge()

    found = ratio(trial, judge.judge, 9)
    print(f"a trial: {found:.3f} of the same prompts without projections")
    assert found <= 1.6
