"""Batched greedy answers to many prompts, and the chat template that forms the prompts.

Where all caches are of keys and values, prompts of any length are decoded together by mlx-lm's
batch generator, and an answer that ends makes room for the next prompt. Elsewhere, in models with
recurrent states for instance, prompts of one length are: that needs no padding. What one prompt's
answer is does not depend on the others, up to the rounding of the batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

from mlxfun.context import SILENT, Context, running
from mlxfun.data.datasets import (
    Batch,
    Line,
    Message,
    Tokenizer,
    Tokens,
    batches,
    count_used,
    prompt_tokens,
    read_lines,
    require_known,
)
from mlxfun.data.lines import BrokenLines
from mlxfun.data.options import DatasetOptions
from mlxfun.data.rendered import as_rendered, asked_ids
from mlxfun.errors import DatasetError
from mlxfun.hooks.elsewhere import Elsewhere, Task, elsewhere_of
from mlxfun.hooks.forwards import Watch, one_step
from mlxfun.hooks.replay import tell_reading
from mlxfun.model.places import LayerStore
from mlxfun.tally import Tally

if TYPE_CHECKING:
    from mlxfun.arrays import Array

TAIL = 12
"""Tokens of a generation prompt among which an opened thinking block is looked for."""

CPU_ROWS = 32
GPU_ROWS = 64
"""Prompts decoded at once at most."""

PREFILL_ROWS = 8
"""Prompts read at once at most."""

SHARED_ROWS = 8
"""Prompts that a worker answers at a time: the next are dealt out, and told of, when it is done."""

PASS = "greedy answers"
"""The name of the task in mlxfun.distributed.passes."""


@dataclass(frozen=True, slots=True)
class Answer:
    """tokens: as generated, a token that ends the answer included. text: without it."""

    tokens: tuple[int, ...]
    text: str


def read_prompts(
    options: DatasetOptions,
    tokenizer: Tokenizer,
    vocabulary: int | None,
    tally: Tally | None = None,
) -> tuple[list[Tokens], int]:
    """(prompts int32 [T] each, number left out because longer than `max_tokens`).

    A conversation up to its first user turn, or a plain text as one, is asked through the chat
    template with its generation prompt; cutting one would cut just that. Raises DatasetError.
    """
    found, skipped = [], 0
    tally = tally if tally is not None else Tally()
    lines, broken = read_lines(options, tally), BrokenLines(tally)
    for read in lines:
        line = as_rendered(read, tokenizer)
        part = tally.part(line.source)
        with broken.counted(line.source):
            tokens = ask(line, tokenizer)
            require_known(tokens.tolist(), vocabulary, line.where)
            if len(tokens) > options.max_tokens:
                skipped += 1
                part.refuse(f"longer than {options.max_tokens} tokens", line.where)
            elif len(tokens):
                found.append(tokens)
                count_used(line, tokenizer, len(tokens), options.max_tokens, tally)
            else:
                part.refuse("without any token", line.where)
    broken.require_few(len(lines))
    if not found:
        raise DatasetError(
            f"{options.source} has no prompt of at most {options.max_tokens} tokens; raise "
            "--max-tokens"
        )
    return found, skipped


def ask(line: Line, tokenizer: Tokenizer) -> Tokens:
    """The tokens that ask for an answer: it begins right behind the last one.

    Reasoning is switched off where the template knows how. A thinking block that the generation
    prompt opens all the same is closed, so that the answer and not its thinking comes next.
    """
    if line.kind == "rendered":
        tokens = np.asarray(asked_ids(line, tokenizer), dtype=np.int32)
    else:
        tokens = prompt_tokens(_question(line), tokenizer, False, line.tools, line.where)
    start, end = (getattr(tokenizer, name, None) for name in ("think_start", "think_end"))
    if start is None or end is None or not tokenizer.has_chat_template:
        return tokens
    text = tokenizer.decode(tokens[-TAIL:].tolist())
    if text.rfind(start) <= text.rfind(end):
        return tokens
    closing = tokenizer.encode(f"\n{end}\n\n", add_special_tokens=False)
    return np.concatenate([tokens, np.asarray(closing, dtype=np.int32)])


def _question(line: Line) -> list[Message]:
    messages = line.messages
    if messages is None:
        return [{"role": "user", "content": line.text}]
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), len(messages) - 1)
    return messages[: first + 1]


@dataclass(frozen=True, slots=True)
class Greedy:
    """Gives the greedy answers of a model as it is live.

    shared: workers, where there are some, give a part each. Only for weights that are live as a state
    of the session: hooks of this process are not theirs.
    """

    model: nn.Module
    tokenizer: Tokenizer
    shared: bool = False

    def __call__(
        self,
        prompts: Sequence[Tokens],
        max_tokens: int,
        ctx: Context = SILENT,
        label: str = "answering",
    ) -> list[Answer]:
        """The answer to each prompt, at most `max_tokens` long. Raises Cancelled."""
        stops = set(self.tokenizer.eos_token_ids)
        elsewhere = elsewhere_of(self.model) if self.shared else None
        decoded = None
        if elsewhere is not None:
            decoded = _by_workers(elsewhere, prompts, sorted(stops), max_tokens, ctx)
        if decoded is None:
            # Prompts are read a few at a time, and answers take a token each at once.
            fills = -(-len(prompts) // PREFILL_ROWS)
            tell_reading(self.model, ctx, -(-len(prompts) // _rows()) * max_tokens + fills)
            decoded = _decoded(self.model, prompts, stops, max_tokens, ctx)
        found: dict[int, Answer] = {}
        for index, tokens in decoded:
            said = [token for token in tokens if token not in stops]
            found[index] = Answer(tuple(tokens), self.tokenizer.decode(said))
            ctx.progress(label, len(found), len(prompts), "prompts")
        return [found[i] for i in range(len(prompts))]


Decoded = Iterator[tuple[int, list[int]]]
"""(index of a prompt, its tokens), in the order in which answers end."""


def _decoded(
    model: nn.Module, prompts: Sequence[Tokens], stops: set[int], max_tokens: int, ctx: Context
) -> Decoded:
    decode = _decode_ragged if takes_ragged_batches(model) else _decode_groups
    return decode(model, prompts, stops, max_tokens, ctx)


# -- by workers -------------------------------------------------------------------------------


def _by_workers(
    elsewhere: Elsewhere, prompts: Sequence[Tokens], stops: list[int], most: int, ctx: Context
) -> Decoded | None:
    """The same by other processes, SHARED_ROWS prompts of like length at a time; None where they
    cannot. How prompts are put together does not depend on how many processes there are."""
    longest = max(map(len, prompts), default=1)
    todo = batches(list(prompts), longest * SHARED_ROWS, SHARED_ROWS)
    task = Task("answering", PASS, {"stops": stops, "most": most})
    found = elsewhere.forwards(task, todo, ctx)
    if found is None:
        return None
    return (
        (index, [int(token) for token in row if token >= 0])
        for batch, rows in found
        for index, row in zip(batch.rows, rows, strict=True)
    )


def watch(model: nn.Module, batch: Batch, settings: Mapping[str, Any]) -> Watch[Array]:
    """The answers to the prompts of a batch, int32 [rows, most], -1 behind their ends."""
    prompts = [row[real] for row, real in zip(batch.tokens, batch.mask, strict=True)]
    stops, most = set(settings["stops"]), int(settings["most"])

    def run() -> Array:
        found = np.full((len(prompts), most), -1, dtype=np.int32)
        for index, tokens in _decoded(model, prompts, stops, most, running()):
            found[index, : len(tokens)] = tokens
        return found

    return Watch(run)


# -- here -------------------------------------------------------------------------------------


def takes_ragged_batches(model: nn.Module) -> bool:
    """Whether prompts of different lengths can be decoded together: where each layer's cache is one
    of keys and values, which masks keep apart from padding. Recurrent states would take it in.
    """
    kinds = {type(layer) for layer in make_prompt_cache(model)}
    return kinds <= {KVCache, RotatingKVCache}


def _rows() -> int:
    """Prompts decoded at once at most."""
    return GPU_ROWS if mx.default_device() == mx.Device(mx.gpu) else CPU_ROWS


def _decode_ragged(
    model: nn.Module, prompts: Sequence[Tokens], stops: set[int], max_tokens: int, ctx: Context
) -> Iterator[tuple[int, list[int]]]:
    """(index of a prompt, its tokens), in the order in which answers end. One that ends makes room
    for the next prompt, so the batch stays full."""
    generator = BatchGenerator(
        model,
        max_tokens=max_tokens,
        stop_tokens=[[stop] for stop in sorted(stops)],
        completion_batch_size=_rows(),
        prefill_batch_size=min(PREFILL_ROWS, _rows()),
        stream=mx.default_stream(mx.default_device()),
    )
    try:
        # Prompts of like length are read together, with little padding.
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        numbers = generator.insert([prompts[i].tolist() for i in order])
        index = dict(zip(numbers, order, strict=True))
        answers: dict[int, list[int]] = {number: [] for number in numbers}
        while answers:
            ctx.check()
            for response in generator.next_generated():
                answers[response.uid].append(int(response.token))
                if response.finish_reason is not None:
                    yield index[response.uid], answers.pop(response.uid)
    finally:
        generator.close()


def _decode_groups(
    model: nn.Module, prompts: Sequence[Tokens], stops: set[int], max_tokens: int, ctx: Context
) -> Iterator[tuple[int, list[int]]]:
    """(index of a prompt, its tokens): prompts of one length together, which needs no padding."""
    groups = equal_lengths(prompts, _rows())
    # A model on disk is read once a token for all groups.
    parts = [groups] if LayerStore.of(model) is not None else [[group] for group in groups]
    for part in parts:
        batches = [np.stack([prompts[i] for i in group]) for group in part]
        answers = _decode(model, batches, stops, max_tokens, ctx)
        for group, rows in zip(part, answers, strict=True):
            yield from zip(group, rows, strict=True)


def equal_lengths(prompts: Sequence[Tokens], rows: int) -> list[list[int]]:
    """Indices in groups of one length, at most `rows` in a group, the shortest first."""
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    return [
        same[start : start + rows]
        for _, same in sorted(by_length.items())
        for start in range(0, len(same), rows)
    ]


@dataclass(slots=True)
class _Rows:
    """A batch that is being decoded. rows: tokens of each row, the one that ends it included."""

    tokens: mx.array
    cache: Any
    rows: list[list[int]]
    going: Array

    def take(self, logits: mx.array, stops: set[int]) -> None:
        """The best next token of each row that goes on. logits: [B, T, V]."""
        best = np.array(mx.argmax(logits[:, -1], axis=-1))
        for row in np.flatnonzero(self.going):
            self.rows[row].append(int(best[row]))
            self.going[row] = self.rows[row][-1] not in stops
        self.tokens = mx.array(best[:, None])


def _decode(
    model: nn.Module, prompts: Sequence[Tokens], stops: set[int], max_tokens: int, ctx: Context
) -> list[list[list[int]]]:
    """Tokens of each row of each batch of prompts [B, T]."""
    batches = [
        _Rows(
            mx.array(one),
            make_prompt_cache(model),
            [[] for _ in one],
            np.ones(len(one), dtype=np.bool_),
        )
        for one in prompts
    ]
    for _ in range(max_tokens):
        ctx.check()
        going = [batch for batch in batches if batch.going.any()]
        if not going:
            break
        steps = [(batch.tokens, batch.cache) for batch in going]
        for batch, logits in zip(going, one_step(model, steps, ctx), strict=True):
            batch.take(logits, stops)
    return [batch.rows for batch in batches]
