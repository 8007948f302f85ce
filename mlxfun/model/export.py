"""The model as it would be saved: names, tensors and config, with pruned experts removed.

Tensors are made one at a time, so writing needs the memory of one of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, get_args

import mlx.core as mx
import mlx.nn as nn

from mlxfun.model.anatomy import MoELayer, MoEMap
from mlxfun.model.anatomy.width import mlp_key, width_keys, with_value
from mlxfun.model.delta import Resident
from mlxfun.model.mlps import MlpKind
from mlxfun.model.parameters import flatten, nbytes_as, take_rows, unpacked_shape

NAMES: Mapping[MlpKind, str] = {"shared": "the shared experts", "dense": "the dense layers"}


class Aside(Protocol):
    """A whole tensor that is on disk; FromFile is one."""

    def lazy(self) -> mx.array:
        """The tensor, in the dtype it is stored in."""


class ExportView:
    """Read-only view of a resident model's live side as the checkpoint it would become.

    stored: each parameter's own dtype on disk (the CPU backend holds 16-bit models in float32).
    aside: path -> the tensor on disk, of parameters whose place in the model a placeholder has.
    """

    def __init__(
        self,
        model: nn.Module,
        resident: Resident,
        anatomy: MoEMap,
        stored: Mapping[str, mx.Dtype],
        aside: Mapping[str, Aside] | None = None,
    ) -> None:
        self.model = model
        self._aside = aside or {}
        self._resident = resident
        self._anatomy = anatomy
        self._stored = stored
        if any(layer.experts_list for layer in anatomy.layers):
            # Compacting renumbers a list of expert modules, and with it the paths.
            self._arrays = dict(flatten(model.parameters()))
        else:
            self._arrays = {path: resident.tree.get(path) for path in resident.tree.paths}
        self._layer_of: dict[str, MoELayer] = {
            p.path: layer for layer in anatomy.layers for p in layer.expert_parameters()
        }
        self._names = dict(self._named())

    def _named(self) -> Iterator[tuple[str, str]]:
        """(name when saved, path in the model): only dbrx's expert list changes names."""
        lists = {layer.experts: layer for layer in self._anatomy.layers if layer.experts_list}
        for path in self._arrays:
            owner = next((e for e in lists if path.startswith(f"{e}.")), None)
            if owner is None:
                yield path, path
                continue
            row, _, rest = path[len(owner) + 1 :].partition(".")
            rows = self._rows(lists[owner])
            if int(row) in rows:
                yield f"{owner}.{rows.index(int(row))}.{rest}", path

    def _rows(self, layer: MoELayer) -> tuple[int, ...]:
        return self._resident.layers[layer.position].rows

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names as saved, in the model's order."""
        return tuple(self._names)

    def path(self, name: str) -> str:
        """Where the parameter that is saved as `name` is in the model."""
        return self._names[name]

    def dtype(self, name: str) -> mx.Dtype:
        """The dtype `name` is saved with: the one it was loaded with."""
        path = self._names[name]
        return self._stored.get(path, self._arrays[path].dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of `tensor(name)`, without making it."""
        path = self._names[name]
        whole, layer = tuple(self._arrays[path].shape), self._layer_of.get(path)
        return whole if layer is None else (len(self._rows(layer)), *whole[1:])

    def tensor(self, name: str) -> mx.array:
        """The tensor to save, sliced to the live experts and in its stored dtype."""
        path = self._names[name]
        array = self._aside[path].lazy() if path in self._aside else self._held(path)
        layer = self._layer_of.get(path)
        if layer is not None:
            array = take_rows(array, self._rows(layer))
        return array.astype(self.dtype(name))

    def _held(self, path: str) -> mx.array:
        """What the model holds; one that is on disk as an array that only the caller holds."""
        store = self._resident.store
        return self._arrays[path] if store is None else store.fresh(path)

    def nbytes(self, name: str) -> int:
        """Bytes of `tensor(name)`, without making it."""
        path = self._names[name]
        array = self._arrays[path]
        total = nbytes_as(array, self.dtype(name))
        layer = self._layer_of.get(path)
        if layer is None:
            return total
        return total // int(array.shape[0]) * len(self._rows(layer))

    def total_bytes(self) -> int:
        """Bytes of all tensors as saved."""
        return sum(self.nbytes(name) for name in self._names)

    def expert_bytes(self) -> tuple[int, ...]:
        """Per MoE layer, bytes that one living expert takes as saved, its router rows included."""
        shared: dict[tuple[int, int], int] = {}
        for name, path in self._names.items():
            owner = self._owner(path)
            if owner is not None:
                shared[owner] = shared.get(owner, 0) + self.nbytes(name)
        total = [0] * len(self._anatomy.layers)
        for (position, experts), size in shared.items():
            total[position] += size // experts
        return tuple(total)

    def _owner(self, path: str) -> tuple[int, int] | None:
        """(MoE layer's position, how many experts share it) of a parameter made of experts' parts."""
        layer = self._layer_of.get(path)
        for one in self._anatomy.layers if layer is None else ():
            if one.experts_list and path.startswith(f"{one.experts}."):
                layer = one
            elif path in {p.path for p in one.router_parameters()}:
                return one.position, int(self._arrays[path].shape[0])
        return None if layer is None else (layer.position, len(self._rows(layer)))

    def config(self, config: dict[str, Any]) -> dict[str, Any]:
        """`config` with the live expert count and the experts' width, if there are experts.

        Raises PlanError for a width that config.json cannot say.
        """
        if not self._anatomy.layers:
            return dict(config)
        live = len(self._resident.layers[0].live)
        if live != self._anatomy.num_experts:
            config = self._anatomy.with_count(config, live)
            for key in ("quantization", "quantization_config"):
                if isinstance(config.get(key), dict):
                    config[key] = self._renumbered(config[key])
        return dict(self._with_widths(config))

    def _with_widths(self, config: dict[str, Any]) -> dict[str, Any]:
        before, after = self._resident.checkpoint_widths[0], self._resident.expert_widths[0]
        if before == after or before is None or after is None:
            return config
        plain, resized = config, self._resident.resized_mlps
        keys = width_keys(plain, self._anatomy, before, [mlp.path for mlp, _ in resized])
        config = keys.written(config, after, self.shared_width())
        for kind in get_args(MlpKind):
            some = [(mlp, width) for mlp, width in resized if mlp.kind == kind]
            followed = keys.same or (kind == "shared" and keys.shared is not None)
            if some and not followed:
                (first, width), paths = some[0], [mlp.path for mlp, _ in some]
                key = mlp_key(plain, paths, width, NAMES[kind])
                config = with_value(config, key, first.width(self._resident.tree.modules))
        return config

    def shared_width(self) -> int | None:
        """Neurons of the shared expert, None without one."""
        for layer in self._anatomy.layers:
            for path in layer.shared:
                module = self._resident.tree.modules.get(f"{path}.down_proj")
                if module is not None:
                    return unpacked_shape(module)[-1]
        return None

    def _renumbered(self, settings: dict[str, Any]) -> dict[str, Any]:
        """Settings by module path, with the paths that listed experts are saved under."""
        lists = {layer.experts: layer for layer in self._anatomy.layers if layer.experts_list}
        found = {}
        for path, value in settings.items():
            owner = next((e for e in lists if path.startswith(f"{e}.")), None)
            if owner is None:
                found[path] = value
                continue
            number, _, rest = path[len(owner) + 1 :].partition(".")
            # Settings have the checkpoint's numbers, whatever was compacted meanwhile.
            live = self._resident.layers[lists[owner].position].live
            if number.isdecimal() and int(number) in live:
                found[f"{owner}.{live.index(int(number))}.{rest}"] = value
        return found

    def resident_arrays(self) -> tuple[mx.array, ...]:
        """Every parameter that is held in memory."""
        return tuple(array for path, array in self._arrays.items() if path not in self._aside)

    def parameter_count(self) -> int:
        """Values in the model as saved: packed weights unpacked, scales and pruned rows not counted."""
        bits: dict[str, int] = {
            path: int(module.bits)
            for path, module in self.model.named_modules()
            if "scales" in module
        }
        total = 0
        for path in self._names.values():
            owner, _, last = path.rpartition(".")
            if owner in bits and last in ("scales", "biases"):
                continue
            array = self._arrays[path]
            values = int(array.size)
            if owner in bits and last == "weight":
                values = values * 32 // bits[owner]
            layer = self._layer_of.get(path)
            if layer is not None:
                values = values // int(array.shape[0]) * len(self._rows(layer))
            total += values
        return total
