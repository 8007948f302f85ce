"""Model: any model that mlx-lm loads, dense or MoE, to look into and to intervene in.

from mlxfun import Model

model = Model.open("demo")
with model.trace("The capital of France is"):
    attention = model.layers[3].attn.output.save()
    experts = model.layers[3].experts[7].output.save()
    model.layers[4].mlp.output = 0.0
    logits = model.output.save()
logits.value
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

import mlx.nn as nn

from mlxfun.checkpoint.load import load
from mlxfun.checkpoint.options import LoadOptions
from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import Tokenizer
from mlxfun.model.live_experts import LiveExperts
from mlxfun.model.model_map import map_model
from mlxfun.tracing.node import Node
from mlxfun.tracing.parts import Parts
from mlxfun.tracing.tracer import Tracer


class Model(Tracer):
    """A loaded model. It belongs to the thread that opened it."""

    @classmethod
    def open(
        cls, source: str | Path, options: LoadOptions | None = None, ctx: Context = SILENT
    ) -> Self:
        """Load a local directory, a Hub id, or "demo" (the bundled model).

        Raises ModelError (missing, broken, unsupported) or BudgetError (does not fit).
        """
        o = options or LoadOptions()
        loaded = load(source, o.revision, ctx, o.chat_template, o.identities)
        return cls.of(loaded.model, loaded.config, loaded.tokenizer)

    @classmethod
    def of(cls, model: nn.Module, config: dict[str, Any], tokenizer: Tokenizer) -> Self:
        """Wrap a model that mlx-lm has loaded. Raises ModelError for an unknown architecture."""
        found = map_model(model, config)
        live = [LiveExperts(layer) for layer in found.experts.layers]
        return cls(Parts(model, found, tokenizer, live))

    @property
    def output(self) -> Node:
        """The logits."""
        return self.node("output")

    @output.setter
    def output(self, change: Any) -> None:
        self.edit("output", change)

    def __getattr__(self, attribute: str) -> Node:
        if attribute.startswith("_") or "parts" not in self.__dict__:
            raise AttributeError(attribute)
        return self.node(attribute)

    def __setattr__(self, attribute: str, value: Any) -> None:
        own = attribute.startswith("_") or attribute in ("parts", "output")
        if own:
            super().__setattr__(attribute, value)
        else:
            self.edit(attribute, value)
