"""A dense model through the engine: what it can do, and how commands on experts are refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load

from commands.registry import COMMANDS, command_of, rows
from tests.e2e.conftest import Shell
from tests.mlxfun import tiny_checkpoints

LLAMA = {**tiny_checkpoints.COMMON, "model_type": "llama"}
ABLITERATE = (
    "abliterate --harmful demo:harmful --harmless demo:harmless --max-samples 24 --answer-tokens 4"
)
REFUSALS = (
    "refusals --harmful demo:harmful --harmless demo:harmless --max-samples 4 --answer-tokens 4"
)
EVALUATE = "evaluate --dataset demo:eval --max-samples 4 --samples 0"

REFUSED = {
    "collect --dataset demo:mixed": "collect statistics of",
    "stats show": "keep statistics of",
    "stats save out.npz": "keep statistics of",
    "stats load in.npz": "load statistics of",
    "stats count on": "count",
    "stats reset": "keep statistics of",
    "why 0:1": "rank",
    "dossier 0:1 --dataset demo:eval": "look at",
    "safety-scan --harmful demo:harmful --benign demo:harmless --output r.json": "scan",
    "domain-scan --domain demo:code --general demo:mixed --domain-name code --output r.json": "scan",
    "prune --n-prune 1": "prune",
    "narrow --fraction 0.25": "narrow",
    "distil": "distil",
    "compress --to-bytes 1MB": "compress",
    "merge --n-prune 1 --dataset demo:mixed": "merge",
    "select --drop 0:1": "select",
    "steer --deactivate 0:1": "steer",
    "amplify --domain-map d.json": "amplify",
    "bake": "bake steering into",
    "compact": "compact",
    "export heatmap map.svg": "draw",
    "topics": "name topics of",
    "export topics t.csv": "name topics of",
}
"""Every command that needs experts: a line of it, and what it would do with them."""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoints.write(tmp_path_factory.mktemp("dense") / "llama", LLAMA)


@pytest.fixture(scope="module")
def loaded(path: Path) -> Iterator[Shell]:
    shell = Shell()
    shell.do(f"load {path}")
    yield shell
    shell.engine.close()


@pytest.fixture
def shell(loaded: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    """The model as loaded, in a directory with the files that lines read."""
    monkeypatch.chdir(tmp_path)
    for name in ("in.npz", "d.json"):
        Path(name).touch()
    view = loaded.engine.view()
    assert (view.plan, view.live, view.history and len(view.history.nodes)) == (None, "base", 1)
    return loaded


@pytest.mark.parametrize("line", REFUSED)
def test_what_needs_experts_is_refused_in_one_sentence(shell: Shell, line: str) -> None:
    sentence = f"llama is a dense model: it has no experts to {REFUSED[line]}"
    assert shell.refused(line) == sentence


OF_EXPERTS = {"plan save", "profile save", "profile load", "residency sweep"}
"""Refused with sentences of their own."""


def test_what_is_about_experts_in_memory_is_refused(shell: Shell) -> None:
    Path("in.json").write_text("{}")
    assert "has no experts" in shell.refused("profile save out.json")
    for line in ("profile load in.json", "residency sweep --capacity 2"):
        assert "the whole model is in memory" in shell.refused(line)


def test_what_is_refused_is_greyed_and_nothing_else(shell: Shell) -> None:
    greyed = {row.name for row in rows(shell.engine.view()) if "dense model" in row.reason}
    assert greyed == {command_of(line) for line in REFUSED} | OF_EXPERTS
    assert shell.refused("plan save keep.json") == (
        "there is no list to write: llama is a dense model: it has no experts"
    )
    assert {row.reason for row in rows(shell.engine.view()) if row.name == "apply"} == {
        "nothing is staged: run abliterate first"
    }
    assert len(greyed) < len(COMMANDS)


def test_it_is_described_without_experts(shell: Shell) -> None:
    report = shell.do("info").report
    assert report is not None
    assert report.summary() == (
        "llama: 2 decoder layers, no experts, 115,008 parameters, 449.2 KiB"
    )
    view = shell.engine.view()
    assert view.heat is None
    assert view.model is not None
    assert (view.model.moe_layers, view.model.experts, view.model.top_k) == (0, 0, 0)
    layers = shell.do("layers").report
    assert layers is not None
    assert layers.summary() == "2 decoder layers, no experts"
    assert layers.data()["decoder"][1] == {
        "layer": 1, "mixer": "attention", "feed_forward": "dense", "bytes": 49408,
        "path": "model.layers.1",
    }  # fmt: skip


def test_a_session_of_a_dense_model(shell: Shell, path: Path, tmp_path: Path) -> None:
    """Everything that needs no experts, from the first answer to a saved model, and back."""
    session = shell.engine._bench.session
    before = {name: mx.array(a) for name, a in _weights(session).items()}
    shell.do("smoke-test", "chat hello", EVALUATE, REFUSALS)
    staged = shell.do(ABLITERATE).report
    assert staged is not None
    assert staged.data()["edited"] == 4
    assert staged.data()["strengths"] == {
        "attention": {"0": 1.0, "1": 1.0}, "dense": {"0": 1.0, "1": 1.0},
    }  # fmt: skip
    preview = shell.do("preview --dataset demo:eval --max-samples 4 --samples 0").report
    assert preview is not None
    assert preview.data()["kl_mean"] > 1e-4
    shell.do("probe --dataset demo:eval", "flip", "flip", "ab hello", "apply")
    ab = shell.do("ab hello --max-tokens 4").report  # against the checkpoint now
    assert ab is not None
    assert ab.data()["base"]["label"] == "checkpoint"
    assert ab.data()["kl_mean"] > 1e-4
    shell.do("compare 0 1 --dataset demo:eval --max-samples 4", "history")
    saved = shell.do("save out").report
    assert saved is not None
    assert saved.data()["gate"] == {
        "load": "ok", "tensors": "21 identical", "logits": "identical",
    }  # fmt: skip
    changed = {n for n, a in _weights(session).items() if not mx.array_equal(a, before[n])}
    assert changed == {
        f"model.layers.{layer}.{part}.weight"
        for layer in (0, 1)
        for part in ("self_attn.o_proj", "mlp.down_proj")
    }
    _opens_with_stock_mlx_lm(tmp_path / "out", session)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "mixture-of-experts" not in card
    assert "): no experts, 224.6 KiB." in card
    shell.do("undo")
    after = _weights(session)
    assert all(mx.array_equal(after[name], before[name]) for name in before)
    shell.do("redo", "goto 0", "export report session.md", "export chat chat.md")
    assert "| experts | none |" in Path("session.md").read_text("utf-8")


def _weights(session: object) -> dict[str, mx.array]:
    tree = session.editor.resident.tree  # type: ignore[attr-defined]
    return {path: tree.get(path) for path in tree.paths}


def _opens_with_stock_mlx_lm(path: Path, session: object) -> None:
    model, _ = load(str(path))
    tokens = mx.array([[5, 17, 300, 500]])
    model.set_dtype(mx.float32)
    own = session.model(tokens)  # type: ignore[attr-defined]
    np.testing.assert_allclose(np.array(model(tokens)), np.array(own), atol=1e-5)
    assert "num_experts" not in json.loads((path / "config.json").read_text())
