"""What interventions do: against the arithmetic written out, in one forward and in answers."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.generate import generate_step
from tracing_rigs import TOKENS, bits, tiny

from mlxfun import Model
from mlxfun.errors import UsageError
from mlxfun.tracing.interventions import (
    add_vector,
    clamp,
    compose,
    drop_expert,
    force_route,
    noise,
    replace_with,
    scale,
    scale_expert,
    zero_out,
)

VECTOR = np.linspace(-1, 1, 32).astype(np.float32)
CASES = {
    "zero_out": (zero_out(), lambda x: x * 0),
    "a number": (2.5, lambda x: x * 0 + 2.5),
    "scale": (scale(-2.0), lambda x: -2 * x),
    "add_vector": (add_vector(VECTOR, 3.0), lambda x: x + 3 * VECTOR),
    "replace_with": (replace_with(VECTOR), lambda x: x * 0 + VECTOR),
    "an array": (VECTOR, lambda x: x * 0 + VECTOR),
    "clamp": (clamp(-0.1, 0.2), lambda x: np.clip(x, -0.1, 0.2)),
    "a function": (lambda x: x * x, lambda x: x * x),
    "compose": (compose(scale(2.0), add_vector(VECTOR), clamp(-1, 1)),
                lambda x: np.clip(2 * x + VECTOR, -1, 1)),
}  # fmt: skip


def value(model: Model, name: str, change: object = None) -> np.ndarray:
    with model.trace(TOKENS) as t:
        if change is not None:
            t.edit(name, change)
        saved = t[name].save()
    return np.array(saved)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["layers.1.mlp.output", "layers.0.residual", "embed"])
def test_an_intervention_does_its_arithmetic(case: str, name: str) -> None:
    model = tiny("qwen3_moe")
    change, arithmetic = CASES[case]
    plain = value(model, name)
    assert np.allclose(value(model, name, change), arithmetic(plain), atol=1e-5)


def test_noise_is_the_same_for_a_seed_and_has_its_deviation() -> None:
    model = tiny("llama")
    plain = value(model, "layers.0.residual")
    one, again, other = (value(model, "layers.0.residual", noise(0.5, seed=s)) for s in (1, 1, 2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, other)
    assert 0.4 < (one - plain).std() < 0.6


def test_positions_and_heads_are_changed_and_no_others() -> None:
    model = tiny("llama")
    plain = value(model, "layers.0.residual")
    changed = value(model, "layers.0.residual", zero_out(positions=[1, -1]))
    assert not changed[:, [1, 5]].any()
    assert np.array_equal(changed[:, [0, 2, 3, 4]], plain[:, [0, 2, 3, 4]])
    heads = value(model, "layers.0.attn.heads")
    changed = value(model, "layers.0.attn.heads", zero_out(heads=[1, 3], positions=slice(2, 4)))
    expected = heads.copy()
    expected[:, [1, 3], 2:4] = 0
    assert np.array_equal(changed, expected)
    part = compose(zero_out(positions=0), scale(2.0, positions=1))
    changed = value(model, "layers.0.residual", part)
    assert not changed[:, 0].any()
    assert np.allclose(changed[:, 1], 2 * plain[:, 1])
    assert np.array_equal(changed[:, 2:], plain[:, 2:])


def test_positions_of_a_padded_batch_are_each_rows_own() -> None:
    model = tiny("llama")
    with model.trace([[1, 2, 3], [1, 2, 3, 4, 5]]) as t:
        t.layers[0].residual = zero_out(positions=-1)
        saved = t.layers[0].residual.save()
    zero = ~np.array(saved).any(-1)
    assert zero.tolist() == [[False, False, True, False, False], [False] * 4 + [True]]


def test_weights_that_are_changed_make_the_heads() -> None:
    model = tiny("llama")
    with model.trace(TOKENS) as t:
        t.layers[1].attn.weights = lambda w: mx.broadcast_to(mx.eye(6), w.shape)
        heads, values = t.layers[1].attn.heads.save(), t.layers[1].attn["values"].save()
    assert np.allclose(np.array(heads), np.repeat(np.array(values), 2, axis=1), atol=1e-5)


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "deepseek_v3", "plamo2"])
def test_weights_can_be_changed_however_attention_is_written(name: str) -> None:
    model = tiny(name)
    layer = next(n for n in model.dry_run(TOKENS) if n.endswith("attn.weights"))
    part = layer.removesuffix(".weights")
    with model.trace(TOKENS) as t:
        t[f"{part}.output"].save()
        t.edit(layer, 0.0)
        heads = t[f"{part}.heads"].save()
    assert not np.array(heads).any()
    with model.trace(TOKENS) as t:
        plain = t.output.save()
    with model.trace(TOKENS) as t:
        t.edit(layer, lambda w: w + 0)
        same = t.output.save()
    assert np.allclose(np.array(plain), np.array(same), atol=1e-3)


def test_dropping_an_expert_takes_its_part_away_and_no_others() -> None:
    model = tiny("qwen3_moe")
    with model.trace(TOKENS) as t:
        choice, adds = t.layers[1].router.choice.save(), t.layers[1].experts[3].output.save()
        before = t.layers[1].mlp.output.save()
    with model.trace(TOKENS) as t:
        t.layers[1].experts = drop_expert(3)
        after, same = t.layers[1].mlp.output.save(), t.layers[1].router.choice.save()
    expected = np.array(before)
    for (row, at), part in zip(adds.tokens, np.array(adds), strict=True):
        expected[row, at] -= part
    assert len(adds.tokens) > 0
    assert np.allclose(np.array(after), expected, atol=1e-5)
    assert np.array_equal(np.array(choice), np.array(same))


def test_a_forced_route_takes_over_places_and_weights_of_the_least_wanted() -> None:
    model = tiny("qwen3_moe")
    with model.trace(TOKENS) as t:
        choice, weights, logits = (t.layers[0].router.choice.save(),
                                   t.layers[0].router.weights.save(),
                                   t.layers[0].router.logits.save())  # fmt: skip
    with model.trace(TOKENS) as t:
        t.layers[0].router = force_route([6], positions=[2])
        now, same = t.layers[0].router.choice.save(), t.layers[0].router.weights.save()
    assert np.array_equal(np.array(weights), np.array(same))
    old, new, z = np.array(choice), np.array(now), np.array(logits)
    for row, at in np.ndindex(2, 6):
        if at != 2 or 6 in old[row, at]:
            assert old[row, at].tolist() == new[row, at].tolist()
        else:
            lowest = int(np.argmin([z[row, at, e] for e in old[row, at]]))
            expected = old[row, at].copy()
            expected[lowest] = 6
            assert new[row, at].tolist() == expected.tolist()
    with pytest.raises(UsageError, match="force 1 to 2"), model.trace(TOKENS) as t:
        t.layers[0].router = force_route([1, 2, 3])


def test_a_route_taken_from_another_forward_is_followed() -> None:
    model = tiny("deepseek_v3")
    moe = model.parts.map.experts.layers[0].index
    with model.trace([TOKENS[1]]) as t:
        choice, weights = t.layers[moe].router.choice.save(), t.layers[moe].router.weights.save()
    with model.trace([TOKENS[0]]) as t:
        t.layers[moe].router.choice, t.layers[moe].router.weights = choice, weights
        used, adds = t.layers[moe].router.choice.save(), t.layers[moe].experts[2].output.save()
    assert np.array_equal(np.array(used), np.array(choice))
    assert len(adds.tokens) == int((np.array(choice) == 2).sum())


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("layers.0.mlp.output", np.ones(5), "does not fit a value of shape"),
        ("layers.0.mlp.output", lambda x: x[:, :1], "where the value is"),
        ("layers.0.mlp.output", None, "is no intervention"),
        ("layers.0.mlp.output", "zero", "is no intervention"),
        ("layers.0.mlp.output", force_route([1]), "belongs at layers.i.router"),
        ("layers.0.mlp.output", drop_expert(1), "belongs at layers.i.experts"),
        ("layers.0.experts", drop_expert(99), "8 experts, 0 to 7"),
        ("layers.0.router", scale_expert(1, 2.0), "belongs at layers.i.experts"),
        ("layers.0.mlp.output", scale(2.0, heads=[0]), "heads cannot be chosen"),
    ],
)
def test_an_intervention_that_does_not_fit_says_why(name: str, change, words: str) -> None:
    model = tiny("qwen3_moe")
    t = model.trace(TOKENS)

    def run() -> None:
        with t:
            t.edit(name, change)

    with pytest.raises(UsageError, match=words):
        run()
    assert bits(model.parts.model(mx.array(TOKENS)))


def test_clamp_of_an_empty_range_is_refused() -> None:
    with pytest.raises(UsageError, match="lower bound is above"):
        clamp(1, -1)


# -- answers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "mamba2", "gemma3_text", "deepseek_v3"])
def test_an_answer_without_interventions_is_that_of_mlx_lm(name: str) -> None:
    model = tiny(name)
    steps = generate_step(mx.array([3, 14, 15]), model.parts.model, max_tokens=8)
    expected = [int(token) for token, _ in steps]
    assert list(model.generate([3, 14, 15], 8).tokens) == expected


def test_interventions_act_on_prompt_and_answer_alike() -> None:
    model = tiny("qwen3_moe")
    change = {"layers.0.mlp.output": add_vector(VECTOR, 4.0)}
    answer = model.generate([3, 14, 15], 6, change)
    # Slow twin: the whole text again for each token, with the same change.
    ids = [3, 14, 15]
    for _ in range(6):
        with model.trace(ids) as t:
            t.layers[0].mlp.output = add_vector(VECTOR, 4.0)
            logits = t.output.save(positions=-1)
        ids.append(int(mx.argmax(logits.value[0]).item()))
    assert list(answer.tokens) == ids[3:]
    assert answer.tokens != model.generate([3, 14, 15], 6).tokens
    assert model.generate([3, 14, 15], 6).tokens == model.generate([3, 14, 15], 6).tokens


def test_positions_of_an_answer_count_on_and_negative_ones_from_the_end_of_the_prompt() -> None:
    model = tiny("llama")
    with model.trace([3, 14, 15], max_tokens=4) as t:
        t.layers[0].residual = compose(zero_out(positions=-1), zero_out(positions=4))
        saved = t.layers[0].residual.save()
        last = t.layers[0].residual.save(positions=-1)
        fifth = t.layers[0].residual.save(positions=4)
    assert [a.shape[1] for a in saved.values] == [3, 1, 1, 1]
    zero = [not np.array(a)[0, i].any() for a in saved.values for i in range(a.shape[1])]
    assert zero == [False, False, True, False, True, False]
    assert len(last.values) == len(fifth.values) == 1
    assert not np.array(last.value).any()
    assert t.generated is not None
    assert len(t.generated.tokens) == 4


def test_a_route_is_forced_at_every_step_of_an_answer() -> None:
    model = tiny("qwen3_moe")
    with model.trace([3, 14, 15], max_tokens=5) as t:
        t["layers.*.router"] = force_route([7])
        seen = t["layers.*.router.choice"].save()
    for one in seen:
        assert len(one.values) == 5
        assert all((np.array(a) == 7).any(-1).all() for a in one.values)
