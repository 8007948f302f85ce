"""The commands that look inside a model: their options reach the session as they are written."""

from __future__ import annotations

import pytest

from commands.registry import parse
from mlxfun.tracing.options import LensOptions, PatchOptions, TraceOptions
from tests.commands.conftest import Bench


def report(bench: Bench, line: str):
    ended = bench.do(line)[-1]
    assert ended.report is not None, ended
    return ended.report


def test_options_may_stand_before_and_behind_the_text() -> None:
    for line in (
        'trace The cat --at embed --at "layers.*.residual"',
        'trace --at embed The cat --at "layers.*.residual"',
        'trace --at embed --at "layers.*.residual" "The cat"',
    ):
        found = parse(line).params
        assert (" ".join(found["text"]), found["at"]) == ("The cat", ("embed", "layers.*.residual"))


def test_a_trace_shows_a_line_for_each_value(bench: Bench) -> None:
    found = report(bench, "trace The cat --at embed --at norm")
    assert [value.name for value in found.values] == ["embed", "norm"]
    assert TraceOptions("x").at == ("layers.*.residual",)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("trace", "the text is missing"),
        ("lens --layers 3..1 The cat", "3..1"),
        ("attention --find induction The cat", "--find takes no text"),
        ("attention --find sideways", "induction"),
        ("patch only-one", "corrupted"),
        ("patch a b --component neuron", "neuron"),
        ("attribute The cat --export parts.svg", "must end in .json or .md or .csv"),
        ("probe-train --class python", "is not NAME=DATASET"),
        ("intervene layers.3.mlp.output", "takes NAME KIND"),
        ("intervene layers.3.mlp.output double 2", "there is no intervention 'double'"),
        ("intervene layers.3.mlp.output scale", "takes FACTOR"),
        ("intervene layers.3.mlp.output scale much", "are no numbers"),
        ("intervene layers.3.mlp.output scale inf", "must be finite"),
        ("intervene layers.3.experts drop", "takes EXPERTS"),
        ("intervene layers.3.experts drop 1 --heads 0", "takes no --heads"),
        ("intervene a b c --clear", "takes one name"),
        ("vector use nobody", "no vectors called 'nobody'"),
        ("vector use nobody --strength nan", "finite"),
        ("sae train sae", "needs --at NAME"),
        ("sae train sae --at embed --kind gated", "gated"),
        ("sae use sae --feature 3", "one of both"),
        ("sae use sae --feature 3 --strength 1 --clamp 2", "one of both"),
        ("sae use sae --feature 3 --clamp inf", "finite"),
    ],
)
def test_a_wrong_line_says_what_is_wrong(bench: Bench, line: str, words: str) -> None:
    ended = bench.run(line)
    assert words.lower() in str(ended.error).lower()


def test_options_of_lens_and_patch_are_handed_on(bench: Bench) -> None:
    assert parse('lens --layers 0..2 --top-k 3 --answer " a" The cat').params["layers"] == (0, 1, 2)
    assert LensOptions("x").layers is None
    found = report(bench, "patch a b --component head --metric kl --method attribution")
    assert (found.component, found.metric, found.method) == ("head", "kl", "attribution")
    assert PatchOptions("a", "b").receiver == "output"


def test_interventions_are_named_and_taken_away(bench: Bench) -> None:
    found = report(bench, "intervene layers.3.attn.heads scale 0.5 --heads 0,2")
    assert found.interventions[0].words == "scale(0.5, heads=[0, 2])"
    assert found.summary() == "intervening: scale(0.5, heads=[0, 2]) at layers.3.attn.heads"
    found = report(bench, "intervene layers.3.experts drop 1,2")
    assert found.interventions[0].words == "compose(drop_expert(1), drop_expert(2))"
    assert report(bench, "intervene --clear").interventions == ()


def test_vectors_are_made_saved_and_used(bench: Bench, tmp_path) -> None:
    made = report(bench, "vector make calm --positive demo:python --negative demo:medical")
    assert made.rows[0].name == "calm"
    path = tmp_path / "calm.safetensors"
    assert report(bench, f"vector save calm {path}").rows[0].path == str(path)
    used = report(bench, f"vector use {path} --strength 2").interventions[0]
    assert (used.name, used.source) == ("layers.3.residual", str(path))
    assert report(bench, "vector use calm --layer 1").interventions[0].name == "layers.1.residual"
    assert report(bench, "vector").rows


def test_autoencoders_are_trained_looked_through_and_used(bench: Bench, tmp_path) -> None:
    line = f"sae train {tmp_path / 'a'} --at layers.3.mlp.output --k 4 --kind jumprelu"
    made = report(bench, f"{line} --dataset demo:mixed")
    assert (made.at, made.k, made.architecture) == ("layers.3.mlp.output", 4, "jumprelu")
    assert made.summary() == (
        "32 features of layers.3.mlp.output from 96 tokens; on held-out tokens error 0.125, L0 2.0, "
        "75.0% of the loss recovered; 25.0% dead"
    )
    from_file = report(bench, f"sae train {tmp_path / 'b'} --from {tmp_path / 'x.safetensors'}")
    assert from_file.recovered is None
    seen = report(bench, f"sae features {tmp_path / 'a'} --features 3,5 --dataset demo:mixed")
    assert [row.feature for row in seen.rows] == [3, 5]
    used = report(bench, f"sae use {tmp_path / 'a'} --feature 3 --clamp 0").interventions[0]
    assert (used.name, used.words) == ("layers.3.residual", "clamp_feature(0) of 3")
    assert used.source == str(tmp_path / "a")
