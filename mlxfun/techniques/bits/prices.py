"""What each module costs with each number of bits: bytes as saved, and expected KL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.checkpoint.bits_plan import Layout
from mlxfun.model.device.memory import free_bytes
from mlxfun.techniques.bits.fisher import as_head, use_of
from mlxfun.techniques.bits.options import UNPACKED, BitsOptions
from mlxfun.techniques.workspace import Workspace

SAFE = 8
"""Bits of what the sensitivities do not cover: routers, whose choice has no gradient, modules of other
kinds, and those that no token reached."""


KEPT_SHARE = 0.25
"""Of the memory that is free, what errors may be kept in."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A module that can be packed. name: of the module as saved; path: in the model. shape: of its
    weight as saved. rows: of the resident stack, None for all. layout: what the architecture asks for,
    None where there is a choice. sizes: {bits: bytes as saved}."""

    name: str
    path: str
    shape: tuple[int, ...]
    rows: tuple[int, ...] | None
    layout: Layout | None
    sizes: Mapping[int, int] = field(default_factory=dict)

    @property
    def projection(self) -> str:
        """The last part of its name, by which modules of several layers are alike."""
        return self.name.rpartition(".")[2]


def packed_size(shape: Sequence[int], bits: int, group: int, scale_bytes: int) -> int:
    """Bytes of a packed weight [..., in]: words of 32 bits, with a scale and a bias for each group."""
    rows, width = int(np.prod(shape[:-1])), shape[-1]
    return rows * (width * bits // 8 + 2 * width // group * scale_bytes)


def candidates(workspace: Workspace, options: BitsOptions) -> list[Candidate]:
    """What mlx_lm's quantize_model would pack in groups of this size, in the order of the model."""
    view, modules = workspace.export(), workspace.resident.tree.modules
    stacks = {
        p.path: moe.rows for moe in workspace.resident.layers for p in moe.layer.expert_parameters()
    }
    predicate = getattr(workspace.model, "quant_predicate", None)
    found = []
    for name in view.names:
        path = view.path(name)
        owner = path.rpartition(".")[0]
        module = modules[owner]
        shape = view.shape(name)
        if not name.endswith(".weight") or not hasattr(module, "to_quantized"):
            continue
        if shape[-1] % options.group_size:
            continue
        asked = True if predicate is None else predicate(owner, module)
        if not asked:
            continue
        layout: Layout | None = dict(asked) if isinstance(asked, dict) else None
        one = Candidate(name.removesuffix(".weight"), owner, shape, stacks.get(path), layout)
        found.append(_sized(one, view.nbytes(name), view.dtype(name).size, options))
    return found


def _sized(one: Candidate, held: int, scale_bytes: int, options: BitsOptions) -> Candidate:
    def size(bits: int, group: int) -> int:
        return held if bits == UNPACKED else packed_size(one.shape, bits, group, scale_bytes)

    if one.layout is not None:
        bits = int(one.layout["bits"])
        sizes = {bits: size(bits, group_of(one.layout))}
    else:
        sizes = {bits: size(bits, options.group_size) for bits in options.choices}
    return Candidate(one.name, one.path, one.shape, one.rows, one.layout, sizes)


def group_of(layout: Layout) -> int:
    """The group size that an architecture asks for; mlx's own where it names none."""
    return int(layout.get("group_size", 64))


def covered(
    one: Candidate, module: nn.Module, sums: Mapping[str, mx.array], routers: set[str]
) -> bool:
    """Whether the sums say what an error in a module costs."""
    if one.layout is not None or one.path in routers or use_of(module) is None:
        return False
    return any(float(np.array(mx.max(part))) > 0 for part in _parts(one, sums))


def _parts(one: Candidate, sums: Mapping[str, mx.array]) -> list[mx.array]:
    return [sums[key] for key in (one.path, as_head(one.path)) if key in sums]


def packed_choices(options: BitsOptions) -> tuple[int, ...]:
    """The choices that pack."""
    return tuple(bits for bits in options.choices if bits != UNPACKED)


def errors_of(workspace: Workspace, path: str, options: BitsOptions) -> list[mx.array]:
    """What packing changes of a module's weight, squared, for each of `packed_choices`, float32, lazy."""
    weight = workspace.resident.tree.modules[path]["weight"]
    stored, wide = workspace.stored(f"{path}.weight"), weight.astype(mx.float32)
    group = options.group_size
    packed = (unpacked(weight, bits, group, stored) for bits in packed_choices(options))
    return [mx.square(wide - one) for one in packed]


class Errors:
    """`errors_of` any module, kept from batch to batch where there is room for those of all."""

    def __init__(
        self, workspace: Workspace, found: Sequence[Candidate], options: BitsOptions
    ) -> None:
        self._workspace, self._options = workspace, options
        values = sum(workspace.resident.tree.modules[one.path]["weight"].size for one in found)
        free = free_bytes()
        needed = 4 * values * len(packed_choices(options))
        self._known: dict[str, list[mx.array]] | None = (
            {} if free is None or needed <= KEPT_SHARE * free else None
        )

    def __call__(self, path: str) -> list[mx.array]:
        if self._known is None:
            return errors_of(self._workspace, path, self._options)
        if path not in self._known:
            made = errors_of(self._workspace, path, self._options)
            mx.eval(made)
            self._known[path] = made
        return self._known[path]


def expected_kl(
    one: Candidate, sums: Mapping[str, mx.array], tokens: int, options: BitsOptions
) -> dict[int, float]:
    """{bits: expected KL in nats a token}, see mlxfun.techniques.bits.fisher."""
    total = sum(np.array(part) for part in _parts(one, sums)) / (2 * tokens)
    found = dict(zip(packed_choices(options), np.atleast_1d(total).tolist(), strict=True))
    return {bits: found.get(bits, 0.0) for bits in one.sizes}


def unpacked(weight: mx.array, bits: int, group: int, stored: mx.Dtype) -> mx.array:
    """The values that a weight stands for once it is packed as `save` packs it, float32."""
    words, scales, biases = mx.quantize(weight.astype(stored), group_size=group, bits=bits)
    return mx.dequantize(
        words, scales.astype(mx.float32), biases.astype(mx.float32), group_size=group, bits=bits
    )
