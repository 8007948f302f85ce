"""Sparse autoencoders: planted features are found, the losses are the papers', runs can be resumed."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file
from tracing_rigs import tiny

from mlxfun.context import Context
from mlxfun.errors import Cancelled, DatasetError, UsageError
from mlxfun.tracing.activations import batch_get_activations, get_activations
from mlxfun.tracing.interventions import zero_out
from mlxfun.tracing.options import SaeTraining
from mlxfun.tracing.sae.autoencoder import Autoencoder, topk
from mlxfun.tracing.sae.files import load_sae, save_sae
from mlxfun.tracing.sae.judging import fit, splice
from mlxfun.tracing.sae.losses import Loss, jump, step
from mlxfun.tracing.sae.sources import FileSource, ModelSource
from mlxfun.tracing.sae.training import geometric_median, train_sae

ROWS = [[3, 14, 15, 9, 26, 5], [5, 6, 7, 8, 9, 10], [1, 2, 3], [9, 8, 7, 6], [2, 4, 6, 8, 10]] * 4
SMALL = SaeTraining(features=48, k=4, batch=16, passes=2, buffer=40)


class Planted:
    """Sums of few of 48 directions of [32], far from 0, in units of 100."""

    at, width, skip = "layers.0.residual", 32, 0

    def __init__(self, count: int = 20000) -> None:
        rng = np.random.default_rng(0)
        self.directions = rng.standard_normal((48, self.width))
        self.directions /= np.linalg.norm(self.directions, axis=1, keepdims=True)
        on = (rng.random((count, 48)) < 3 / 48) * (1 + rng.random((count, 48)))
        self.values = (on @ self.directions * 5 + 3 * rng.standard_normal(self.width)).astype("f4")
        self.sizes = [100] * (count // 100)

    def read(self, units, ctx=None) -> np.ndarray:
        return np.concatenate([self.values[100 * u : 100 * u + 100] for u in units])


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_planted_features_are_found(kind: str) -> None:
    source = Planted()
    options = SaeTraining(kind=kind, features=64, k=3, batch=256, passes=6, rate=1e-2)
    made = train_sae(source, options)
    sae = made.autoencoder
    rows = np.array(sae.W_dec)
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    nearest = (source.directions @ rows.T).max(1)
    assert (nearest > 0.9).mean() > 0.8
    found = fit(sae, source, made.held_out)
    assert found is not None
    assert found.error < 0.2
    assert found.l0 == pytest.approx(3, abs=0.3)
    assert (made.tokens, found.tokens) == (6 * 19000, 1000)
    assert made.loss[-1][1] < made.loss[0][1] / 3


def test_topk_keeps_exactly_k_ties_included() -> None:
    z = mx.array(np.random.default_rng(0).random((50, 24)) + 0.1, mx.float32)
    kept = np.array(topk(z, 5))
    assert ((kept > 0).sum(-1) == 5).all()
    assert np.array_equal(np.sort(kept, -1)[:, -5:], np.sort(np.array(z), -1)[:, -5:])
    assert (np.array(topk(mx.ones((3, 24)), 5)) > 0).sum() == 15
    assert np.array(topk(-z, 5)).max() == 0


def test_the_estimator_is_the_gradient_of_the_expectation_it_estimates() -> None:
    """E over thresholds spread by the kernel: finite differences of it, against the vector product."""
    width, threshold = 0.2, np.array([0.5, 0.3])
    z = np.array([[0.45, 0.1], [0.58, 0.33], [0.7, 0.39], [-0.2, 0.29]])
    found = [
        np.array(mx.grad(lambda t, f=f: f(width)(mx.array(z, mx.float32), t).sum())(
            mx.array(threshold, mx.float32)))
        for f in (jump, step)
    ]  # fmt: skip
    inside = np.abs(z - threshold) < width / 2
    # H smeared over the kernel's width falls with slope -1/width inside of it.
    smeared = lambda t: np.clip((z - t) / width + 0.5, 0, 1)  # noqa: E731
    slope = (smeared(threshold + 1e-6) - smeared(threshold - 1e-6)) / 2e-6
    assert np.allclose(found[1], slope.sum(0), rtol=1e-4)
    assert np.allclose(found[0], (threshold * slope).sum(0), rtol=1e-4)
    assert inside.any(0).all()
    by_z = mx.grad(lambda v: jump(width)(v, mx.array(threshold, mx.float32)).sum())
    assert np.array_equal(np.array(by_z(mx.array(z, mx.float32))), z > threshold)


def test_the_loss_is_that_of_the_formulas() -> None:
    rng = np.random.default_rng(0)
    d, f, n = 6, 10, 7
    p = {"W_enc": rng.standard_normal((d, f)), "b_enc": rng.standard_normal(f),
         "W_dec": rng.standard_normal((f, d)), "b_dec": rng.standard_normal(d),
         "threshold": np.full(f, 0.4)}  # fmt: skip
    x, dead = rng.standard_normal((n, d)), np.arange(f) < 5
    z = (x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    held = {k: mx.array(v, mx.float32) for k, v in p.items()}
    given = held, mx.array(x, mx.float32), mx.array(dead)

    features = np.where(z > 0.4, z, 0)
    error = x - features @ p["W_dec"] - p["b_dec"]
    only_dead = np.where(dead, z, -np.inf)
    revived = np.zeros_like(z)
    for row, place in enumerate(np.argsort(-only_dead, axis=1)[:, : d // 2]):
        revived[row, place] = np.maximum(only_dead[row, place], 0)
    left = ((error - revived @ p["W_dec"]) ** 2).sum(1).mean()
    l0 = (z > 0.4).sum(1).mean()
    expected = (error**2).sum(1).mean() + 0.5 * (l0 / 3 - 1) ** 2 + 0.25 * left
    assert float(Loss("jumprelu", 3, 0.5, 0.25, 0.1)(*given)[0]) == pytest.approx(
        expected, rel=1e-4
    )

    kept = np.where(z >= np.sort(z, 1)[:, -3:-2], np.maximum(z, 0), 0)
    squared = ((x - kept @ p["W_dec"] - p["b_dec"]) ** 2).sum(1).mean()
    loss, said, active = Loss("topk", 3, 0.5, 0.25, 0.1)(*given[:2], None)
    assert float(loss) == float(said) == pytest.approx(squared, rel=1e-4)
    assert np.array_equal(np.array(active), (kept > 0).any(0))


class Stops(Context):
    """Cancels at the given call of check."""

    def __init__(self, at: int) -> None:
        self.left = at

    def check(self) -> None:
        self.left -= 1
        if self.left < 0:
            raise Cancelled("cancelled")


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
@pytest.mark.parametrize("stop", [3, 14, 21])
def test_a_run_that_was_cancelled_goes_on_to_the_same_bits(tmp_path, kind: str, stop: int) -> None:
    model = tiny("qwen3_moe")
    options = replace(SMALL, kind=kind, batch=8, passes=3, dead_after=30)
    source = ModelSource(model, ROWS, "layers.1.residual")
    whole = train_sae(source, options)
    path = tmp_path / "sae"
    with pytest.raises(Cancelled, match="--resume"):
        train_sae(source, options, path, about={"state": "a"}, ctx=Stops(stop))
    assert load_sae(path).features == 48  # what there was is kept, and can be used
    with pytest.raises(UsageError, match="already holds an autoencoder"):
        train_sae(source, options, path)
    resumed = train_sae(source, options, path, resume=True, about={"state": "a"})
    assert np.array_equal(np.array(load_sae(path).W_enc), np.array(resumed.autoencoder.W_enc))
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        one, other = (getattr(r.autoencoder, name) for r in (whole, resumed))
        assert (one is None and other is None) or np.array_equal(np.array(one), np.array(other))
    assert (whole.loss, whole.tokens, whole.dead) == (resumed.loss, resumed.tokens, resumed.dead)
    for other, word in ((replace(options, k=5), "k 4"), (options, "state")):
        with pytest.raises(UsageError, match=f"was trained with .*{word}"):
            train_sae(source, other, path, resume=True)


def test_it_is_trained_on_what_activations_save_has_written(tmp_path) -> None:
    model = tiny("llama")
    model.parts.model.set_dtype(mx.bfloat16)
    path = tmp_path / "some.safetensors"
    batch_get_activations(model, ROWS, path, ["layers.1.residual", "layers.0.mlp.output"], None)
    with pytest.raises(UsageError, match="several values"):
        FileSource(path)
    source = FileSource(path, "layers.1.residual")
    held = get_activations(model, ROWS, [1], None)
    assert held.rows is not None
    assert source.made_on == {"model_type": "llama", "values": "some.safetensors"}
    expected = np.array(held[1].astype(mx.float32))[held.rows[:, 1] > 0]
    assert np.array_equal(source.read(range(len(source.sizes))), expected)
    live = ModelSource(model, ROWS, "layers.1.residual")
    values, places = live.read_placed(range(len(ROWS)))
    own = {(r, p): v for (r, p), v in zip(places.tolist(), values, strict=True)}
    wanted = held.rows[held.rows[:, 1] > 0].tolist()
    assert len(own) == len(wanted) == len(expected)
    for (row, at), value in zip(wanted, expected, strict=True):
        assert np.allclose(own[row, at], value, atol=0.05)


def test_one_expert_is_a_source_with_the_tokens_that_it_serves(tmp_path) -> None:
    model = tiny("qwen3_moe")
    name = "layers.1.experts.2.output"
    source = ModelSource(model, ROWS, name, skip=0)
    values, places = source.read_placed(range(len(ROWS)))
    with model.trace(ROWS[0]) as t:
        saved = t[name].save()
    mine = places[:, 0] == 0
    assert np.array_equal(places[mine, 1], saved.tokens[:, 1])
    assert np.allclose(values[mine], np.array(saved), atol=1e-5)
    made = train_sae(source, SMALL)
    assert 0 < made.tokens < 2 * sum(source.sizes)
    judged = splice(model, made.autoencoder, ROWS[:5])
    assert judged is not None
    assert judged.kl_zeros > 0
    save_sae(made.autoencoder, tmp_path / "expert")
    assert load_sae(tmp_path / "expert").at == name


def perfect(width: int, at: str) -> Autoencoder:
    """x = relu(x) - relu(-x): nothing is lost."""
    eye = mx.eye(width)
    both, none = mx.concatenate([eye, -eye]), mx.zeros((2 * width,))
    return Autoencoder(both.T, none, both, mx.zeros((width,)), at, threshold=none)


EXPERT = "layers.0.experts.1.output"


@pytest.mark.parametrize(
    ("family", "mode", "dtype", "more"),
    [("qwen3_moe", None, mx.float32, (EXPERT,)), ("qwen3_moe", "affine4", mx.float32, (EXPERT,)),
     ("llama", None, mx.bfloat16, ())],
)  # fmt: skip
def test_a_spliced_value_keeps_the_dtype_and_a_perfect_one_loses_nothing(
    family, mode, dtype, more
) -> None:
    model = tiny(family, mode)
    if mode is None:
        model.parts.model.set_dtype(dtype)
    for at in ("layers.1.residual", "layers.0.mlp.output", *more):
        with model.trace(ROWS[0]):
            plain = model.output.save()
        width = ModelSource(model, ROWS, at).width
        sae = perfect(width, at)
        with model.trace(ROWS[0]) as t:
            t.edit(at, sae.reconstruct)
            changed = model.output.save()
        assert changed.dtype == plain.dtype
        assert np.array_equal(changed.numpy(), plain.numpy())
        found = splice(model, sae, ROWS[:3])
        assert found is not None
        assert (found.kl_spliced, found.spliced) == (0, found.plain)
        assert found.recovered in (None, 1)


@pytest.mark.parametrize("skip", [0, 2])
def test_cross_entropy_is_that_of_the_samples_own_tokens_behind_those_left_out(skip: int) -> None:
    model, row = tiny("llama"), ROWS[0]
    sae = replace(perfect(32, "layers.0.residual"), skip=skip)
    found = splice(model, sae, [row])
    assert found is not None
    with model.trace(row) as t:
        plain = model.output.save()
    with model.trace(row) as t:
        t.edit(sae.at, zero_out(positions=list(range(skip, len(row)))))
        zeros = model.output.save()
    for output, said in ((plain, found.plain), (zeros, found.zeros)):
        z = output.numpy()[0].astype(np.float64)
        log_p = z - np.log(np.exp(z).sum(-1, keepdims=True))
        own = [-log_p[at, token] for at, token in enumerate(row[1:])][skip:]
        assert said == pytest.approx(np.mean(own), rel=1e-5)
    assert found.tokens == 5 - skip


@pytest.mark.parametrize("kind", ["topk", "jumprelu"])
def test_the_scale_of_the_values_is_undone_exactly(kind: str) -> None:
    """Values four times as large, which float32 has exactly, make the same run."""
    one, four = Planted(2000), Planted(2000)
    four.values = four.values * 4
    options = SaeTraining(kind=kind, features=64, k=3, batch=64)
    small, large = (train_sae(source, options).autoencoder for source in (one, four))
    for name, factor in {"W_enc": 1, "W_dec": 1, "b_enc": 4, "b_dec": 4, "threshold": 4}.items():
        ours, theirs = getattr(small, name), getattr(large, name)
        assert (ours is None and theirs is None) or np.array_equal(
            np.array(ours) * factor, np.array(theirs)
        )
    x = mx.array(one.values[:50])
    assert np.array_equal(np.array(small.encode(x)) * 4, np.array(large.encode(x * 4)))


def test_adam_does_not_see_what_only_lengthens_a_direction(tmp_path) -> None:
    options = SaeTraining(features=64, k=3, batch=2000, rate=1e-12)
    train_sae(Planted(2000), options, tmp_path / "sae")
    state = load_file(tmp_path / "sae" / "training.safetensors")
    moment, rows = state["adam.W_dec.m"], state["params.W_dec"]
    assert np.linalg.norm(moment) > 1e-3
    assert np.abs((moment * rows).sum(1)).max() < 1e-5 * np.linalg.norm(moment, axis=1).max()


def test_the_geometric_median_is_not_moved_by_one_far_point() -> None:
    x = np.concatenate([np.random.default_rng(0).standard_normal((200, 3)), [[1e6, 0, 0]]])
    assert np.linalg.norm(geometric_median(x)) < 0.5


def test_what_cannot_be_trained_is_refused(tmp_path) -> None:
    model = tiny("qwen3_moe")
    with pytest.raises(UsageError, match="no vector for each token"):
        ModelSource(model, ROWS, "layers.0.attn.weights")
    with pytest.raises(UsageError, match="no vector for each token"):
        ModelSource(model, ROWS, "layers.0.router.choice")
    with pytest.raises(UsageError, match="no sample has more than the 9 tokens"):
        ModelSource(model, ROWS, "embed", skip=9)
    source = ModelSource(model, ROWS, "embed")
    with pytest.raises(UsageError, match="k 300 must be between 1 and the 256 features"):
        train_sae(source, SaeTraining(k=300))
    with pytest.raises(UsageError, match="smaller rate"):
        train_sae(source, SaeTraining(k=4, features=48, batch=4, rate=1e30, passes=4))
    with pytest.raises(DatasetError, match="nothing to go on from"):
        train_sae(source, SMALL, tmp_path / "none", resume=True)
