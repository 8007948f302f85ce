"""Activations of many prompts: the same in batches, alone, in memory and on disk."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import load_file
from tracing_rigs import tiny

from mlxfun.errors import SaveError, UsageError
from mlxfun.tracing.activations import (
    Work,
    batch_get_activations,
    batches,
    get_activations,
    run_prompts,
)

PROMPTS = [[3, 14, 15], [5, 6, 7, 8, 9, 10], [11], [1, 2, 3, 4], [9, 8]]


def alone(model, prompt: list[int], name: str) -> np.ndarray:
    with model.trace(prompt) as t:
        saved = t[name].save()
    return np.array(saved)[0]


def test_activations_are_those_of_each_prompt_alone_in_the_order_of_the_prompts() -> None:
    model = tiny("qwen3_moe")
    found = get_activations(model, PROMPTS, [0, 1], work=Work(8))
    assert list(found) == ["layers.0.residual", "layers.1.residual"]
    assert found[1].shape == (5, 32)
    for row, prompt in enumerate(PROMPTS):
        expected = alone(model, prompt, "layers.1.residual")[-1]
        assert np.allclose(np.array(found[1])[row], expected, atol=1e-4)


def test_several_positions_and_all_of_them() -> None:
    model = tiny("llama")
    some = get_activations(model, PROMPTS, [1], positions=[0, -1])
    everything = get_activations(model, PROMPTS, [1], positions=None, work=Work(7))
    assert some[1].shape == (5, 2, 32)
    assert everything[1].shape == (16, 32)
    assert everything.rows is not None
    for (prompt, at), row in zip(everything.rows.tolist(), np.array(everything[1]), strict=True):
        assert np.allclose(row, alone(model, PROMPTS[prompt], "layers.1.residual")[at], atol=1e-4)


@pytest.mark.parametrize("positions", [-1, [0, -1], None])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_file_holds_what_memory_would(tmp_path, positions, dtype) -> None:
    model = tiny("llama")
    model.parts.model.set_dtype(dtype)
    names = ["layers.*.residual", "layers.1.mlp.output"]
    held = get_activations(model, PROMPTS, names, positions, Work(8))
    path = tmp_path / "some.safetensors"
    saving = batch_get_activations(
        model, PROMPTS, path, names, positions, Work(8, made_on={"state": "x"})
    )
    stored, said = mx.load(str(path), return_metadata=True)
    assert said["state"] == "x"
    assert set(saving.names) == set(held)
    for name, values in held.items():
        assert stored[name].dtype == dtype
        assert mx.array_equal(stored[name], values)
    if positions is None:
        assert np.array_equal(np.array(stored["rows"]), held.rows)
    if dtype == mx.float32:
        assert set(load_file(path)) == set(stored)  # others read it too


def test_a_failure_leaves_the_file_that_was_there(tmp_path) -> None:
    model = tiny("llama")
    path = tmp_path / "some.safetensors"
    batch_get_activations(model, PROMPTS, path, [0])
    before = path.read_bytes()
    with pytest.raises(UsageError, match="shortest prompt has 1 tokens"):
        batch_get_activations(model, PROMPTS, path, [0], positions=3)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["some.safetensors"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveError):
        batch_get_activations(model, PROMPTS, tmp_path / "file" / "a.safetensors", [0])


def test_batches_hold_a_bounded_number_of_padded_tokens() -> None:
    rows = [[0] * n for n in (5, 1, 9, 2, 2, 30, 4)]
    made = batches(rows, 10)
    assert sorted(i for batch in made for i in batch) == list(range(7))
    for batch in made:
        assert len(batch) == 1 or len(batch) * max(len(rows[i]) for i in batch) <= 10


def test_what_has_no_row_for_each_token_is_refused() -> None:
    model = tiny("qwen3_moe")
    for name in ("layers.0.experts.1.output", "layers.0.attn.weights"):
        with pytest.raises(UsageError, match="save it in a trace"):
            get_activations(model, PROMPTS, [name])


def test_predictions_are_the_most_probable_next_tokens() -> None:
    model = tiny("llama")
    found = run_prompts(model, PROMPTS, 3, Work(8))
    assert [list(one.prompt) for one in found] == PROMPTS
    for one in found:
        logits = model.parts.model(mx.array([list(one.prompt)]))[0, -1]
        chances = np.array(mx.softmax(logits))
        assert [token for token, _, _ in one.tokens] == np.argsort(-chances)[:3].tolist()
        assert np.allclose([p for _, _, p in one.tokens], np.sort(chances)[::-1][:3], atol=1e-5)
