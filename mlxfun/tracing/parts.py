"""What tracing needs of a resident model: its modules, its map, and which experts are live."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import mlx.nn as nn

from mlxfun.data.datasets import Tokenizer
from mlxfun.model.anatomy.types import DecoderLayer
from mlxfun.model.live_experts import LiveExperts
from mlxfun.model.model_map import ModelMap
from mlxfun.tracing.names import Names


@dataclass(frozen=True)
class Parts:
    """A resident model as tracing sees it.

    live: the live experts of each MoE layer, [L] (see mlxfun.model.live_experts).
    """

    model: nn.Module
    map: ModelMap
    tokenizer: Tokenizer
    live: Sequence[LiveExperts]

    @cached_property
    def modules(self) -> Mapping[str, nn.Module]:
        """{path: module}, the model itself under ""."""
        return dict(self.model.named_modules())

    @cached_property
    def names(self) -> Names:
        """The names of everything that can be looked at."""
        return Names(self.map, self.modules)

    def layer(self, index: int) -> DecoderLayer:
        """A decoder layer."""
        return self.map.layers[index]

    def experts(self, index: int) -> LiveExperts:
        """The live experts of decoder layer `index`, which must be an MoE layer."""
        moe = self.map.layers[index].moe
        assert moe is not None
        return self.live[moe.position]

    def forward(self, tokens: Any, cache: Any = None) -> Any:
        """The model's own forward."""
        model: Any = self.model
        return model(tokens) if cache is None else model(tokens, cache=cache)
