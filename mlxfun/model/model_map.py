"""The map of a model: decoder layers, embedding, norm and head, under canonical names.

    found = map_model(model, config)
    found.path("layers.3.attn.q")  # model.layers.3.self_attn.q_proj
    found.name("model.layers.3.mlp.down_proj")  # layers.3.mlp.down
    found.moe  # the map of its experts, None for a dense model

It exists for every model that mlx-lm loads, dense or MoE; see mlxfun.model.anatomy.names for the
names. Plain data, no arrays, safe to use in any thread.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import mlx.nn as nn

from mlxfun.errors import ModelError, StateError, UsageError
from mlxfun.model.anatomy import ends, facts
from mlxfun.model.anatomy.discover import discover
from mlxfun.model.anatomy.layers import decoder_layers, in_order
from mlxfun.model.anatomy.names import canonical_names
from mlxfun.model.anatomy.types import DecoderLayer, Head, MoEMap
from mlxfun.text import no_experts

NEAR = 5
"""How many names an error suggests."""


@dataclass(frozen=True, slots=True)
class ModelMap:
    """The parts of one model by path.

    layers: every decoder layer in order. embed: path of the token embedding, None where it is not
    a module. norm: path of the final norm, None where it has no module. head: None where the head
    is not a module. hidden_size: D, the width of the residual stream. vocabulary: rows of the token
    embedding. experts: the MoE layers, none in a dense model. paths: {canonical name: path}, one name for every
    module but the model itself. names: the same the other way round.
    """

    model_type: str
    layers: tuple[DecoderLayer, ...]
    embed: str | None
    norm: str | None
    head: Head | None
    hidden_size: int | None
    vocabulary: int | None
    experts: MoEMap
    paths: Mapping[str, str]
    names: Mapping[str, str]

    @property
    def moe(self) -> MoEMap | None:
        """The map of the experts, None for a dense model."""
        return self.experts if self.experts.layers else None

    def require_experts(self, action: str) -> None:
        """Raise StateError for a dense model. action: what needs experts, an infinitive."""
        if self.moe is None:
            raise StateError(no_experts(self.model_type, action))

    def path(self, name: str) -> str:
        """The path of a canonical name; a path is understood as well.

        Raises UsageError for an unknown name, with the names that are nearest to it.
        """
        if name in self.paths:
            return self.paths[name]
        if name in self.names:
            return name
        raise UsageError(self._unknown(name))

    def name(self, path: str) -> str:
        """The canonical name of a path. Raises UsageError for a path that leads to no module."""
        if path in self.names:
            return self.names[path]
        raise UsageError(self._unknown(path))

    def _unknown(self, name: str) -> str:
        if name == "head" and self.head is not None and self.head.tied:
            return (
                f"{self.model_type} has no head of its own: it is tied to the token embedding, "
                "which is named embed"
            )
        near = get_close_matches(name, [*self.paths, *self.names], n=NEAR, cutoff=0.5)
        near = list(dict.fromkeys(near)) or list(self.paths)[:NEAR]
        return f"{self.model_type} has no module {name!r}; near are {', '.join(near)}"


def map_model(model: nn.Module, config: dict[str, Any]) -> ModelMap:
    """Describe `model`, whose config.json is `config`.

    Raises ModelError where no decoder layers are found, and for architectures whose experts
    cannot be observed.
    """
    model_type = str(config.get("model_type", "unknown"))
    modules = in_order(model)
    experts = discover(model, config)
    layers = decoder_layers(modules, experts)
    if not layers:
        raise ModelError(
            f"cannot find the decoder layers of {model_type}: it has no list of modules with "
            f"one of {', '.join((*facts.MIXER_NAMES, *facts.MLP_NAMES))}; please report the "
            "architecture"
        )
    embed, norm, head = ends.embedding(modules), ends.final_norm(modules), ends.head(modules)
    named = {"embed": embed, "norm": norm, "head": None if head is None else head.path}
    paths = canonical_names(modules, layers, named)
    return ModelMap(
        model_type=model_type,
        layers=layers,
        embed=embed,
        norm=norm,
        head=head,
        hidden_size=ends.hidden_size(modules, embed, norm),
        vocabulary=ends.vocabulary(modules, embed),
        experts=experts,
        paths=paths,
        names={path: name for name, path in paths.items()},
    )
