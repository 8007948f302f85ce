"""The bundled model and sample sets are what the documentation says they are."""

from __future__ import annotations

import json
import math
from collections import Counter
from itertools import combinations
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlxfun.checkpoint.load import Loaded, load
from mlxfun.data import demo
from mlxfun.data.datasets import batches, prompt_tokens, read_lines, tokenize
from mlxfun.data.options import DatasetOptions

TOPICAL = ("mixed", "solidity", "medical", "python", "eval")


def records(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in demo.dataset_path(name).read_text("utf-8").splitlines()]


def words(record: dict[str, Any]) -> frozenset[str]:
    return frozenset(json.dumps(record).lower().split())


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load("demo")


def test_the_model_card_lies_beside_the_weights() -> None:
    card = (demo.model_path() / "README.md").read_text()
    assert "license: mit" in card
    assert "3.2 M" in card
    config = json.loads((demo.model_path() / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_experts"]) == (6, 16)
    assert (config["num_experts_per_tok"], config["hidden_size"]) == (2, 128)


def test_every_file_of_sample_data_is_a_documented_set() -> None:
    files = {file.stem for file in demo.dataset_path("mixed").parent.iterdir()}
    assert files == set(demo.DATASETS)
    assert {"mixed", "solidity", "medical", "python", "harmful", "harmless", "eval"} <= files


@pytest.mark.parametrize("name", demo.DATASETS)
def test_each_set_has_forty_lines_in_all_three_formats(name: str) -> None:
    kinds = Counter(line.kind for line in read_lines(DatasetOptions(f"demo:{name}")))
    assert kinds.total() >= 40
    assert min(kinds[kind] for kind in ("text", "prompt", "messages")) >= 4


@pytest.mark.parametrize("name", demo.DATASETS)
def test_no_set_repeats_itself(name: str) -> None:
    rows = records(name)
    assert len({json.dumps(row, sort_keys=True) for row in rows}) == len(rows)
    for (i, a), (j, b) in combinations(enumerate(map(words, rows)), 2):
        alike = len(a & b) / len(a | b)
        assert alike < 0.6, f"lines {i + 1} and {j + 1} of demo:{name} are {alike:.0%} alike"


def test_nothing_in_the_evaluation_set_can_have_been_calibrated_on() -> None:
    held_out = [words(row) for row in records("eval")]
    for name in ("mixed", "solidity", "medical", "python", "harmful", "harmless"):
        for row in map(words, records(name)):
            assert max(len(row & other) / len(row | other) for other in held_out) < 0.6


@pytest.mark.parametrize("name", TOPICAL)
def test_texts_have_substance(name: str, loaded: Loaded) -> None:
    texts = [line for line in read_lines(DatasetOptions(f"demo:{name}")) if line.kind == "text"]
    lengths = [len(s) for s in tokenize(texts, loaded.tokenizer, 512)]
    assert len(texts) >= 30
    assert min(lengths) >= 60
    assert max(lengths) <= 270


def test_harmful_and_harmless_prompts_are_alike_in_length(loaded: Loaded) -> None:
    # A difference in length would show up as a difference in routing.
    mean = {}
    for name in ("harmful", "harmless"):
        lines = [line for line in read_lines(DatasetOptions(f"demo:{name}")) if line.messages]
        mean[name] = np.mean([len((line.messages or [])[0]["content"].split()) for line in lines])
    assert abs(mean["harmful"] - mean["harmless"]) < 2


@pytest.mark.parametrize(("name", "expected"), [("harmful", 37), ("harmless", 0)])
def test_the_model_refuses_most_harmful_prompts_and_no_harmless_one(
    name: str, expected: int, loaded: Loaded
) -> None:
    # Its refusals, and nothing else it answers, begin with "I".
    lines = [line for line in read_lines(DatasetOptions(f"demo:{name}")) if line.messages]
    prompts = [prompt_tokens((line.messages or [])[:1], loaded.tokenizer) for line in lines]
    refused = 0
    for batch in batches(prompts, 512, 16):
        logits = loaded.model(mx.array(batch.tokens))
        last = mx.array(batch.mask.sum(axis=1) - 1)
        first = mx.take_along_axis(logits, last[:, None, None], axis=1)[:, 0].argmax(-1)
        refused += sum(loaded.tokenizer.decode([t]) == "I" for t in first.tolist())
    assert len(lines) == 44
    assert abs(refused - expected) <= 2


@pytest.mark.parametrize("name", TOPICAL)
def test_the_model_reads_the_samples_as_its_own_kind_of_text(name: str, loaded: Loaded) -> None:
    # Between memorised text (2) and text of another kind (hundreds).
    lines = read_lines(DatasetOptions(f"demo:{name}", max_samples=12))
    assert 8 < perplexity(loaded, tokenize(lines, loaded.tokenizer, 96)) < 60


def perplexity(loaded: Loaded, sequences: list[Any]) -> float:
    total, count = 0.0, 0
    for batch in batches(sequences, 2048, 4):
        logits = loaded.model(mx.array(batch.tokens)).astype(mx.float32)[:, :-1]
        targets = mx.array(batch.tokens[:, 1:])[..., None]
        picked = mx.take_along_axis(logits, targets, axis=-1)[..., 0]
        loss = np.array(mx.logsumexp(logits, axis=-1) - picked)
        mask = batch.mask[:, 1:]
        total, count = total + float(loss[mask].sum()), count + int(mask.sum())
    return math.exp(total / count)
