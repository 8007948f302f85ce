"""Dense models in a session: everything but what needs experts, undone bit for bit."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import tiny_models

from mlxfun import Session
from mlxfun.calibration.options import CollectOptions
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.context import Context
from mlxfun.data.options import DatasetOptions
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import ModelError, StateError, UsageError
from mlxfun.evaluation.options import EvaluateOptions, ProbeOptions, RefusalOptions
from mlxfun.events import Token
from mlxfun.generation.options import GenerateOptions
from mlxfun.scans.options import ScanOptions
from mlxfun.steering.options import SteerOptions
from mlxfun.steering.reports import SteerReport
from mlxfun.techniques.ablate.options import AblateOptions
from mlxfun.techniques.merge.options import MergeOptions
from mlxfun.techniques.prune.options import PruneOptions, SelectOptions
from mlxfun.techniques.router_bias.options import AmplifyOptions, BakeOptions
from tests.mlxfun import tiny_checkpoints

HARMFUL, HARMLESS = (
    DatasetOptions(f"demo:{name}", max_samples=12) for name in ("harmful", "harmless")
)
ABLATE = AblateOptions(harmful=HARMFUL, harmless=HARMLESS, answer_tokens=2)
EVAL = EvaluateOptions((DatasetOptions("demo:eval", max_samples=2, max_tokens=48),))
TOKENS = [[5, 17, 300, 500, 9, 2]]
QUANTISED = "llama, 4 bit"
FAMILIES = (
    "llama", "qwen3", "gemma3_text", "mistral", "phi3", "olmo2", "gpt2", "qwen3_5_dense", "mamba2",
    QUANTISED,
)  # fmt: skip

# (tensors that abliteration edits, decoder layers): outputs of attention and MLP, by hand.
EDITED = {
    "llama": (6, 3),
    "qwen3": (6, 3),
    "gemma3_text": (8, 4),
    "mistral": (6, 3),
    "phi3": (6, 3),
    "olmo2": (6, 3),
    "gpt2": (12, 3),  # weights and biases
    "qwen3_5_dense": (4, 2),
    "mamba2": (3, 3),  # no MLP
    QUANTISED: (18, 3),  # packed weights, scales and biases
}


def checkpoint(path: Path, name: str) -> Path:
    """A tiny checkpoint with a vocabulary for the bundled tokenizer."""
    if name == QUANTISED:
        config = {**tiny_checkpoints.COMMON, "model_type": "llama", "num_hidden_layers": 3}
        # Packed weights with bfloat16 take ten times as long on the CPU, for the same steps.
        return tiny_checkpoints.write(path / "llama4", config, bits=4, dtype=mx.float32)
    config = copy.deepcopy(tiny_models.DENSE[name])
    config.get("text_config", config)["vocab_size"] = tiny_checkpoints.VOCABULARY
    return tiny_checkpoints.write(path / name, config)


@pytest.fixture
def opened(tmp_path: Path, request: pytest.FixtureRequest) -> Any:
    session = Session.open(checkpoint(tmp_path, request.param))
    yield session
    session.close()


def weights(session: Session) -> dict[str, mx.array]:
    tree = session.editor.resident.tree
    return {path: tree.get(path) for path in tree.paths}


def logits(session: Session) -> np.ndarray:
    return np.array(session.model(mx.array(TOKENS)).astype(mx.float32))


@pytest.mark.parametrize(("opened", "name"), [(n, n) for n in FAMILIES], indirect=["opened"])
def test_a_dense_model_is_edited_saved_and_restored_bit_for_bit(
    opened: Session, name: str, tmp_path: Path
) -> None:
    session, (tensors, layers) = opened, EDITED[name]
    before, base, state = weights(session), logits(session), session.state
    info = session.info()
    assert (info.decoder_layers, info.moe_layers, info.experts, info.router) == (layers, 0, 0, "")
    assert session.view().heat is None
    assert len(session.layers().decoder) == layers
    checks = session.smoke_test().checks
    assert [checks[c] for c in ("finite logits", "taps change nothing", "cache")] == ["ok"] * 3
    assert session.chat("hello", GenerateOptions(max_tokens=4)).generated_tokens > 0
    assert session.evaluate(EVAL).kl_mean == 0.0

    report = session.abliterate(ABLATE)
    assert report.edited == tensors
    assert not np.array_equal(base, logits(session))
    preview = session.preview(EVAL)
    assert preview.kl_mean is not None
    assert preview.kl_mean > 0
    session.flip("base")
    assert np.array_equal(base, logits(session))
    session.flip("candidate")
    candidate = logits(session)
    session.apply(ApplyOptions())
    assert np.array_equal(candidate, logits(session))
    assert session.evaluate(EVAL).kl_mean == preview.kl_mean
    ab = session.ab("hello", GenerateOptions(max_tokens=3))
    assert (ab.base.label, ab.kl_mean > 0) == ("checkpoint", True)
    counted = session.refusals(RefusalOptions(HARMFUL, HARMLESS, tokens=2))
    assert (counted.subject, counted.reference) == ("current", "checkpoint")

    saved = session.save(SaveOptions(tmp_path / "out"))
    assert (saved.experts, saved.gate["logits"]) == (0, "identical")
    again = Session.open(tmp_path / "out")
    assert np.array_equal(candidate, logits(again))
    again.close()

    session.undo()
    assert session.state == state
    assert all(mx.array_equal(before[path], a) for path, a in weights(session).items())
    assert np.array_equal(base, logits(session))
    session.redo()
    assert np.array_equal(candidate, logits(session))


DATA = DatasetOptions("demo:mixed")
SCAN = ScanOptions(DATA, DATA, Path("r.json"))
NEEDS_EXPERTS = {
    "collect statistics of": lambda s: s.collect(CollectOptions(DATA)),
    "keep statistics of": lambda s: s.stats(),
    "load statistics of": lambda s: s.load_stats(Path("none.npz")),
    "count": lambda s: s.set_counting(True),
    "rank": lambda s: s.why(0, 0),
    "look at": lambda s: s.dossier(0, 0, ProbeOptions(DATA)),
    "scan": lambda s: s.safety_scan(SCAN),
    "prune": lambda s: s.prune(PruneOptions(n_prune=1)),
    "merge": lambda s: s.merge(MergeOptions(data=DATA, n_prune=1)),
    "select": lambda s: s.select(SelectOptions(drop={0: (0,)})),
    "amplify": lambda s: s.amplify(AmplifyOptions(Path("none.json"))),
    "bake steering into": lambda s: s.bake(BakeOptions()),
    "steer": lambda s: s.steer(SteerOptions(deactivate={0: (0,)})),
    "compact": lambda s: s.compact(),
    "abliterate with --target safety-experts": lambda s: s.abliterate(
        AblateOptions(
            harmful=HARMFUL,
            harmless=HARMLESS,
            target="safety-experts",
            safety_map=Path("none.json"),
        )
    ),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Any:
    session = Session.open(checkpoint(tmp_path_factory.mktemp("dense"), "llama"))
    yield session
    session.close()


@pytest.mark.parametrize("action", NEEDS_EXPERTS)
def test_what_needs_experts_is_refused_with_one_sentence(llama: Session, action: str) -> None:
    with pytest.raises(StateError) as refused:
        NEEDS_EXPERTS[action](llama)
    assert str(refused.value) == f"llama is a dense model: it has no experts to {action}"
    assert llama.view().plan is None


def test_no_steering_can_be_put_back_on_a_dense_model(llama: Session) -> None:
    """What recipes do between variants."""
    assert llama.steer(SteerReport({}, {})).activated == {}


def test_measuring_asks_for_a_data_set(llama: Session) -> None:
    with pytest.raises(UsageError, match=r"no data set named; give --dataset, for instance demo"):
        llama.evaluate(EvaluateOptions())


def test_tokens_of_a_dense_model_have_no_routing(llama: Session) -> None:
    class Recorder(Context):
        def __init__(self) -> None:
            self.events: list[Any] = []

        def emit(self, event: Any) -> None:
            self.events.append(event)

    recorder = Recorder()
    llama.chat("hello", GenerateOptions(max_tokens=3), recorder)
    tokens = [event for event in recorder.events if isinstance(event, Token)]
    assert len(tokens) == 3
    assert all(token.experts is None and token.weights is None for token in tokens)


def test_staging_is_advised_with_what_a_dense_model_can_stage(llama: Session) -> None:
    with pytest.raises(StateError, match=r"nothing is staged to apply; .* e\.g\. with abliterate"):
        llama.apply(ApplyOptions())


def test_a_model_whose_layers_are_not_called_cannot_be_read(tmp_path: Path) -> None:
    session = Session.open(checkpoint(tmp_path, "iquestloopcoder"))
    with pytest.raises(ModelError, match=r"the forward does not call \d+ of the \d+ parts"):
        session.abliterate(ABLATE)
    session.close()
