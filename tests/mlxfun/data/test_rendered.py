"""Conversations that are rendered already go to the model as they are: no second template or BOS."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from mlxfun.checkpoint.load import load
from mlxfun.data.datasets import read_lines, tokenize
from mlxfun.data.describe import describe
from mlxfun.data.options import DatasetOptions
from mlxfun.data.rendered import RENDERED
from mlxfun.generation.answers import read_prompts
from mlxfun.scans.sample_routing import samples
from mlxfun.tally import DataUse, Tally

LLAMA = (
    "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>{{ m['content'] }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
"""Its markers are plain text, and it writes no BOS."""
ASK = [{"role": "user", "content": "Who are you?"}]
SAY = [*ASK, {"role": "assistant", "content": "A model."}]


def tokenizer_with(template: str | None, *, bos: bool = True) -> Any:
    """One token a byte, a few special ones, and a BOS ahead of every text that is encoded."""
    alphabet = {c: n for n, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fast = Fast(models.BPE(alphabet, []))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(["<s>", "</s>", "<|start|>", "<|end|>", "<|eot|>"])
    if bos:
        fast.post_processor = processors.TemplateProcessing(
            "<s> $A", special_tokens=[("<s>", fast.token_to_id("<s>"))]
        )
    made = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    return TokenizerWrapper(made)


def written(path: Path, *records: Any) -> DatasetOptions:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return DatasetOptions(str(path))


def seen(options: DatasetOptions, tokenizer: Any) -> tuple[list[list[int]], DataUse]:
    tally = Tally()
    lines = read_lines(options, tally)
    found = tokenize(lines, tokenizer, 512, tally=tally)
    return [sequence.tolist() for sequence in found], tally.uses()[0]


@pytest.mark.parametrize("template", [LLAMA, ZEPHYR])
@pytest.mark.parametrize("with_bos", [True, False])
def test_every_form_of_a_rendered_conversation_is_the_conversation(
    tmp_path: Path, template: str, with_bos: bool
) -> None:
    tokenizer = tokenizer_with(template)
    expected = tokenizer.apply_chat_template(SAY)
    whole = tokenizer.apply_chat_template(SAY, tokenize=False)
    asked = tokenizer.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True)
    if not with_bos:  # as TRL and others write them
        whole, asked = whole.removeprefix("<s>"), asked.removeprefix("<s>")
    options = written(
        tmp_path / "a.jsonl",
        {"prompt": asked, "completion": whole.removeprefix(asked)},
        {"prompt": whole},
        {"text": whole},
        {"instruction": asked, "output": whole.removeprefix(asked)},
        {"messages": SAY},
    )
    found, use = seen(options, tokenizer)
    assert found == [expected] * 5
    assert use.notes == {RENDERED: 4}


def test_a_template_that_is_applied_twice_would_be_seen(tmp_path: Path) -> None:
    """What the test above relies on: the template puts other tokens around such a prompt."""
    tokenizer = tokenizer_with(LLAMA)
    whole = tokenizer.apply_chat_template(ASK, tokenize=False)
    twice = tokenizer.apply_chat_template([{"role": "user", "content": whole}])
    assert twice.count(tokenizer.bos_token_id) == 2


@pytest.mark.parametrize(
    "text",
    [
        "Who are you?",
        "<b>Who</b> are you?",
        "What does <|start|> mean?",
        "[INST] is what another model begins with",
        "- a list\n- of things",
        "### Who are you?",
    ],
)
def test_other_prompts_go_through_the_template(tmp_path: Path, text: str) -> None:
    tokenizer = tokenizer_with(LLAMA)
    found, use = seen(written(tmp_path / "a.jsonl", {"prompt": text}), tokenizer)
    assert found == [tokenizer.apply_chat_template([{"role": "user", "content": text}])]
    assert use.notes == {}


def test_what_asks_for_an_answer_ends_with_the_generation_prompt_once(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(LLAMA)
    whole = tokenizer.apply_chat_template(ASK, tokenize=False)
    asked = tokenizer.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True)
    options = written(tmp_path / "a.jsonl", {"prompt": whole}, {"prompt": asked}, {"prompt": "Who are you?"})  # fmt: skip
    tally = Tally()
    found, _ = read_prompts(options, tokenizer, None, tally)
    expected = tokenizer.apply_chat_template(ASK, add_generation_prompt=True)
    assert [tokens.tolist() for tokens in found] == [expected] * 3
    assert tally.uses()[0].notes == {RENDERED: 2}


def test_scans_and_a_look_at_the_set_see_the_same(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(LLAMA)
    whole = tokenizer.apply_chat_template(SAY, tokenize=False)
    options = written(tmp_path / "a.jsonl", {"prompt": whole})
    expected = tokenizer.apply_chat_template(SAY)
    (sample,) = samples(read_lines(options), tokenizer, 512)
    assert np.asarray(sample.tokens).tolist() == expected
    asked = tokenizer.apply_chat_template(ASK, tokenize=False, add_generation_prompt=True)
    pair = {"prompt": asked, "completion": whole.removeprefix(asked)}
    both = written(tmp_path / "b.jsonl", pair, {"messages": SAY})
    one, other = samples(read_lines(both), tokenizer, 512)
    assert one.answer == other.answer == len(tokenizer.encode(asked, add_special_tokens=False))
    assert np.array_equal(one.tokens, other.tokens)
    assert describe(options, tokenizer, None).first == whole


def test_a_model_without_a_template_still_gets_one_bos(tmp_path: Path) -> None:
    tokenizer = tokenizer_with(None)
    options = written(tmp_path / "a.jsonl", {"prompt": "<s>Who", "completion": " are you?"})
    (ids,), use = seen(options, tokenizer)
    assert ids == tokenizer.encode("Who are you?")
    assert ids.count(tokenizer.bos_token_id) == 1
    assert use.notes == {RENDERED: 1}


def test_the_demo_knows_its_own_conversations(tmp_path: Path) -> None:
    tokenizer = load("demo").tokenizer
    text = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    options = written(tmp_path / "a.jsonl", {"prompt": text, "completion": "there<|im_end|>\n"})
    (ids,), use = seen(options, tokenizer)
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]
    assert ids == tokenizer.apply_chat_template(turns)
    assert use.notes == {RENDERED: 1}
