"""What a model does to the output of its head, found out with a short forward."""

from __future__ import annotations

from contextlib import suppress
from typing import Literal

import mlx.core as mx
import mlx.nn as nn

from mlxfun.errors import ModelError
from mlxfun.hooks.head import HeadTap
from mlxfun.hooks.replay import STUB_ERRORS, passing_layers
from mlxfun.model.anatomy import MoEMap
from mlxfun.model.places import LayerStore

PROBED_TOKENS = 8

AfterHead = Literal["nothing", "changed", "unknown"]
"""What a model does to the output of its head: nothing; something that can be done again to the
logits of any hidden states; something that cannot."""


def after_head(model: nn.Module, anatomy: MoEMap, head: HeadTap | None) -> AfterHead:
    """See AfterHead. A model on disk is not read for it: what its layers do makes no difference."""
    if LayerStore.of(model) is not None:
        with suppress(*STUB_ERRORS), passing_layers(model, anatomy):
            return _found(model, head)
    return _found(model, head)


def _found(model: nn.Module, head: HeadTap | None) -> AfterHead:
    """What the model does to its head's output, by a forward of a few tokens."""
    if head is None:
        return "unknown"
    tokens = mx.array([list(range(PROBED_TOKENS))])
    with head.watching():
        logits: mx.array = model(tokens)
        seen = head.seen
    if seen is None or seen.shape[:-1] != logits.shape[:-1]:
        return "unknown"
    if _same(head.logits(seen)[0], logits[0]):
        return "nothing"
    return "changed" if _same(head.replayed(seen[0]), logits[0]) else "unknown"


def _same(again: mx.array, logits: mx.array) -> bool:
    close = again.shape == logits.shape and mx.allclose(again, logits, rtol=1e-4, atol=1e-5)
    return bool(close.item()) if isinstance(close, mx.array) else False


def repeatable_head(model: nn.Module, anatomy: MoEMap, instead: str) -> tuple[HeadTap, AfterHead]:
    """The tap of a head whose logits can be made again, and what the model does to them.

    instead: who needs that, and what there is for a model without. Raises ModelError.
    """
    head = None if anatomy.head is None else HeadTap(model, anatomy.head)
    after = after_head(model, anatomy, head)
    if head is None or after == "unknown":
        raise ModelError(
            f"{anatomy.model_type} makes its logits in a way that cannot be repeated from hidden "
            f"states, which {instead}"
        )
    return head, after


def no_gradient(model: nn.Module, error: Exception, instead: str) -> ModelError:
    """What to raise where MLX has none through the model. instead: what needs none."""
    family = model.__class__.__module__.rpartition(".")[2]
    return ModelError(
        f"MLX has no gradient through {family} ({str(error).split('. ')[0]}); {instead}"
    )
