"""Tiny models on disk, whole and with some of their experts in slots."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import tiny_models
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlxfun.checkpoint.headers import read_headers
from mlxfun.checkpoint.identity import stamps
from mlxfun.checkpoint.load import _evaluate, estimate_bytes, needs_float32
from mlxfun.checkpoint.on_disk import Lazy, set_aside
from mlxfun.checkpoint.options import LoadOptions
from mlxfun.context import SILENT
from mlxfun.memory.slots.partly import Partly
from mlxfun.memory.slots.slots import ExpertSlots
from mlxfun.model.parameters import flatten

LISTED = {"dbrx"}
"""Families whose experts are no stacks."""
FAMILIES = tuple(name for name in tiny_models.RUNNABLE if name not in LISTED)
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8]


def on_disk(path: Path, model: nn.Module, config: dict[str, Any], shards: int = 1) -> Path:
    """The model as a checkpoint."""
    path.mkdir(parents=True, exist_ok=True)
    arrays = dict(flatten(model.parameters()))
    names = list(arrays)
    for i in range(shards):
        part = {name: arrays[name] for name in names[i::shards]}
        mx.save_safetensors(str(path / f"model-{i + 1:05d}-of-{shards:05d}.safetensors"), part)
    (path / "config.json").write_text(json.dumps(config))
    return path


def unread(path: Path) -> Lazy:
    """The checkpoint as `load` opens it before anything is read."""
    headers = read_headers(path)
    model, config = load_model(path, lazy=True)
    estimate = estimate_bytes(headers, config)
    return Lazy(model, config, headers, stamps(path), estimate, needs_float32(model))


def whole_model(path: Path) -> nn.Module:
    """The checkpoint as mlxfun holds it when it is loaded whole."""
    lazy = unread(path)
    model = lazy.model
    _evaluate(lazy, frozenset(), SILENT)
    return model


@dataclass
class Slotted:
    """The checkpoint with `slots` experts of each layer in memory."""

    model: nn.Module
    slots: ExpertSlots
    partly: Partly

    @classmethod
    def open(cls, path: Path, capacity: int | None, **more: Any) -> Self:
        lazy = unread(path)
        model, partly = lazy.model, Partly(LoadOptions(capacity=capacity, **more))
        left = partly(lazy)
        assert left
        set_aside(lazy, left)
        _evaluate(lazy, left, SILENT)
        return cls(model, ExpertSlots(model, partly), partly)

    @property
    def evictions(self) -> int:
        return sum(layer.bank.evictions for layer in self.slots.layers)

    def close(self) -> None:
        self.slots.close()


def logits(model: Any, tokens: list[list[int]]) -> Any:
    """Logits [N, T, V] as bytes can be compared."""
    out = model(mx.array(tokens)).astype(mx.float32)
    mx.eval(out)
    return np.array(out)


def continued(model: Any, prompt: list[int], count: int) -> list[int]:
    """The most likely `count` tokens after `prompt`, one by one with a cache."""
    cache = make_prompt_cache(model)
    token, found = mx.array([prompt]), []
    for _ in range(count):
        out = model(token, cache=cache)[:, -1]
        best = int(mx.argmax(out, axis=-1).item())
        found.append(best)
        token = mx.array([[best]])
    return found


@contextmanager
def cut_short(file: Path) -> Iterator[None]:
    """A file without its second half inside the block, and as it was behind it."""
    before, kept = file.stat(), file.read_bytes()
    os.truncate(file, len(kept) // 2)
    try:
        yield
    finally:
        file.write_bytes(kept)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def unstacked(path: Path, rename: dict[str, str]) -> Path:
    """The checkpoint at `path` with the experts of each stack as tensors of their own, as the Hub
    has them. rename: beginning of the stacks' names behind the layer -> that of the experts', with
    a place for the expert's number: {"mlp.switch_mlp.": "mlp.experts.{e}."}."""
    arrays: dict[str, mx.array] = {}
    for file in sorted(path.glob("model*.safetensors")):
        arrays |= mx.load(str(file))  # type: ignore[operator]
        mx.eval(arrays)
        file.unlink()
    made: dict[str, mx.array] = {}
    for name, array in arrays.items():
        old = next((beginning for beginning in rename if beginning in name), None)
        if old is None:
            made[name] = array
            continue
        for e in range(array.shape[0]):
            made[name.replace(old, rename[old].format(e=e))] = mx.contiguous(array[e])
    half = len(made) // 2
    for i, names in enumerate((list(made)[:half], list(made)[half:])):
        part = {name: made[name] for name in names}
        mx.save_safetensors(str(path / f"model-{i + 1:05d}-of-00002.safetensors"), part)
    return path
