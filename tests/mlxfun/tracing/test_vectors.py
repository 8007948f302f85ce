"""Steering vectors: their arithmetic, their files, and that they steer."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from tracing_rigs import tiny

from mlxfun import Session
from mlxfun.data.datasets import prompt_tokens
from mlxfun.data.options import DatasetOptions
from mlxfun.errors import DatasetError, ModelError, SaveError, UsageError
from mlxfun.evaluation.options import RefusalOptions
from mlxfun.generation.options import GenerateOptions
from mlxfun.tracing.activations import get_activations
from mlxfun.tracing.interventions import add_vector
from mlxfun.tracing.options import (
    ActivationOptions,
    AttentionOptions,
    AttributeOptions,
    LensOptions,
    PatchOptions,
    ProbeTrainOptions,
    TraceOptions,
    VectorOptions,
)
from mlxfun.tracing.vectors.vectors import (
    SteeringVectors,
    direction,
    load_vectors,
    make_vectors,
    require_fitting,
    save_vectors,
)

PLUS = [[1, 2, 3], [1, 5, 3], [1, 9, 3], [1, 7, 3]]
MINUS = [[2, 2, 4], [2, 5, 4], [2, 9, 4], [2, 7, 4, 4]]


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    opened = Session.open("demo")
    yield opened
    opened.close()


def test_a_mean_vector_is_the_difference_of_the_means() -> None:
    model = tiny("llama")
    made = make_vectors(model, (PLUS, MINUS), "mean", [0, 2])
    assert list(made.layers) == [0, 2]
    for layer in (0, 2):
        one, other = (
            np.array(get_activations(model, rows, [layer])[layer]) for rows in (PLUS, MINUS)
        )
        assert np.allclose(made.layers[layer], one.mean(0) - other.mean(0), atol=1e-5)
        assert made.told_apart[layer] == 1.0  # the last tokens differ


def test_a_pca_vector_is_the_first_component_with_the_sign_and_length_of_the_difference() -> None:
    rng = np.random.default_rng(0)
    way = np.array([3.0, 4.0, 0.0]) / 5
    one = rng.normal(size=(50, 3)) * 0.1 + 2 * way
    other = rng.normal(size=(50, 3)) * 0.1 - 2 * way
    found = direction(one, other, "pca")
    assert np.allclose(found, 4 * way, atol=0.1)
    assert np.allclose(direction(other, one, "pca"), -found, atol=1e-9)


def test_a_file_gives_back_what_was_saved_with_its_origin(tmp_path) -> None:
    made = make_vectors(tiny("qwen3_moe"), (PLUS, MINUS), "pca")
    path = tmp_path / "calm.safetensors"
    save_vectors(made, path)
    back = load_vectors(path)
    assert (back.method, dict(back.told_apart), dict(back.about)) == (
        "pca", dict(made.told_apart), dict(made.about))  # fmt: skip
    assert back.about["model_type"] == "qwen3_moe"
    assert all(np.array_equal(back.layers[n], v) for n, v in made.layers.items())


def test_files_that_hold_no_vectors_are_refused(tmp_path) -> None:
    with pytest.raises(DatasetError, match="is no file"):
        load_vectors(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(ModelError, match="is truncated"):
        load_vectors(tmp_path / "text.safetensors")
    from safetensors.numpy import save_file

    save_file({"layers.1": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(DatasetError, match="holds no steering vectors"):
        load_vectors(tmp_path / "other.safetensors")
    made = SteeringVectors({1: np.zeros(3, np.float32)}, "mean")
    (tmp_path / "file").write_text("x")
    with pytest.raises(SaveError):
        save_vectors(made, tmp_path / "file" / "x.safetensors")
    with pytest.raises(UsageError, match="has a vector of 3 values for layer 1"):
        require_fitting(made, tiny("llama"), "x")


def test_empty_sets_and_unknown_methods_are_refused() -> None:
    with pytest.raises(UsageError, match="one is empty"):
        make_vectors(tiny("llama"), (PLUS, []))
    with pytest.raises(UsageError, match="there is no method"):
        make_vectors(tiny("llama"), (PLUS, MINUS), "median")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="several residual streams"):
        make_vectors(tiny("gemma3n"), (PLUS, MINUS))


def test_a_vector_moves_the_stream_from_one_set_to_the_other(session: Session) -> None:
    """Added to text of one kind, the vector makes a later layer take it for the other kind."""
    data = DatasetOptions("demo:python", max_samples=16, max_tokens=24)
    other = DatasetOptions("demo:medical", max_samples=16, max_tokens=24)
    report = session.make_vector(VectorOptions("python"), data, other)
    assert report.rows[0].positive == 16
    layer, vector = session.vector("python", 2)
    later = session.vectors["python"].layers[4]
    prompt = session.tokenizer.encode("The patient was given a dose of")

    def score() -> float:
        with session.trace(prompt) as t:
            saved = t.layers[4].residual.save(positions=-1)
        return float(np.array(saved)[0] @ later)

    plain = score()
    session.intervene(f"layers.{layer}.residual", add_vector(vector, 1.0), "python")
    steered = score()
    session.undo()
    assert steered > plain + 0.3 * float(later @ later)
    assert score() == plain


def test_vectors_that_are_not_in_hand_are_named(session: Session) -> None:
    with pytest.raises(UsageError, match="no vectors called 'nobody' in hand"):
        session.vector("nobody", None)
    session.make_vector(VectorOptions("few", layers=(1,)), DatasetOptions("demo:python", max_samples=4),
                        DatasetOptions("demo:medical", max_samples=4))  # fmt: skip
    with pytest.raises(UsageError, match="no vector for layer 3; it has 1"):
        session.vector("few", 3)
    assert session.vector("few", None)[0] == 1
    assert {row.name for row in session.list_vectors().rows} >= {"few"}


# -- what a session reports -----------------------------------------------------------------------


def test_the_session_reports_plain_data_of_what_the_library_finds(
    session: Session, tmp_path
) -> None:
    text = "The capital of France is"
    traced = session.trace_values(TraceOptions(text, ("layers.2.mlp.output", "layers.2.router.choice",
                                                      "layers.3.attn.weights")))  # fmt: skip
    with session.trace(text) as t:
        saved = t.layers[2].mlp.output.save(positions=-1)
    assert traced.values[0].norm == pytest.approx(float(np.linalg.norm(np.array(saved))), rel=1e-5)
    assert len(traced.values[1].experts) == 2
    assert traced.values[2].shape == (1, 4, 8, 8)
    for suffix in (".svg", ".md", ".csv", ".json"):
        path = tmp_path / f"lens{suffix}"
        lens = session.lens(LensOptions(text, export=path, answers=(" the",)))
        assert lens.written == str(path)
        assert path.read_text()
    assert lens.data()["answer_ranks"][5][7] == list(lens.answer_ranks[5][7])
    with pytest.raises(UsageError, match="a result is written as"):
        session.lens(LensOptions(text, export=tmp_path / "lens.gif"))
    head = session.attention(AttentionOptions(text, 4, 1, export=tmp_path / "head.csv"))
    assert np.allclose(np.array(head.weights).sum(-1), 1, atol=1e-5)
    assert len((tmp_path / "head.csv").read_text().splitlines()) == 65
    with pytest.raises(UsageError, match="has no head 9"):
        session.attention(AttentionOptions(text, 4, 9))
    every = session.attention(AttentionOptions(text, 4, every=True, export=tmp_path / "all.svg"))
    assert [len(every.rows), len(every.maps)] == [4, 4]
    assert every.maps[1][-1][0] == pytest.approx(head.weights[-1][0], abs=1e-6)
    assert "heads" in (tmp_path / "all.svg").read_text()
    found = session.attribute(AttributeOptions(text, export=tmp_path / "parts.json"))
    assert sum(x for name, x in found.shares if "head" not in name) == pytest.approx(
        found.total, abs=1e-3
    )


def test_a_text_can_be_asked_as_a_question(session: Session) -> None:
    text = "What is the capital of France?"
    asked = prompt_tokens([{"role": "user", "content": text}], session.tokenizer)
    plain = session.lens(LensOptions(text, layers=(5,)))
    lens = session.lens(LensOptions(text, layers=(5,), chat=True))
    assert len(lens.tokens) == len(asked) > len(plain.tokens)
    # The word behind the last token is the first word of the answer.
    session.reset_chat()
    answer = session.chat(text, GenerateOptions(max_tokens=1))
    assert answer.prompt_tokens == len(asked)
    assert lens.words[0][-1][0] == answer.text
    assert lens.chat
    for found in (
        session.trace_values(TraceOptions(text, chat=True)),
        session.attention(AttentionOptions(text, 1, chat=True)),
    ):
        assert found.tokens == lens.tokens
    assert session.attribute(AttributeOptions(text, chat=True)).answer == lens.words[0][-1][0]
    other = "What is the capital on France?"
    scores = session.patch(PatchOptions(text, other, "mlp", "kl", layers=(5,), chat=True)).scores
    assert len(scores[0]) == len(asked)


def test_the_session_patches_by_every_method(session: Session) -> None:
    pair = ("What is 2 + 3? The answer is", "What is 2 + 3? The reason is")
    for method, component in (("activation", "mlp"), ("attribution", "mlp"), ("path", "mlp")):
        found = session.patch(PatchOptions(*pair, component, method=method, layers=(4, 5)))
        assert found.method.startswith(method)
        assert found.layers == (4, 5)
    with pytest.raises(UsageError, match="give --answer as well"):
        session.patch(PatchOptions(*pair, other=" a"))


def test_activations_and_probes_of_data_sets(session: Session, tmp_path) -> None:
    data = DatasetOptions("demo:python", max_samples=12, max_tokens=16)
    other = DatasetOptions("demo:medical", max_samples=12, max_tokens=16)
    path = tmp_path / "a.safetensors"
    report = session.save_activations(ActivationOptions(path, ("layers.1.mlp.output",), None), data)
    assert report.rows == 12 * 16
    assert path.stat().st_size > report.rows * 128 * 4
    probes = session.train_probes(ProbeTrainOptions((2, 3)), {"py": data, "med": other})
    assert [layer for layer, _, _ in probes.rows] == [2, 3]
    assert max(accuracy for _, accuracy, _ in probes.rows) > 0.7
    with pytest.raises(UsageError, match="no layers to train"):
        session.train_probes(ProbeTrainOptions(()), {"py": data, "med": other})


def test_a_refusal_vector_that_is_taken_away_or_added_changes_what_is_refused(
    session: Session,
) -> None:
    """Made where the answer begins, it acts in the batched answers that refusals are counted on."""
    harmful, harmless = (
        DatasetOptions(f"demo:{name}", max_samples=12) for name in ("harmful", "harmless")
    )
    whole = (DatasetOptions("demo:harmful"), DatasetOptions("demo:harmless"))
    session.make_vector(VectorOptions("refusal", prompts=True), *whole)
    _, vector = session.vector("refusal", 3)
    asked = RefusalOptions(harmful, harmless, tokens=10)
    refused = {}
    for strength in (-1.0, 1.0):
        session.intervene("layers.3.residual", add_vector(vector, strength), "refusal")
        refused[strength] = session.refusals(asked)
    session.undo()
    session.undo()
    assert refused[-1.0].after.harmful < refused[-1.0].before.harmful - 2
    assert refused[1.0].after.harmless > refused[1.0].before.harmless + 1
