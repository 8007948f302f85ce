"""Numbers that are none, or beyond all bounds, end as one sentence; a broken model is not kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlxfun.data import demo
from tests.e2e.conftest import Program, Shell, typed

HUGE = "1" * 5000
LAYERS, EXPERTS = 6, 16


def domain_map(path: str, score: float = 0.5) -> None:
    empty: dict[str, list[int]] = {str(i): [] for i in range(LAYERS)}
    document = {
        "num_layers": LAYERS, "num_experts": EXPERTS, "domain_name": "d", "general_experts": empty,
        "composite_score": [[score] * EXPERTS] * LAYERS, "domain_experts": empty | {"1": [4]},
    }  # fmt: skip
    Path(path).write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("amplify --domain-map d.json --scale inf", "inf is not in the range 0<x<=100"),
        ("amplify --domain-map d.json --scale nan", "'nan' is not a finite number"),
        ("amplify --domain-map d.json --threshold nan", "'nan' is not a finite number"),
        ("set temperature nan", "'nan' is not a finite number"),
        ("set temperature inf", "'inf' is not a finite number"),
        ("set top-p nan", "'nan' is not a finite number"),
        ("set max-kl nan", "'nan' is not a finite number"),
        ("set max-kl inf", "'inf' is not a finite number"),
        ("set seed -- -1", "the seed -1 must be at least 0 and below 2^63"),
        ("chat --temperature nan hi", "'nan' is not a finite number"),
        ("chat --top-p nan hi", "'nan' is not a finite number"),
        ("chat --seed -5 hi", "the seed -5 must be at least 0 and below 2^63"),
        (f"chat --seed {2**63} hi", f"the seed {2**63} must be at least 0 and below 2^63"),
        (f"chat --seed {10**30} hi", "the seed that is given must be at least 0 and below 2^63"),
        (f"chat --seed {HUGE} hi", f"'{HUGE[:40]}...' is not a whole number"),
        ("chat --seed 1.5 hi", "'1.5' is not a whole number"),
        ("collect --dataset demo:mixed --seed -1", "the seed -1 must be at least 0"),
        ("abliterate --seed -1", "the seed -1 must be at least 0"),
        ("preview --dataset demo:eval --seed -1", "the seed -1 must be at least 0"),
        ("apply --max-kl nan", "'nan' is not a finite number"),
        ("apply --max-perplexity-ratio inf", "'inf' is not a finite number"),
        ("select --below nan", "'nan' is not a finite number"),
        ("steer --rule additive --activate 1:4 --boost-value nan", "is not a finite number"),
        ("steer --rule additive --deactivate 1:4 --mask-value=-inf", "is not a finite number"),
        ("steer --rule additive --activate 1:4 --boost-value 1e300",
         "boost_value 1e+300 must be above 0 and at most 10000"),
    ],
)  # fmt: skip
def test_an_option_that_is_no_number_is_refused(shell: Shell, line: str, message: str) -> None:
    domain_map("d.json")
    refusal = shell.refused(line, usage=True)
    assert message in refusal
    assert "\n" not in refusal


def test_the_largest_seed_is_taken_by_all_generators(shell: Shell) -> None:
    seed = 2**63 - 1
    shell.do(
        f"collect --dataset demo:mixed --max-samples 2 --max-tokens 8 --seed {seed}",
        f"chat --temperature 1 --max-tokens 2 --seed {seed} hi",
    )
    shell.do("collect --dataset demo:mixed --max-samples 6 --max-tokens 48 --seed 0")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"boost_value": 1' + "0" * 400 + ', "activate": {"1": [4]}}',
         "c.json: boost_value is a number beyond all bounds"),
        (f'{{"boost_value": {HUGE}}}', "c.json holds a number of thousands of digits"),
        (f'{{"activate": {{"1": [{HUGE}]}}}}', "c.json holds a number of thousands of digits"),
        ('{"activate": {"1": [1' + "0" * 400 + "]}}", "layer 1 names unknown experts"),
        ('{"boost_value": Infinity}', "boost_value inf must be above 0 and at most 10000"),
        ('{"mask_value": NaN}', "mask_value nan must be below 0"),
    ],
)  # fmt: skip
def test_a_configuration_with_a_hostile_number_is_refused(
    shell: Shell, content: str, message: str
) -> None:
    Path("c.json").write_text(content)
    before = shell.standing()
    ended = shell.run("steer --config c.json")
    assert ended.error is not None
    assert message in ended.error
    assert "unexpected" not in ended.error
    assert shell.standing() == before


def test_numbers_of_thousands_of_digits_are_sentences_everywhere(shell: Shell) -> None:
    Path("d.jsonl").write_text(f'{{"content": "a b", "n": {HUGE}}}\n')
    assert shell.refused("collect --dataset d.jsonl") == (
        "d.jsonl:1: a number of thousands of digits is no sample"
    )
    Path("m").mkdir()
    Path("m/config.json").write_text(f'{{"model_type": "x", "n": {HUGE}}}')
    assert "m/config.json is not a JSON text" in shell.refused("load m")
    Path("l.json").write_text(f'{{"keep_map": {{"0": [{HUGE}]}}}}')
    assert "l.json holds a number of thousands of digits" in shell.refused(
        "prune --expert-list l.json"
    )
    Path("s.mlxfun").write_text(f"#: seed {HUGE}\ninfo\n")
    assert "is not a whole number" in shell.refused("replay s.mlxfun", usage=True)


@pytest.mark.parametrize("score", [1e308, float("inf"), float("nan"), -1.5])
def test_a_map_with_scores_beyond_their_bounds_amplifies_nothing(
    shell: Shell, score: float
) -> None:
    domain_map("d.json", score)
    message = shell.refused("amplify --domain-map d.json --dataset demo:mixed")
    assert "needs composite_score as 6 x 16 numbers (layers x experts) from -1 to 1" in message


# --- a model that computes NaN ---------------------------------------------------------------


@pytest.fixture
def broken(shell: Shell) -> Iterator[Shell]:
    """The demo model with NaN in an expert that every answer comes through."""
    session: Any = shell.engine._bench.session
    path = "model.layers.2.mlp.switch_mlp.down_proj.weight"
    whole = session.editor.resident.tree.get(path)
    spoiled = whole * float("nan")
    mx.eval(spoiled)  # here: what is lazy belongs to the thread that made it
    session.editor.resident.tree.put(path, spoiled)
    yield shell
    session.editor.resident.tree.put(path, whole)


def test_a_smoke_test_that_fails_is_an_error(broken: Shell) -> None:
    message = broken.refused("smoke-test")
    assert message.startswith("smoke test FAILED: finite logits logits hold NaN or infinity")
    assert message.endswith("; undo the last edit, or discard the staged one")


def test_a_broken_model_is_not_saved(broken: Shell) -> None:
    message = broken.refused("save out")
    assert "holds NaN or infinity, which the checkpoint's does not; undo the edit" in message
    assert not Path("out").exists()


def test_nothing_is_counted_and_nothing_scanned_on_a_broken_model(broken: Shell) -> None:
    sentence = "the model computes NaN or infinity on this text, so nothing can be counted"
    small = "--max-samples 8 --max-tokens 32"
    assert sentence in broken.refused(f"collect --dataset demo:mixed {small}")
    assert sentence in broken.refused(
        f"domain-scan --domain demo:python --general demo:mixed --domain-name p {small} "
        "--output p.json"
    )
    assert not Path("p.json").exists()


def test_hostile_numbers_before_a_model_is_loaded_are_misuse(program: Program) -> None:
    for option, value in (("--seed", "-1"), ("--seed", HUGE), ("--undo-budget", "9" * 400)):
        done = program.run("--headless", "--demo", option, value, "-c", "quit")
        assert done.returncode == 2, done.stderr
        assert "Traceback" not in done.stderr


def test_a_smoke_test_that_fails_exits_1(program: Program) -> None:
    source = demo.model_path()
    target = program.directory / "m"
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    weights = mx.load(str(target / "model-00001-of-00001.safetensors"))
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    mx.save_safetensors(str(target / "model-00001-of-00001.safetensors"), weights)
    done = program.run("--headless", "m", *typed(["smoke-test", "quit"]))
    assert done.returncode == 1
    assert "smoke test FAILED" in done.stdout + done.stderr
