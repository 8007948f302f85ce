"""Decides, while a model is being loaded, how many of its experts are held, and which stay on disk."""

from __future__ import annotations

from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.checkpoint.on_disk import Lazy
from mlxfun.checkpoint.options import LoadOptions
from mlxfun.errors import BudgetError, ModelError, UsageError
from mlxfun.memory.slots.bank import read
from mlxfun.memory.slots.reader import FileReader
from mlxfun.memory.slots.sources import REMEDY, LayerSource, find_sources
from mlxfun.model.anatomy import MoELayer
from mlxfun.model.anatomy.discover import discover
from mlxfun.model.device.memory import fits, free_bytes, require
from mlxfun.model.parameters import flatten
from mlxfun.text import readable_bytes

AUTO_SHARE = 0.8
"""Of what is free, what `auto` gives a model that does not fit whole. The rest is for what the
model computes, and for the system's cache of files, which answers many misses: others measured
larger shares to be slower."""


def whole(options: LoadOptions) -> bool:
    """Whether the options ask for nothing but the whole model in memory."""
    return options.resident == "all" and options.capacity is None


@dataclass(slots=True)
class Partly:
    """What `load` asks how much to hold; afterwards what was decided.

    layers: the layers whose experts are in slots, none where the model is held whole. sources: where
    the experts of each are. capacity: slots of each layer. whole_bytes: what the
    whole model takes; kept_bytes: what is held of it besides slots.
    """

    options: LoadOptions
    layers: tuple[MoELayer, ...] = ()
    sources: tuple[LayerSource, ...] = ()
    capacity: int = 0
    whole_bytes: int = 0
    kept_bytes: int = 0
    reader: FileReader | None = field(default=None, repr=False)

    def __call__(self, lazy: Lazy) -> frozenset[str]:
        """The parameters that stay on disk. Raises BudgetError, ModelError and UsageError."""
        o = self.options
        self.whole_bytes = lazy.estimate
        held_whole = o.capacity is None and (
            o.resident == "all" or (o.resident == "auto" and fits(lazy.estimate))
        )
        if held_whole:
            return frozenset()
        return self._decide(lazy)

    def _decide(self, lazy: Lazy) -> frozenset[str]:
        layers = discover(lazy.model, lazy.config).layers
        arrays = dict(flatten(lazy.model.parameters()))
        if not layers:
            raise UsageError(
                f"{lazy.config.get('model_type')} has no experts that could stay on disk: load it "
                "whole, without --resident and --capacity"
            )
        paths = [_stacks(layer, lazy.model) for layer in layers]
        each = [sum(_held(arrays[p], lazy.cast) for p in some) for some in paths]
        experts = [layer.num_experts for layer in layers]
        self.kept_bytes = max(lazy.estimate - sum(each), 0)
        one = sum(size // count for size, count in zip(each, experts, strict=True))
        top_k = max(layer.top_k for layer in layers)
        self.capacity = self._slots(one, max(experts), top_k)
        if self.capacity >= max(experts):
            return frozenset()
        self.layers = layers
        by_layer = {layer.index: some for layer, some in zip(layers, paths, strict=True)}
        self.sources = find_sources(lazy.model, by_layer, lazy.headers)
        stamps = {stamp.name: stamp for stamp in lazy.files}
        self.reader = FileReader([(h.path, stamps[h.path.name]) for h in lazy.headers])
        self._require_equal(arrays)
        return frozenset(path for some in paths for path in some)

    def _slots(self, one: int, experts: int, top_k: int) -> int:
        """How many slots a layer gets. one: bytes of one expert in every layer."""
        o, kept = self.options, self.kept_bytes
        if o.capacity is not None:
            if o.capacity < top_k:
                raise UsageError(
                    f"--capacity {o.capacity} holds fewer experts a layer than a token uses: give "
                    f"{top_k} to {experts}"
                )
            slots = min(o.capacity, experts)
        else:
            free = free_bytes()
            size = o.resident
            if not isinstance(size, int):
                size = int((self.whole_bytes if free is None else free) * AUTO_SHARE)
            slots = min((size - kept) // one, experts)
            if slots < top_k:
                raise BudgetError(
                    f"{readable_bytes(size)} hold {max(slots, 0)} experts a layer and a token uses "
                    f"{top_k}: this model needs {readable_bytes(kept)} for everything but experts "
                    f"and {readable_bytes(one)} for one expert in each layer, so at least "
                    f"{readable_bytes(kept + top_k * one)}"
                )
        need = kept + slots * one
        require(need, f"holding {slots} experts a layer", "give a smaller size or capacity")
        return slots

    def _require_equal(self, arrays: dict[str, mx.array]) -> None:
        """Compare experts of the first and the last layer, as stock loading makes them, with what is
        read here.

        Raises ModelError: a wrong place would be a wrong weight.
        """
        assert self.reader is not None
        for source in {id(one): one for one in (self.sources[0], self.sources[-1])}.values():
            some = sorted({0, source.experts // 2, source.experts - 1})
            rows = read(source.stacks, some, self.reader)
            for expert in some:
                made = source.made({name: row[None] for name, row in rows[expert].items()})
                for path in source.held:
                    stock = np.array(arrays[path][expert].reshape(-1).view(mx.uint8))
                    if not np.array_equal(stock, np.array(made[path].reshape(-1).view(mx.uint8))):
                        raise ModelError(
                            f"expert {expert} at {path} is not what its bytes on disk say "
                            f"({stock.size:,} bytes were compared); {REMEDY}"
                        )


def _stacks(layer: MoELayer, model: nn.Module) -> list[str]:
    """The stacked parameters of a layer's experts."""
    if layer.experts_list:
        raise ModelError(
            f"{layer.family} keeps its experts as separate modules, of which none can stay on disk; "
            "load it whole, with --resident all"
        )
    paths = [p.path for p in layer.expert_parameters()]
    known = set(paths)
    module = dict(model.named_modules())[layer.experts]
    other = [f"{layer.experts}.{name}" for name, _ in flatten(module.parameters())]
    strange = sorted(set(other) - known)
    if strange:
        raise ModelError(
            f"{strange[0]} of layer {layer.index} is not stacked by expert, so its experts cannot "
            "stay on disk; load the model whole, with --resident all"
        )
    return paths


def _held(array: mx.array, cast: bool) -> int:
    """Bytes of an array in memory."""
    wide = cast and array.dtype in (mx.bfloat16, mx.float16)
    return int(array.nbytes) * (2 if wide else 1)
