"""Traces as a person writes them: names, order, errors, batches, and what a trace leaves behind."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from tracing_rigs import TOKENS, bits, classes, tiny

from mlxfun import Model, Session
from mlxfun.errors import HookError, MlxfunError, StateError, UsageError
from mlxfun.hooks.attention import AttentionTaps
from mlxfun.tracing.interventions import add_vector, force_route, zero_out


@pytest.fixture(scope="module")
def demo() -> Model:
    return Model.open("demo")


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    opened = Session.open("demo")
    yield opened
    opened.close()


def test_the_first_example_runs_as_it_is_written(demo: Model) -> None:
    model = demo
    with model.trace("The capital of France is") as t:
        attention = model.layers[3].attn.output.save()
        experts = model.layers[3].experts[7].output.save()
        model.layers[4].mlp.output = 0.0
        logits = model.output.save()
    assert attention.shape == (1, 8, 128)
    assert experts.shape == (len(experts.tokens), 128)
    assert logits.shape == (1, 8, 4096)
    assert t.tokens == [model.parts.tokenizer.encode("The capital of France is")]
    with model.trace("The capital of France is"):
        plain = model.output.save()
        same = model.layers[3].attn.output.save()
    assert not np.allclose(np.array(plain), np.array(logits))
    assert np.array_equal(np.array(same), np.array(attention))


def test_the_order_of_asking_does_not_matter(demo: Model) -> None:
    with demo.trace("one two three") as t:
        late, early = t.layers[5].residual.save(), t.layers[0].attn.output.save()
        t.layers[0].mlp.output = 0.0
        between = t.layers[0].mlp.output.save()
    with demo.trace("one two three") as t:
        between_2 = t.layers[0].mlp.output.save()
        t.layers[0].mlp.output = 0.0
        early_2, late_2 = t.layers[0].attn.output.save(), t.layers[5].residual.save()
    for one, other in ((late, late_2), (early, early_2), (between, between_2)):
        assert bits(one.value) == bits(other.value)
    assert not np.array(between).any()  # saved as it leaves, edits included


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("layers.3.attn.outptu", "layers.3.attn.output"),
        ("layers.99.residual", "0 to"),
        ("layers.3.experts.77.output", "16 experts, 0 to 15"),
        ("layers.3.experts.7.up", "an order of their own"),
        ("layers.3.mlp.gate", "layers.3.mlp"),
        ("model.layers.3.self_atn", "model.layers.3.self_attn"),
        ("layers.x.residual", "names no layers"),
        ("hed", "near are"),
    ],
)
def test_a_name_that_leads_nowhere_is_an_error_with_near_names(
    demo: Model, name: str, words: str
) -> None:
    with pytest.raises(UsageError, match=words), demo.trace("a") as t:
        t[name].save()


def test_attributes_that_lead_nowhere_are_errors_where_they_are_written(demo: Model) -> None:
    with pytest.raises(UsageError, match=r"near are layers\.3\.attn"):
        _ = demo.layers[3].atn
    assert not hasattr(demo.layers[3], "atn")
    with pytest.raises(UsageError, match="no value"), demo.trace("a") as t:
        t.layers[3].atn = 0.0
    with pytest.raises(StateError, match="no trace is open"):
        demo.layers[3].attn.output.save()


def test_what_no_forward_reaches_is_an_error_and_not_an_empty_value() -> None:
    model = tiny("iquestloopcoder")
    with pytest.raises(HookError, match=r"reach layers\.0\.residual"), model.trace(TOKENS) as t:
        t.layers[0].residual.save()
    with pytest.raises(HookError, match="did not reach"), model.trace(TOKENS) as t:
        t.layers[0].residual = 0.0


def test_a_value_is_there_after_the_block_and_not_before(demo: Model) -> None:
    with demo.trace("a b") as t:
        one = t.norm.save()
        with pytest.raises(StateError, match="after the `with` block"):
            _ = one.value
    assert one.value.shape == (1, 2, 128) or one.value.ndim == 3
    with pytest.raises(StateError, match="the trace is over"):
        t.norm.save()


def test_a_block_that_fails_runs_nothing_and_leaves_nothing(demo: Model) -> None:
    own = classes(demo.parts.model)
    t = demo.trace("a")
    saved = t.norm.save()
    t.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    assert not saved.reached
    with pytest.raises(MlxfunError), demo.trace("a b c") as t:
        t.layers[2].mlp.output = mx.ones((7,))  # fails inside the forward
    assert classes(demo.parts.model) == own
    assert not AttentionTaps(demo.parts.modules, {}, {}).active()


def test_module_paths_and_their_inputs_are_names_as_well(demo: Model) -> None:
    path = "model.layers.3.self_attn.o_proj"
    with demo.trace("a b c") as t:
        inside, outside = t[f"{path}.input"].save(), demo[path].save()
        same = t.layers[3].attn.output.save()
        stream, before = t.layers[4].input.save(), t.layers[3].residual.save()
        direct = demo.model.layers[3].self_attn.o_proj.save()
    weight = np.array(demo.parts.modules[path].weight)
    assert np.allclose(np.array(inside) @ weight.T, np.array(outside), atol=1e-4)
    assert bits(same.value) == bits(outside.value) == bits(direct.value)
    assert bits(stream.value) == bits(before.value)


def test_several_layers_by_one_name(demo: Model) -> None:
    with demo.trace("a b c") as t:
        all_of_them = t["layers.*.residual"].save()
        some = demo.layers[1:4].residual.save()
        demo.layers[2:4].mlp.output = 0.0
        zeros = t["layers.2-3.mlp.output"].save()
    assert [one.name for one in some] == [f"layers.{i}.residual" for i in (1, 2, 3)]
    assert len(all_of_them) == demo.parts.names.layers
    assert not any(np.array(one).any() for one in zeros)


def test_augmented_assignment_is_an_intervention(demo: Model) -> None:
    with demo.trace("a b c") as t:
        plain = t.layers[2].attn.output.save()
    with demo.trace("a b c") as t:
        t.layers[2].attn.output *= 2
        doubled = t.layers[2].attn.output.save()
    with demo.trace("a b c") as t:
        t.layers[2].attn.output += np.ones(128)
        shifted = t.layers[2].attn.output.save()
    assert np.allclose(np.array(doubled), 2 * np.array(plain))
    assert np.allclose(np.array(shifted), np.array(plain) + 1, atol=1e-6)


def test_a_dry_run_gives_shapes_and_evaluates_nothing(demo: Model) -> None:
    shapes = demo.dry_run("a b c d")
    length = len(demo.parts.tokenizer.encode("a b c d"))
    assert shapes["layers.2.attn.weights"].shape == (1, 4, length, length)
    assert shapes["layers.2.experts.0.output"].shape == (-1, 128)
    assert shapes["output"].dtype == mx.float32
    with demo.trace("a b c d", dry_run=True) as t:
        one = t.layers[2].attn.weights.save(heads=[0, 3], positions=-1)
    assert one.shape == (1, 2, length)
    with pytest.raises(StateError, match="dry run"):
        _ = one.value


def test_saving_an_early_layer_computes_no_later_one(demo: Model) -> None:
    ids = [list(range(5, 261))]

    def peak(name: str) -> int:
        with demo.trace(ids) as t:
            saved = t[name].save(positions=-1)
            before = mx.get_active_memory()
            mx.reset_peak_memory()
        assert saved.reached
        return mx.get_peak_memory() - before

    peak("embed")
    assert peak("layers.0.input") < 0.2 * peak("layers.0.mlp.output") < 0.3 * peak("output")


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_values_keep_the_dtype_of_the_model_whatever_they_are_changed_with(dtype) -> None:
    model = tiny("llama")
    model.parts.model.set_dtype(dtype)
    with model.trace(TOKENS) as t:
        t.layers[0].mlp.output = add_vector(np.ones(32))
        t.layers[1].attn.weights = lambda w: w.astype(mx.float32) * 0.5
        t.layers[2].residual = mx.zeros((32,), mx.float32)
        saved = [
            t[n].save() for n in ("layers.0.residual", "layers.1.attn.output", "norm", "output")
        ]
    assert [one.dtype for one in saved] == [dtype] * 4


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "deepseek_v3", "gpt_oss", "mamba2", "gemma3_text", "qwen3_next", "lfm2_moe"])  # fmt: skip
@pytest.mark.parametrize("padding", ["left", "right"])
def test_the_last_position_of_a_padded_batch_is_the_last_real_token(name: str, padding) -> None:
    model = tiny(name)
    prompts = [[3, 14, 15], [5, 6, 7, 8, 9, 10], [11]]
    names = ["layers.0.residual", "layers.1.mlp.output", "norm", "output"]
    names = [n for n in names if n in model.names()]
    with model.trace(prompts, padding=padding) as t:
        together = {n: t[n].save(positions=-1) for n in names}
        second = t.output.save(positions=[0, -1])
    for row, prompt in enumerate(prompts):
        with model.trace(prompt) as t:
            alone = {n: t[n].save() for n in names}
        for n in names:
            assert np.allclose(np.array(together[n])[row], np.array(alone[n])[0, -1], atol=2e-4), n
        assert np.allclose(np.array(second)[row, 0], np.array(alone["output"])[0, 0], atol=2e-4)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_experts_serve_no_padding(padding) -> None:
    model = tiny("qwen3_moe")
    prompts = [[3, 14, 15], [5, 6, 7, 8, 9, 10]]
    with model.trace(prompts, padding=padding) as t:
        both = [t.layers[0].experts[e].output.save() for e in range(8)]
    served = sorted(tuple(row) for one in both for row in one.tokens.tolist())
    assert served == sorted((row, at) for row, p in enumerate(prompts) for at in range(len(p))
                            for _ in range(2))  # fmt: skip


def test_positions_that_a_prompt_does_not_have_are_refused() -> None:
    model = tiny("llama")
    for wrong in (3, -4):
        t = model.trace([[1, 2, 3], [1, 2, 3, 4]])
        with pytest.raises(UsageError, match="the shortest prompt has 3 tokens"), t:
            t.norm.save(positions=wrong)
    with pytest.raises(UsageError, match="heads cannot be chosen"), model.trace([1, 2]) as t:
        t.norm.save(heads=[0])
    with pytest.raises(UsageError, match="there is no head 9"), model.trace([1, 2]) as t:
        t.layers[0].attn.heads = zero_out(heads=[9])


@pytest.mark.parametrize(
    ("prompt", "words"),
    [([], "empty"), ("", "empty"), ([[1], []], "empty"), ([-1, 2], "negative"),
     ([1, 4_000_000], "the model knows"), (mx.array([0.5]), "no token ids")],
)  # fmt: skip
def test_prompts_that_are_none_are_refused(prompt, words: str) -> None:
    with pytest.raises(MlxfunError, match=words):
        tiny("llama").trace(prompt)


def test_traces_nest_and_the_model_is_as_it_was_after_them(demo: Model) -> None:
    own = classes(demo.parts.model)
    with demo.trace("a b c"):
        outer = demo.layers[0].attn.weights.save()
        with demo.trace("a b"):
            demo.layers[0].attn.weights = lambda w: w * 0
            inner = demo.layers[0].attn.output.save()
        late = demo.layers[0].attn.output.save()
    assert not np.array(inner).any()
    assert np.array(late).any()
    assert np.allclose(np.array(outer).sum(-1), 1, atol=1e-5)
    assert classes(demo.parts.model) == own


def test_taps_in_attention_nest_and_are_taken_off_in_any_order(demo: Model) -> None:
    path = demo.parts.names.point("layers.0.attn.weights").path
    place = sys.modules[type(demo.parts.modules[path]).__module__]
    own, seen = place.scaled_dot_product_attention, []

    def taps(number: int) -> AttentionTaps:
        look = {path: lambda _, w: (seen.append(number), w)[1]}
        return AttentionTaps(demo.parts.modules, look, {path: {"heads"}})

    one, two = taps(1), taps(2)
    one.__enter__()
    two.__enter__()
    demo.parts.forward(mx.array([[5, 6]]))
    one.__exit__(None, None, None)
    demo.parts.forward(mx.array([[5, 6]]))
    assert place.scaled_dot_product_attention is not own
    two.__exit__(None, None, None)
    demo.parts.forward(mx.array([[5, 6]]))
    assert place.scaled_dot_product_attention is own
    assert seen == [1, 2, 2]


def test_attention_over_a_cache_is_seen_with_all_its_keys() -> None:
    model = tiny("llama")
    module = model.parts.model
    with model.trace([3, 14, 15, 9]) as t:
        whole = t.layers[1].attn.weights.save()
    cache = make_prompt_cache(module)
    module(mx.array([[3, 14, 15]]), cache=cache)
    seen: list[mx.array] = []
    path = model.parts.names.point("layers.1.attn.weights").path
    taps = AttentionTaps(model.parts.modules, {path: lambda _, w: (seen.append(w), w)[1]},
                         {path: {"weights"}})  # fmt: skip
    with taps:
        module(mx.array([[9]]), cache=cache)
    assert np.allclose(np.array(seen[0])[:, :, 0], np.array(whole)[:, :, 3], atol=1e-5)


def test_a_session_is_traced_on_its_live_side(session: Session) -> None:
    from mlxfun.techniques.prune.options import SelectOptions

    with session.trace("a b c") as t:
        before = t.layers[0].router.choice.save()
        logits = t.output.save()
    chosen = int(before.value[0, 0, 0].item())
    session.select(SelectOptions(drop={session.anatomy.layers[0].index: (chosen,)}))
    try:
        with session.trace("a b c") as t:
            after = t.layers[0].router.choice.save()
            others = t.layers[0].router.logits.save()
            candidate = t.output.save()
        with pytest.raises(UsageError, match="no live expert"), session.trace("a b c") as t:
            t.layers[0].router = force_route([chosen])
    finally:
        session.discard()
    assert chosen not in np.array(after).tolist()[0][0]
    assert others.shape[-1] == 15
    assert not np.array_equal(np.array(candidate), np.array(logits))
    with session.trace("a b c") as t:
        again = t.output.save()
    assert bits(again.value) == bits(logits.value)
