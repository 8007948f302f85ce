"""Finds the token embedding, the final norm and the output head of a model."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
import mlx.nn as nn

from mlxfun.model.anatomy import facts
from mlxfun.model.anatomy.types import Head

Modules = Mapping[str, nn.Module]


def embedding(modules: Modules) -> str | None:
    """Path of the token embedding: the one with the best known name, else the one with most rows."""
    found = [
        path
        for path, module in modules.items()
        if isinstance(module, nn.Embedding | nn.QuantizedEmbedding) and _outside(path)
    ]
    for name in facts.EMBEDDING_NAMES:
        for path in found:
            if path.rpartition(".")[2] == name:
                return path
    return max(found, key=lambda path: int(modules[path].weight.shape[0]), default=None)


def vocabulary(modules: Modules, path: str | None) -> int | None:
    """Rows of the token embedding at `path`, None without one."""
    return None if path is None else int(modules[path].weight.shape[0])


def hidden_size(modules: Modules, path: str | None, norm: str | None) -> int | None:
    """D, the width of the residual stream: that of the final norm, else of the token embedding."""
    weight = None if norm is None else modules[norm].get("weight")
    if isinstance(weight, mx.array) and weight.ndim == 1:
        return int(weight.shape[0])
    if path is None:
        return None
    module = modules[path]
    # A quantised weight is packed: its last dimension is not the width.
    return int(module.dims if isinstance(module, nn.QuantizedEmbedding) else module.weight.shape[1])


def final_norm(modules: Modules) -> str | None:
    """Path of the norm behind the last decoder layer, None where it has no module of its own."""
    for name in facts.FINAL_NORMS:
        for path, module in modules.items():
            if path.rpartition(".")[2] == name and _outside(path) and _is_norm(module):
                return path
    return None


def head(modules: Modules) -> Head | None:
    """The output head: an lm_head outside the layers, else the tied embedding.

    None for a model that multiplies a bare array (talkie): nothing could be seen there.
    """
    for name in facts.HEAD_NAMES:
        for path, module in modules.items():
            if path.rpartition(".")[2] == name and _outside(path):
                found = _linear(modules, path, module)
                if found is not None:
                    return Head(found, tied=False)
    if isinstance(modules[""].get("lm_head"), mx.array):
        return None
    tied = embedding(modules)
    return Head(tied, tied=True) if tied is not None else None


def _linear(modules: Modules, path: str, module: nn.Module) -> str | None:
    """The module that makes logits: the one named as a head, or the one Linear in it (phixtral)."""
    if "weight" in module:
        return path
    inside = [p for p, m in modules.items() if p.startswith(f"{path}.") and _is_linear(m)]
    return inside[0] if len(inside) == 1 else None


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.QuantizedLinear)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _outside(path: str) -> bool:
    """Whether a path leads to something that is in no list, as decoder layers are."""
    return not any(part.isdigit() for part in path.split("."))
