"""Slots: what is held, what is refused, and what a failure leaves behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx_lm.models import qwen3_moe
from slot_rigs import PROMPT, Slotted, cut_short, logits, on_disk, unstacked, whole_model

from mlxfun.errors import BudgetError, HookError, ModelError, UsageError
from mlxfun.memory.slots import bank, kernels
from mlxfun.memory.slots.choice import Usage
from mlxfun.memory.slots.partly import Partly
from mlxfun.memory.slots.slots import ExpertSlots
from mlxfun.model.parameters import flatten


def qwen(path: Path, **changes: Any) -> Path:
    model, config = tiny_models.build("qwen3_moe", **changes)
    return on_disk(path, model, config)


def test_the_stacks_take_no_memory_and_the_slots_what_they_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank, "MOST_WAITING", 0)
    model, config = tiny_models.build("qwen3_moe", hidden_size=256, moe_intermediate_size=512)
    path = on_disk(tmp_path, model, config)
    stacks = sum(a.nbytes for p, a in flatten(model.parameters()) if "switch_mlp" in p)
    rest = sum(a.nbytes for p, a in flatten(model.parameters())) - stacks
    del model
    mx.clear_cache()
    before = mx.get_active_memory()
    some = Slotted.open(path, 2)
    held = mx.get_active_memory() - before
    assert some.slots.nbytes == stacks // 4
    assert held < rest + stacks // 4 + (1 << 16)
    mx.reset_peak_memory()
    logits(some.model, [PROMPT])
    # One expert on its way; a write that copied the slots would hold them twice.
    work = mx.get_peak_memory() - before - rest - stacks // 4
    assert work < 1.2 * some.slots.layers[0].bank.expert_bytes
    some.close()


def test_a_slot_is_written_in_place() -> None:
    slots = mx.zeros((64, 256, 256))
    row = mx.ones((256, 256))
    mx.eval(slots, row)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    slots[7] = row
    mx.eval(slots)
    assert mx.get_peak_memory() - before < slots.nbytes // 4


def test_a_layer_that_would_run_on_placeholders_is_named(tmp_path: Path) -> None:
    some = Slotted.open(qwen(tmp_path), 3)
    some.close()
    short = Partly(some.partly.options)
    short.layers, short.sources = some.partly.layers[:-1], some.partly.sources[:-1]
    short.capacity, short.reader = 3, some.partly.reader
    with pytest.raises(HookError, match=f"{some.partly.layers[-1].experts} is not"):
        ExpertSlots(some.model, short)


def test_what_runs_on_a_placeholder_is_no_number(tmp_path: Path) -> None:
    """Not something that could be taken for an answer."""
    some = Slotted.open(qwen(tmp_path), 3)
    some.close()  # the hooks are off
    assert np.isnan(logits(some.model, [PROMPT])).all()


def test_a_file_that_changes_during_a_miss_fails_the_call_and_harms_nothing(
    tmp_path: Path,
) -> None:
    path = qwen(tmp_path)
    expected = logits(whole_model(path), [PROMPT])
    some = Slotted.open(path, 2)
    with (
        cut_short(path / "model-00001-of-00001.safetensors"),
        pytest.raises(ModelError, match="was changed since the model was loaded"),
    ):
        logits(some.model, [PROMPT])
    assert np.array_equal(logits(some.model, [PROMPT]), expected)
    assert np.array_equal(logits(some.model, [PROMPT]), expected)
    some.close()


def test_experts_that_are_changed_one_by_one_are_refused_in_a_sentence(tmp_path: Path) -> None:
    """As 8-bit floats are, which mlx-lm unpacks before it stacks them."""
    path = unstacked(qwen(tmp_path), {"mlp.switch_mlp.": "mlp.experts.{e}."})
    own = qwen3_moe.Model.sanitize

    def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return own(self, {k: v * 2 if ".experts." in k else v for k, v in weights.items()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen3_moe.Model, "sanitize", sanitize)
        with pytest.raises(ModelError, match="cannot be read one at a time; convert the model"):
            Slotted.open(path, 3)


def test_transposed_experts_are_not_taken_for_rows(tmp_path: Path) -> None:
    """Square matrices: no shape tells."""
    path = unstacked(
        qwen(tmp_path, hidden_size=32, moe_intermediate_size=32),
        {"mlp.switch_mlp.": "mlp.experts.{e}."},
    )
    own = qwen3_moe.Model.sanitize

    def sanitize(self: Any, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        turned = {k: v.T if ".experts." in k else v for k, v in weights.items()}
        return own(self, turned)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qwen3_moe.Model, "sanitize", sanitize)
        with pytest.raises(ModelError, match="cannot be read one at a time"):
            Slotted.open(path, 3)


def test_a_source_that_is_wrong_is_found_before_anything_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlxfun.memory.slots import partly, sources

    def shifted(*given: Any) -> Any:
        *others, last = sources.find_sources(*given)
        name, one = next(iter(last.stacks.items()))
        wrong = replace(one, places=(*one.places[:-1], one.places[0]))
        return (*others, replace(last, stacks={**last.stacks, name: wrong}))

    monkeypatch.setattr(partly, "find_sources", shifted)
    with pytest.raises(ModelError, match="is not what its bytes on disk say"):
        Slotted.open(qwen(tmp_path), 3)


def test_experts_in_a_list_stay_in_memory(tmp_path: Path) -> None:
    model, config = tiny_models.build("dbrx")
    with pytest.raises(ModelError, match="separate modules"):
        Slotted.open(on_disk(tmp_path, model, config), 3)


def test_dense_models_have_nothing_to_leave_on_disk(tmp_path: Path) -> None:
    model, config = tiny_models.build("llama")
    with pytest.raises(UsageError, match="has no experts"):
        Slotted.open(on_disk(tmp_path, model, config), 3)


def test_too_few_slots_for_a_token(tmp_path: Path) -> None:
    path = qwen(tmp_path)
    with pytest.raises(UsageError, match="--capacity 1"):
        Slotted.open(path, 1)
    with pytest.raises(BudgetError, match="at least"):
        Slotted.open(path, None, resident=1000)


def test_a_size_is_divided_among_the_layers(tmp_path: Path) -> None:
    path = qwen(tmp_path)
    some = Slotted.open(path, 4)
    size = some.partly.kept_bytes + some.slots.nbytes
    some.close()
    for extra, slots in ((0, 4), (-1, 3)):
        again = Slotted.open(path, None, resident=size + extra)
        assert again.partly.capacity == slots
        again.close()


def test_what_was_used_most_of_late_stays_and_ties_are_settled() -> None:
    usage = Usage(5, half_life=2)
    for used in (0, 0, 0, 3, 3):
        usage.note(np.bincount([used], minlength=5), 1)
    assert usage.ranked(range(5)) == [4, 2, 1, 0, 3]
    usage.seed(np.array([0, 1, 5, 1, 0]))
    assert usage.ranked(range(5)) == [4, 0, 3, 1, 2]


@pytest.mark.parametrize("choices", [64, 100, 511, 512, 4096])
@pytest.mark.parametrize("slots", [2, 9, 16, 17, 40, 127])
def test_parts_of_a_group_take_the_kernel_of_the_whole(
    choices: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule of Metal for packed experts, which no other device has."""
    monkeypatch.setattr(kernels, "_counts_experts", lambda packed: packed)
    experts = 128

    def dense(rows: int, stack: int) -> bool:
        return rows >= kernels.SORTED and rows // stack >= 4

    rows = np.arange(choices // 3)
    parts = list(kernels.pieces(rows, choices, experts, slots, True))
    assert np.array_equal(np.concatenate([part for part, _ in parts]), rows)
    for part, filled in parts:
        assert dense(len(filled), slots) == dense(choices, experts)
        assert np.array_equal(filled[: len(part)], part)
        assert set(filled) == set(part)


@pytest.mark.parametrize("choices", [7, 8, 40, 64])
def test_parts_of_a_group_take_the_kernel_of_the_whole_on_cuda(
    choices: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_counts_choices", lambda packed: packed)
    for _, filled in kernels.pieces(np.arange(3), choices, 16, 3, True):
        assert (len(filled) >= 8) == (choices >= 8)
        assert (len(filled) >= kernels.SORTED) == (choices >= kernels.SORTED)


def test_sorting_is_the_same_for_parts() -> None:
    rows = np.arange(5)
    assert [len(f) for _, f in kernels.pieces(rows, 63, 8, 3, False)] == [5]
    assert [len(f) for _, f in kernels.pieces(rows, 64, 8, 3, False)] == [64]
