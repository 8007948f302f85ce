"""Verification of a saved model before it is renamed to its final path.

Stock mlx-lm must load the directory strictly, every tensor must come back bit for bit, and the
logits of a fixed probe must be those of the resident model; NaN and infinity are refused unless
the checkpoint has them already. Tensors are compared one at a time.
The second forward never holds the whole model: it runs layer by layer, and each layer's weights
are read when its turn comes and let go after it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_map
from mlx_lm.utils import load_model

from mlxfun.checkpoint.headers import read_headers
from mlxfun.checkpoint.load import LOAD_ERRORS, needs_float32, short
from mlxfun.checkpoint.on_disk import HALF
from mlxfun.checkpoint.sources import without_wildcards
from mlxfun.context import SILENT, Context
from mlxfun.errors import ModelError, SaveError
from mlxfun.hooks.pace import layers_let_go
from mlxfun.model.parameters import finite, flatten

PROBE_TOKENS = 48

LogitsFn = Callable[[mx.array], mx.array]


class Weights(Protocol):
    """The tensors of a model as they are to be written."""

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names in the order of the files."""

    def dtype(self, name: str) -> mx.Dtype:
        """The dtype that a tensor is written with."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""

    def nbytes(self, name: str) -> int:
        """Its bytes; all three are known without making it."""

    def tensor(self, name: str) -> mx.array:
        """The tensor, in the dtype it is written with. May be called more than once."""


@dataclass(frozen=True, slots=True)
class Source:
    """The checkpoint that a model was made from. changed: that it is not what was loaded any more,
    as a sentence's beginning; "" if it is."""

    path: Path
    changed: str = ""

    def asked(self, question: Callable[[nn.Module], bool]) -> tuple[bool | None, str]:
        """(the answer for the checkpoint, why there is none)."""
        if self.changed:
            return None, f"{self.changed} since the model was loaded from it"
        try:
            return question(_load(self.path)[0]), ""
        except (SaveError, RuntimeError, OSError) as error:
            return None, f"{self.path} cannot be read any more ({short(error)})"


def check(
    directory: Path,
    weights: Weights,
    source: Source,
    logits: LogitsFn | None = None,
    ctx: Context = SILENT,
) -> dict[str, str]:
    """Run the gate on a written directory; returns {check: outcome} for the report.

    source: the checkpoint it was made from; NaN and infinity that are not in there, or of which that
    cannot be told, are refused.
    logits: int32 [1, T] tokens -> [1, T, V] logits of the model that was saved, None to leave
    that comparison out.

    Raises SaveError naming the first difference, and Cancelled.
    """
    outcome = {"load": "ok"}
    names = set(weights.names)
    model, config = _load(directory)
    loaded = dict(flatten(model.parameters()))
    del model
    if missing := sorted(names - loaded.keys()) + sorted(loaded.keys() - names):
        raise SaveError(
            f"the saved model loads with other parameters than were saved, first {missing[0]}"
        )
    _compare_tensors(loaded, weights, source, ctx)
    outcome["tensors"] = f"{len(names)} identical"
    if logits is None:
        outcome["logits"] = "not compared"
        return outcome
    ctx.progress("gate: logits", 0, 1)
    tokens = probe_tokens(_vocabulary(config))
    found = forward(_load(directory)[0], tokens)
    if not same_bits(logits(tokens), found):
        raise SaveError(
            "the saved model's tensors are identical but its logits are not: config.json does not "
            "describe the model that was saved"
        )
    if not finite(found):
        _blame("the saved model's logits hold", "do", *_computes(source, tokens))
    ctx.progress("gate: logits", 1, 1)
    outcome["logits"] = "identical"
    return outcome


def probe_tokens(vocabulary: int) -> mx.array:
    """int32 [1, 48]: fixed tokens, enough of them to take the sorted path through the experts."""
    chosen = np.random.default_rng(48).integers(0, vocabulary, PROBE_TOKENS)
    return mx.array(chosen.astype(np.int32))[None]


