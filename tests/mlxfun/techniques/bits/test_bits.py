"""Bits per module: sensitivities against plain gradients and measured KL, the choice against all
choices, and the saved model against what stock mlx_lm loads.
"""

from __future__ import annotations

import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load
from scipy.stats import spearmanr

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.checkpoint.bits_plan import BitsPlan, read_bits
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.context import Context
from mlxfun.data.datasets import batches
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.techniques.bits import choose
from mlxfun.techniques.bits.fisher import Fisher
from mlxfun.techniques.bits.knapsack import solve
from mlxfun.techniques.bits.options import BitsOptions
from mlxfun.techniques.bits.prices import candidates, errors_of, expected_kl, packed_size
from mlxfun.techniques.prune.options import PruneOptions
from tests.mlxfun import tiny_checkpoints as tiny

DATA = DatasetOptions("demo:mixed", max_samples=8, max_tokens=32)
TOKENS = mx.array([[3, 14, 15, 9, 26, 5, 35]])


@pytest.fixture(scope="module")
def demo():
    session = Session.open("demo")
    session.collect(CollectOptions(DATA))
    yield session
    session.close()


@pytest.fixture
def session(demo: Session) -> Session:
    demo.goto(0)
    return demo


# -- the choice -------------------------------------------------------------------------------


def test_the_choice_is_the_best_of_all_choices() -> None:
    rng = np.random.default_rng(0)
    for _ in range(8):
        sizes = [{b: int(rng.integers(1, 9)) * b for b in (2, 3, 4, 8)} for _ in range(4)]
        costs = [{b: float(rng.random() * 4.0**-b) for b in (2, 3, 4, 8)} for _ in range(4)]
        budget = int(rng.integers(60, 120))
        every = [
            (sum(c[b] for c, b in zip(costs, one, strict=True)), one)
            for one in product((2, 3, 4, 8), repeat=4)
            if sum(s[b] for s, b in zip(sizes, one, strict=True)) <= budget
        ]
        if not every:
            with pytest.raises(PlanError, match="with the fewest bits"):
                solve(costs, sizes, budget)
            continue
        found = solve(costs, sizes, budget).chosen
        assert sum(s[b] for s, b in zip(sizes, found, strict=True)) <= budget
        cost = sum(c[b] for c, b in zip(costs, found, strict=True))
        assert cost == pytest.approx(min(every)[0], rel=1e-3)


# -- sensitivities ----------------------------------------------------------------------------


def likeliest(logits: mx.array, key: Any = None) -> mx.array:
    return mx.argmax(logits, axis=-1)


PATHS = [
    "model.embed_tokens",
    "model.layers.0.self_attn.o_proj",
    "model.layers.1.mlp.switch_mlp.down_proj",
    "lm_head",
]


@pytest.mark.parametrize("length", [20, 48], ids=["unsorted", "sorted"])
def test_the_sums_are_the_squared_gradient_of_the_weights_times_the_squared_errors(
    rig, monkeypatch, length
) -> None:
    monkeypatch.setattr(mx.random, "categorical", likeliest)
    r = rig("qwen3_moe")
    sequence = np.random.default_rng(0).integers(1, 61, length).astype(np.int32)
    modules = r.resident.tree.modules
    errors = {
        p: [mx.random.uniform(shape=modules[p]["weight"].shape) for _ in range(2)] for p in PATHS
    }
    fisher = Fisher(r, PATHS, errors.__getitem__)
    sums = fisher.sums(batches([sequence], 64, 1)[0], mx.random.key(0))

    def loss(weights: dict[str, mx.array]) -> mx.array:
        for path, weight in weights.items():
            modules[path]["weight"] = weight
        logits = r.model(mx.array(sequence)[None])[0, :-1].astype(mx.float32)
        label = mx.argmax(mx.stop_gradient(logits), axis=-1)[:, None]
        return mx.sum(mx.logsumexp(logits, -1) - mx.take_along_axis(logits, label, -1)[:, 0])

    slopes = mx.grad(loss)({path: modules[path]["weight"] for path in PATHS})
    for path in PATHS:
        expected = [float(mx.sum(mx.square(slopes[path]) * error)) for error in errors[path]]
        assert np.array(sums[path]) == pytest.approx(expected, rel=2e-3), path


