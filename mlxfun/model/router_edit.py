"""New router parameters of one layer, as a delta."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.errors import PlanError
from mlxfun.model.delta import LayerDelta, Resident
from mlxfun.model.identity import Rows
from mlxfun.model.live_experts import LiveExperts
from mlxfun.model.parameters import Stored, finite, requantised, rounded, row_digests


@dataclass(frozen=True, slots=True)
class RouterEdit:
    """Makes deltas of router parameters. stored: the dtypes on disk."""

    resident: Resident
    stored: Stored

    def replaced(self, moe: LiveExperts, path: str, new: mx.array) -> LayerDelta:
        """A delta that puts `new`, float32, in place of the parameter at `path`."""
        held = self.resident.tree.get(path)
        return self.delta(moe, {path: rounded(new, self.stored(path), held.dtype)})

    def weights(self, module: nn.Module, path: str, weight: mx.array) -> dict[str, mx.array]:
        """The arrays by path that hold `weight`, float32 [R, D], in the router module at `path`:
        rounded to, or packed in, what they are stored in."""
        if "scales" not in module:
            held = module["weight"]
            return {f"{path}.weight": rounded(weight, self.stored(f"{path}.weight"), held.dtype)}
        single: Any = _Single(module)
        packed = requantised(single, weight[None], lambda leaf: self.stored(f"{path}.{leaf}"))
        return {f"{path}.{leaf}": a.reshape(module[leaf].shape) for leaf, a in packed.items()}

    def delta(self, moe: LiveExperts, arrays: dict[str, mx.array]) -> LayerDelta:
        """A delta that puts `arrays` in place; rows that stayed as they were keep their identity.

        Raises PlanError for values that are not finite.
        """
        mx.eval(list(arrays.values()))
        for path, array in arrays.items():
            if not finite(array):
                raise PlanError(
                    f"layer {moe.layer.index}: {path} would hold NaN or infinity; boost by less, "
                    "or on text that the model computes finite activations for"
                )
        rows: dict[str, Rows | None] = {}
        for path, array in arrays.items():
            rows[path] = self._identities(path, array)
        return LayerDelta(
            position=moe.layer.position,
            live=moe.live,
            resident=self.resident.stack[moe.layer.position],
            arrays=dict(arrays),
            rows=rows,
            made=frozenset(arrays),
        )

    def _identities(self, path: str, array: mx.array) -> Rows | None:
        """Identities of an array's rows: those that stayed keep theirs."""
        held, known = self.resident.tree.get(path), self.resident.ledger.get(path)
        if not array.ndim:
            return Rows.of(row_digests(array.reshape(1), self.stored(path)))
        count = array.shape[0]
        ids: list[Any] = list(known.ids) if known is not None else list(range(count))
        same = np.array(mx.all((array == held).reshape(count, -1), axis=1))
        digests = row_digests(array, self.stored(path))
        ids = [old if stays else new for old, new, stays in zip(ids, digests, same, strict=True)]
        return known if bool(same.all()) else Rows.of(ids)


class _Single:
    """A two-dimensional projection as a stack of one, which is how surgery packs."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def __contains__(self, name: str) -> bool:
        return name in self._module

    def __getitem__(self, name: str) -> Any:
        return self._module[name]

    def get(self, name: str) -> Any:
        return self._module.get(name)