def forward(model: nn.Module, tokens: mx.array) -> mx.array:
    """Evaluated logits of a lazily loaded model, cast for the CPU backend as `load` does.

    Its parameters are let go as the forward passes them; the model is unusable afterwards.
    """
    if needs_float32(model):
        model.update(tree_map(_widen, model.parameters()))
    with layers_let_go(model):
        result: mx.array = model(tokens)
    model.update(tree_map(lambda _: mx.zeros(0), model.parameters()))
    mx.eval(result)
    return result


def same_bits(first: mx.array, second: mx.array) -> bool:
    """Whether two arrays have one dtype, one shape and the same bits (NaN equals NaN)."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    a, b = (array.reshape(-1).view(mx.uint8) for array in (first, second))
    return bool(mx.array_equal(a, b).item())


def _load(directory: Path) -> tuple[nn.Module, dict[str, Any]]:
    try:
        read_headers(directory)
        with without_wildcards(directory) as plain:
            return load_model(plain, lazy=True, strict=True)
    except ModelError as error:
        raise SaveError(f"the saved model is damaged: {error}") from error
    except LOAD_ERRORS as error:
        raise SaveError(f"the saved model does not load with mlx-lm: {short(error)}") from error


def _compare_tensors(
    loaded: dict[str, mx.array], weights: Weights, source: Source, ctx: Context
) -> None:
    total = sum(weights.nbytes(name) for name in weights.names)
    done = 0
    for name in weights.names:
        ctx.check()
        expected = weights.tensor(name)
        # Popped, so that what was read for this comparison is freed after it.
        found = loaded.pop(name)
        if not same_bits(expected, found):
            raise SaveError(
                f"{name} was saved as {expected.dtype} {list(expected.shape)} and read back as "
                f"{found.dtype} {list(found.shape)} with other contents"
            )
        if not finite(expected):
            _blame(f"{name} holds", "does", *_sound(source, name))
        done += weights.nbytes(name)
        ctx.progress("gate: tensors", done, total, "B")


def _blame(what: str, verb: str, sound: bool | None, why: str) -> None:
    """Raise SaveError for what is not finite, unless the checkpoint's own is not.

    sound: whether that is finite; None where it cannot be read any more (`why` says so), which is
    no excuse, and no proof of an edit's guilt either.
    """
    if sound is None:
        raise SaveError(
            f"{what} NaN or infinity, and {why}, so whether that is an edit's doing cannot be told; "
            "put the checkpoint back as it was, or undo the edits"
        )
    if sound:
        raise SaveError(
            f"{what} NaN or infinity, which the checkpoint's {verb} not; undo the edit that "
            "brought it in"
        )


# Both are asked for what is not finite, hence hardly ever: the checkpoint is opened anew.


def _computes(source: Source, tokens: mx.array) -> tuple[bool | None, str]:
    """(whether the checkpoint's logits are free of NaN and infinity, why that is unknown)."""
    return source.asked(lambda model: finite(forward(model, tokens)))


def _sound(source: Source, name: str) -> tuple[bool | None, str]:
    """(whether the checkpoint has that tensor without NaN and infinity, why that is unknown)."""

    def whole(model: nn.Module) -> bool:
        original = dict(flatten(model.parameters())).get(name)
        return original is None or finite(original)

    return source.asked(whole)


def _widen(array: mx.array) -> mx.array:
    return array.astype(mx.float32) if array.dtype in HALF else array


def _vocabulary(config: dict[str, Any]) -> int:
    """A number of tokens that the model certainly has."""
    text = config.get("text_config")
    nodes = [config, text] if isinstance(text, dict) else [config]
    sizes = [node[key] for node in nodes for key in ("vocab_size", "num_vocab") if key in node]
    return min((size for size in sizes if isinstance(size, int)), default=32)