def test_expected_kl_ranks_modules_and_bits_as_measured_kl_does(session) -> None:
    options = BitsOptions(to_bytes=2_000_000)
    workspace = session._workspace
    found = [c for c in candidates(workspace, options) if c.layout is None]
    text = workspace.calibration
    paths = [c.path for c in found]
    fisher = Fisher(workspace, paths, lambda path: errors_of(workspace, path, options))
    todo = choose._equally_long(text)
    parts = [fisher.sums(one, mx.random.key(n)) for n, one in enumerate(todo)]
    sums = parts[0]
    for part in parts[1:]:
        sums = {path: s + part[path] for path, s in sums.items()}
    tokens = sum(len(s) - 1 for s in text)
    costs = [expected_kl(one, sums, tokens, options) for one in found]
    work = choose._Choosing(workspace, options, Context())
    work._found = found
    costs = work._corrected(costs, text)
    data = choose.EvalSet("text", tuple(text))
    teacher = workspace.evaluator.reference(("checkpoint", ""), data)
    expected, measured = [], []
    for number, one in enumerate(found[::3]):
        bits = (2, 3, 4)[number % 3]
        expected.append(costs[3 * number][bits])
        with choose.packed_as(workspace, [one], [bits], 64):
            _, (kl,) = workspace.evaluator.compare(
                data, [teacher], [partial(session.editor.live, "base")]
            )
        measured.append(float(kl.kl.mean()))
    assert len(expected) >= 12
    assert spearmanr(expected, measured).statistic > 0.9
    ratio = np.log(np.array(expected) / np.array(measured))
    assert np.abs(ratio).max() < np.log(4), "they are near in nats as well"


# -- the plan ---------------------------------------------------------------------------------


def files_bytes(path: Path) -> int:
    """Of all tensors, from the header of the one file that a small model is."""
    (file,) = path.glob("*.safetensors")
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header.pop("__metadata__", None)
    return sum(end - begin for begin, end in (one["data_offsets"] for one in header.values()))


def test_stock_loading_opens_the_plan_with_the_size_and_the_outputs_that_were_promised(
    session, tmp_path
) -> None:
    session.prune(PruneOptions(n_prune=2))
    session.apply(ApplyOptions())
    plan, report = session.bits(BitsOptions(to_bytes=1_500_000, choices=(2, 3, 4, 6)))
    assert report.bytes == plan.bytes <= 1_500_000
    assert report.kl_before < report.kl_after
    assert {row.least for row in report.rows} != {row.most for row in report.rows}
    plan.write(tmp_path / "bits.json")
    plan = read_bits(tmp_path / "bits.json")
    saved = session.save(SaveOptions(tmp_path / "m", bits=plan))
    assert saved.quantization is not None
    assert "bits by module, affine, groups of 64" in saved.quantization
    assert files_bytes(tmp_path / "m") == plan.bytes
    settings = json.loads((tmp_path / "m" / "config.json").read_text())["quantization"]
    assert {p: s["bits"] for p, s in settings.items() if isinstance(s, dict)} == dict(plan.bits)
    stock = load(str(tmp_path / "m"))[0]
    stock.set_dtype(mx.float32)
    found = [c for c in candidates(session._workspace, BitsOptions(0)) if c.name in plan.bits]
    with choose.packed_as(session._workspace, found, [plan.bits[c.name] for c in found], 64):
        ours = session.model(TOKENS)
        mx.eval(ours)
    assert mx.allclose(stock(TOKENS), ours, atol=2e-2)
    assert not mx.allclose(session.model(TOKENS), ours, atol=0.1), "packing changes something"


