"""--miss skip: experts that are not in memory are left out while decoding, and nothing else is."""

from __future__ import annotations

from pathlib import Path
from time import sleep
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from mlx_lm.models.cache import make_prompt_cache
from slot_rigs import PROMPT, Slotted, logits, on_disk, whole_model

from commands.engine import Engine
from mlxfun import Session
from mlxfun.checkpoint.options import LoadOptions
from mlxfun.errors import UsageError
from mlxfun.events import JobEnded
from mlxfun.generation.options import GenerateOptions
from mlxfun.hooks.routers import without_absent
from mlxfun.hooks.routing import Taps
from mlxfun.model.anatomy.discover import discover
from mlxfun.model.live_experts import LiveExperts


def test_weights_of_absent_experts_go_to_the_others() -> None:
    weights = mx.array([[0.5, 0.3, 0.2], [0.6, 0.3, 0.1], [0.2, 0.3, 0.5]])
    present = mx.array([[True, False, True], [True, True, True], [False, False, False]])
    found = np.array(without_absent(weights, present))
    assert np.allclose(found[0], [0.5 / 0.7, 0, 0.2 / 0.7])
    assert np.allclose(found[1], [0.6, 0.3, 0.1])
    assert not found[2].any()


def opened(path: Path, slots: int) -> tuple[Slotted, Taps]:
    some = Slotted.open(path, slots, miss="skip")
    anatomy = discover(
        some.model, {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2}
    )
    taps = Taps(some.model, anatomy, [LiveExperts(layer) for layer in anatomy.layers])
    taps.attach()
    some.slots.leave_out(taps.layers)
    return some, taps


def block_without(model: Any, layer: int, held: set[int], x: Any) -> Any:
    """The MoE block of a whole Qwen3 model with only some experts, expert by expert."""
    block = model.model.layers[layer].mlp
    gates = np.array(mx.softmax(block.gate(x), axis=-1, precise=True))[0, 0]
    chosen = np.argsort(-gates)[: block.top_k]
    weights = gates[chosen] / (gates[chosen].sum() if block.norm_topk_prob else 1)
    whole = weights.sum()
    kept = np.array([w if e in held else 0.0 for e, w in zip(chosen, weights, strict=True)])
    kept *= whole / kept.sum()
    out = np.zeros(x.shape[-1])
    for e, w in zip(chosen.tolist(), kept, strict=True):
        y = block.switch_mlp(x, mx.array([[[e]]]))
        out += w * np.array(y)[0, 0, 0].astype(np.float64)
    return out


def test_a_block_without_the_absent_experts(tmp_path: Path) -> None:
    model, config = tiny_models.build("qwen3_moe")
    path = on_disk(tmp_path, model, config)
    whole, (some, taps) = whole_model(path), opened(path, 3)
    layer = some.slots.layers[0]
    logits(some.model, [PROMPT])  # the prompt fills the slots
    rng, seen = np.random.default_rng(0), 0
    block = dict(some.model.named_modules())[taps.layers[0].layer.block]
    for _ in range(40):
        held = set(layer.bank.resident)
        x = mx.array(rng.standard_normal((1, 1, 32)).astype(np.float32))
        before = layer.counts.skipped
        y = np.array(block(x))[0, 0]
        if layer.counts.skipped == before:
            continue
        seen += 1
        assert set(layer.bank.resident) == held  # nothing was read
        at = some.partly.layers[0].index
        assert np.allclose(y, block_without(whole, at, held, x), atol=1e-5)
    assert seen > 5
    taps.detach()
    some.close()


def test_a_prompt_is_read_whole(tmp_path: Path) -> None:
    model, config = tiny_models.build("qwen3_moe")
    path = on_disk(tmp_path, model, config)
    some, taps = opened(path, 2)
    assert np.array_equal(logits(some.model, [PROMPT]), logits(whole_model(path), [PROMPT]))
    cache = make_prompt_cache(some.model)
    some.model(mx.array([PROMPT]), cache=cache)
    reads = some.slots.report().bytes_read
    for token in range(20):
        mx.eval(some.model(mx.array([[token]]), cache=cache))
    report = some.slots.report()
    assert report.skipped > 0
    per_token = (report.bytes_read - reads) / 20
    assert per_token < some.slots.slot_bytes  # only where a token had no expert at all
    taps.detach()
    some.close()


def test_families_whose_weights_are_applied_elsewhere_refuse(tmp_path: Path) -> None:
    model, config = tiny_models.build("llama4")
    some = Slotted.open(on_disk(tmp_path, model, config), 2, miss="skip")
    anatomy = discover(some.model, config)
    taps = Taps(some.model, anatomy, [LiveExperts(layer) for layer in anatomy.layers])
    with pytest.raises(UsageError, match="llama4 applies the experts' weights"):
        some.slots.leave_out(taps.layers)
    some.close()


def test_every_report_names_it() -> None:
    session = Session.open("demo", LoadOptions(capacity=3, miss="skip"))
    session.chat("What is a mortgage?", GenerateOptions(max_tokens=12))
    report = session.residency()
    assert report.skipped > 0
    assert f"LEFT OUT, {report.skipped} so far" in report.summary()
    assert any("LEFT OUT" in note for note in session.info().notes)
    session.close()


def test_reports_of_every_command_name_it() -> None:
    reports: list[Any] = []
    engine = Engine()
    engine.subscribe(lambda e: reports.append(e.report) if isinstance(e, JobEnded) else None)
    for line in (
        "load demo --capacity 3 --miss skip",
        "evaluate --dataset demo:eval --max-samples 2",
    ):
        engine.run(line)
    while len(reports) < 2:
        sleep(0.01)
    engine.close()
    assert all("LEFT OUT" in report.caveat for report in reports)
    assert "LEFT OUT" in reports[1].data()["caveat"]


def test_nothing_is_left_out_unless_it_is_asked_for() -> None:
    session = Session.open("demo", LoadOptions(capacity=3))
    session.chat("What is a mortgage?", GenerateOptions(max_tokens=12))
    assert session.residency().skipped == 0
    assert "LEFT OUT" not in session.residency().summary()
    session.close()
