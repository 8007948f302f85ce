"""The experts of a whole model in slots: attached to it, seeded, counted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import mlx.nn as nn
import numpy as np
from mlx_lm.models.switch_layers import SwitchGLU, SwitchMLP

from mlxfun.errors import HookError
from mlxfun.hooks.intercept import Hooks
from mlxfun.memory.slots.bank import ABSENT, Buffers, LayerBank
from mlxfun.memory.slots.layer import SlotLayer
from mlxfun.memory.slots.partly import Partly
from mlxfun.model.parameters import ParameterTree

if TYPE_CHECKING:
    from mlxfun.arrays import Array


class ExpertSlots:
    """Slots for every MoE layer of a model whose stacks are placeholders.

    Made by the thread that owns the model, like every array in it.
    """

    def __init__(self, model: nn.Module, decided: Partly) -> None:
        """Make the slots, empty. Raises HookError if a layer's experts would run without them."""
        assert decided.reader is not None
        self.decided, self._reader = decided, decided.reader
        tree = ParameterTree(model)
        self.layers = tuple(
            SlotLayer(
                number,
                LayerBank(
                    sources,
                    {path: tree.get(path).dtype for path in sources},
                    decided.capacity,
                    self._reader,
                ),
                tree.modules,
                self,
            )
            for number, sources in enumerate(decided.sources)
        )
        self._hooks = Hooks(tree.modules)
        for layer, answers in zip(decided.layers, self.layers, strict=True):
            self._hooks.on_call(layer.experts, answers, required=False)
        self._hooks.attach()
        self._require_all(model)

    def _require_all(self, model: nn.Module) -> None:
        """Every stack of experts belongs to a layer that answers from slots: a swap that misses one
        would run it on placeholders."""
        swapped = [layer.experts for layer in self.decided.layers]
        stacks = [
            path
            for path, module in model.named_modules()
            if isinstance(module, SwitchGLU | SwitchMLP)
        ]
        if sorted(swapped) == sorted(stacks):
            return
        self._hooks.detach()
        odd = sorted(set(swapped) ^ set(stacks)) or swapped
        raise HookError(
            f"{len(stacks)} layers have experts and {len(swapped)} are answered from slots; "
            f"{odd[0]} is not: load the model whole, with --resident all, and report the "
            "architecture"
        )

    def fill(self, wanted: Mapping[int, Sequence[int]]) -> None:
        """Have experts in slots before they are asked for. wanted: position of a layer -> experts,
        the most useful first; as many as there are slots."""
        for position, experts in wanted.items():
            bank = self.layers[position].bank
            bank.hold(list(dict.fromkeys(experts))[: bank.capacity])

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(layer.bank.nbytes for layer in self.layers)

    def resident(self, experts: int) -> Array:
        """bool [L, E], the experts that are in slots."""
        found = np.zeros((len(self.layers), experts), np.bool_)
        for row, layer in zip(found, self.layers, strict=True):
            row[: layer.bank.experts] = layer.bank.slot_of != ABSENT
        return found

    def close(self) -> None:
        """Give the layers their own classes back and close the files."""
        self._hooks.detach()
        self._reader.close()

    # -- told by the layers ---------------------------------------------------------------------

    def ready(self, position: int) -> dict[int, Buffers]:
        """See Watcher."""
        return {}

    def chosen(self, position: int, experts: Array) -> None:
        """See Watcher."""
