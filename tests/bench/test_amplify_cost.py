"""What amplifying costs per layer: fitting v against a plain forward of the same text.

pytest -n 0 -m bench tests/bench/test_amplify_cost.py -s
"""

from __future__ import annotations

from time import perf_counter

import mlx.core as mx
import numpy as np
import pytest

from mlxfun import Session
from mlxfun.data.datasets import batches, read_lines, tokenize
from mlxfun.data.options import DatasetOptions
from mlxfun.hooks.layerwise import Carrier
from mlxfun.model.device.batch_size import CPU_BATCH
from mlxfun.techniques.router_bias.delta import fit, folds

pytestmark = pytest.mark.bench

TEXT = DatasetOptions("demo:mixed", max_samples=32, max_tokens=128)


def seconds(work) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


def test_fitting_all_layers_costs_a_few_forwards_of_its_text(capsys):
    session = Session.open("demo")
    sequences = tokenize(read_lines(TEXT), session.tokenizer, 128, session.anatomy.vocabulary)
    given = batches(sequences, *CPU_BATCH)

    def forward() -> None:
        for batch in given:
            mx.eval(session.model(mx.array(batch.tokens)))

    def fit_all() -> None:
        folds(Carrier(session.model, session.taps, given), session.taps.layers)

    forward(), fit_all()
    plain = min(seconds(forward) for _ in range(3))
    whole = min(seconds(fit_all) for _ in range(3))
    layers = len(session.taps.layers)
    with capsys.disabled():
        print(f"\n{layers} layers: forward {plain:.3f} s, fit {whole:.3f} s, "
              f"{whole / layers * 1e3:.1f} ms a layer, ratio {whole / plain:.2f}")  # fmt: skip
    assert whole < 10 * plain
    session.close()


@pytest.mark.parametrize(("width", "limit"), [(256, 1.0), (2048, 20.0)])
def test_the_solve_of_one_layer(width, limit, capsys):
    x = np.random.default_rng(0).normal(size=(8192, width)).astype(np.float32) + 1
    fit(x[:512])
    taken = min(seconds(lambda: fit(x)) for _ in range(2))
    with capsys.disabled():
        print(f"\n8192 tokens x {width}: {taken:.3f} s a layer")
    assert taken < limit