def test_more_bytes_cost_less_and_equal_bytes_less_than_uniform_bits(session) -> None:
    _, small = session.bits(BitsOptions(to_bytes=1_500_000))
    uniform = next(one for one in small.uniform if one.bits == 4)
    _, large = session.bits(BitsOptions(to_bytes=uniform.bytes))
    assert large.expected_kl < small.expected_kl
    assert large.expected_kl < 0.9 * uniform.expected_kl
    assert large.kl_after < small.kl_after


def test_a_family_with_parts_that_are_not_covered_keeps_them_safe(tmp_path) -> None:
    session = Session.open(
        tiny.write(tmp_path / "m", tiny.DEEPSEEK_V3 | {"qk_nope_head_dim": 32, "kv_lora_rank": 32})
    )
    session.collect(CollectOptions(DatasetOptions("demo:mixed", max_samples=3, max_tokens=16)))
    plan, report = session.bits(BitsOptions(to_bytes=700_000, group_size=32, choices=(2, 4, 8)))
    routers = [layer.logits for layer in session.anatomy.layers]
    heads = [p for p in plan.bits if p.endswith(("embed_q", "unembed_out"))]
    assert len(heads) == report.fixed == 4
    assert all(plan.bits[path] == 8 for path in heads)
    assert all(plan.bits.get(path, 16) >= 8 for path in routers)
    session.save(SaveOptions(tmp_path / "out", bits=plan))
    assert files_bytes(tmp_path / "out") == plan.bytes
    session.close()


def test_a_plan_of_other_weights_is_taken_only_knowingly(session, tmp_path) -> None:
    found = candidates(session._workspace, BitsOptions(0))
    plan = BitsPlan(session.state, 64, {one.name: 8 for one in found}, 0, 0.0)
    session.prune(PruneOptions(n_prune=2))
    session.apply(ApplyOptions())
    with pytest.raises(StateError, match=r"measured on state .*run bits again, or .*--allow-stale"):
        session.save(SaveOptions(tmp_path / "m", bits=plan))
    assert not (tmp_path / "m").exists()
    session.save(SaveOptions(tmp_path / "m", bits=plan, allow_stale=True))
    session.goto(0)


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        (BitsOptions(10**6, choices=(7,)), UsageError, "--choices 7: choose among"),
        (BitsOptions(10**6, group_size=48), UsageError, "group size 48"),
        (BitsOptions(10**5), PlanError, "with the fewest bits"),
    ],
)
def test_what_cannot_be_is_refused_ahead_of_the_work(session, options, error, said) -> None:
    with pytest.raises(error, match=said):
        session.bits(options)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "mlxfun bits 1", "bits": {"a": "4"}}', "\x00"]
)
def test_a_file_that_is_no_plan_is_refused(text, tmp_path) -> None:
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UsageError, match=r"bits --to-bytes SIZE"):
        read_bits(tmp_path / "p.json")


def test_packed_sizes_are_those_of_mlx() -> None:
    weight = mx.zeros((3, 8, 128), mx.bfloat16)
    for bits in (2, 3, 4, 5, 6, 8):
        for group in (32, 64, 128):
            made = mx.quantize(weight, group_size=group, bits=bits)
            assert packed_size(weight.shape, bits, group, 2) == sum(a.nbytes for a in made)


def test_a_dense_model_is_packed_too(tmp_path) -> None:
    config = {**tiny.COMMON, "model_type": "llama"}
    session = Session.open(tiny.write(tmp_path / "m", config))
    data = DatasetOptions("demo:mixed", max_samples=3, max_tokens=16)
    plan, _ = session.bits(BitsOptions(75_000, data=data))
    session.save(SaveOptions(tmp_path / "out", bits=plan))
    assert files_bytes(tmp_path / "out") == plan.bytes <= 75_000
    session.close()
