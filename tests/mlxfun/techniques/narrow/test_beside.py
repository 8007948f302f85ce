"""Shared experts and dense layers become narrower along with the experts, where config.json can say so."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from rigs import make_rig

from mlxfun.context import SILENT
from mlxfun.data.datasets import batches
from mlxfun.errors import PlanError
from mlxfun.hooks.replay import intercepting
from mlxfun.model.mlps import mlps_of
from mlxfun.model.parameters import dequantised
from mlxfun.techniques.narrow import beside
from mlxfun.techniques.narrow.beside import How, narrowed_mlp, products

from .test_technique import TEXT, Bench, check_round_trip, few_tokens_suffice, run

__all__ = ["few_tokens_suffice"]

BOTH = {"shared": True, "dense": True}
WAYS = [
    ("qwen2_moe", {"shared": True}),  # a key of its own
    ("deepseek_v3", BOTH),  # a count of experts' widths, and a key of its own
    ("glm4_moe", BOTH),
    ("Klear", BOTH),
    ("kimi_k3", BOTH),
    ("nemotron_h", {"shared": True}),  # no gate
    ("gemma4", {"dense": True}),  # a dense part beside the experts of every layer
    ("longcat_flash", {"dense": True}),  # two in a layer
    ("jamba", {"dense": True}),  # one key for experts and dense layers
    ("deepseek_v41", {"shared": True}),  # one key for experts and shared expert
    ("llama4", {"shared": True}),
]


@pytest.mark.parametrize(("name", "options"), WAYS)
def test_what_is_staged_is_what_stock_loading_makes_and_undo_is_exact(rig, name, options) -> None:
    r = rig(name)
    check_round_trip(r, fraction=0.25, **options)
    assert {mlp.kind for mlp, _ in r.resident.resized_mlps} == set(options)
    widths = {mlp.width(r.resident.tree.modules) for mlp, _ in r.resident.resized_mlps}
    assert widths == {24}


def test_they_keep_their_width_unless_asked(rig) -> None:
    r = rig("deepseek_v3")
    check_round_trip(r, fraction=0.5)  # half of an expert: no padding of the shared one either
    assert r.resident.resized_mlps == ()


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("qwen3_moe", {"shared": True}, "nothing that is known as the shared experts"),
        ("granitemoehybrid", {"shared": True}, "does not know how to slice .*input_linear"),
        ("jamba", {}, "--dense"),
        ("llama4", {}, "--shared"),
        ("llama4", {"dense": True}, "also sizes the shared expert"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(rig, name, options, said) -> None:
    with pytest.raises(PlanError, match=said):
        run(rig(name), fraction=0.25, **options)


@pytest.mark.parametrize("requantize", [False, True])
def test_packed_ones_lose_whole_groups_or_are_packed_anew(requantize) -> None:
    model, config = tiny_models.build("deepseek_v3", wide=True)
    config = config | {"moe_intermediate_size": 128, "intermediate_size": 128}
    model = tiny_models.from_config(config)
    r = make_rig(model, tiny_models.quantise(model, config, "affine4"))
    check_round_trip(r, fraction=0.5, requantize=requantize, **BOTH)
    assert {mlp.width(r.resident.tree.modules) for mlp, _ in r.resident.resized_mlps} == {64}


def neurons_of(r, mlp) -> np.ndarray:
    """The neurons [T, N] of an MLP over the text, by plain forwards of one sequence each."""
    seen = []

    def note(_, own, args, __):
        seen.append(np.array(args[0].reshape(-1, args[0].shape[-1]).astype(mx.float32)))
        return own(*args)

    with intercepting([r.resident.tree.modules[f"{mlp.path}.{mlp.outward}"]], note):
        for tokens in TEXT:
            mx.eval(r.model(mx.array(tokens[None])))
    return np.concatenate(seen).astype(np.float64)


def test_the_fit_is_ridge_regression_on_the_neurons_that_stay(rig) -> None:
    r = rig("deepseek_v3")
    bench = Bench.of(r)
    modules = r.resident.tree.modules
    mlp = next(m for m in mlps_of(modules, r.anatomy) if m.kind == "shared")
    h = neurons_of(r, mlp)
    (product,) = products(bench, [mlp], batches(TEXT, 64, 1), SILENT)
    np.testing.assert_allclose(product, h.T @ h, rtol=1e-4, atol=1e-6)
    how = How("obs", refit=True, repack=False)
    delta, error = narrowed_mlp(modules, mlp, product, 24, how, bench.stored)
    path = f"{mlp.path}.{mlp.outward}.weight"
    outward = np.array(dequantised(modules[f"{mlp.path}.{mlp.outward}"])).T.astype(np.float64)
    kept = beside._kept(product, outward, 24, "obs", 1)
    mu = beside.RIDGE * np.trace(h.T @ h) / h.shape[1]
    # As one least-squares problem: rows of the tokens, and rows that hold the weights where they are.
    left = np.concatenate([h[:, kept], np.sqrt(mu) * np.eye(24)])
    right = np.concatenate([h @ outward, np.sqrt(mu) * outward[kept]])
    wanted = np.linalg.lstsq(left, right, rcond=None)[0]
    found = np.array(delta.arrays[path]).T
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-5)
    plain = h @ outward
    rest = plain - h[:, kept] @ found
    assert error == pytest.approx(np.square(rest).sum() / np.square(plain).sum(), rel=1e-3)
    sliced = narrowed_mlp(modules, mlp, product, 24, How("obs", False, False), bench.stored)[1]
    assert error < sliced
