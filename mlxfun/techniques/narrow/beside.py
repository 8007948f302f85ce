"""MLPs beside the routed experts made narrower: shared experts, and the MLPs of dense layers.

Every token passes them, so all that is needed of the calibration text is H^T H of the neurons, which
one pass of plain forwards adds up. With D^T = W [N, D] the output projection and K the neurons that
stay, the projection that comes closest to what the MLP put out is

    W'_K = ((H^T H)_KK + mu I)^-1 ((H^T H)_K: W + mu W_K),    mu = RIDGE x mean(diag(H^T H))
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxfun.context import Context
from mlxfun.data.datasets import Batch
from mlxfun.errors import PlanError
from mlxfun.hooks.elsewhere import Task
from mlxfun.hooks.forwards import Watch, each_forward
from mlxfun.hooks.intercept import Hooks
from mlxfun.hooks.pace import Pace
from mlxfun.model.anatomy.width import mlp_key
from mlxfun.model.delta import LayerDelta
from mlxfun.model.export import NAMES
from mlxfun.model.identity import Rows
from mlxfun.model.mlps import Mlp, MlpKind
from mlxfun.model.parameters import (
    Stored,
    dequantised,
    packed_group,
    requantised,
    row_digests,
    sliced_matrix,
)
from mlxfun.techniques.narrow.neurons import kept_by_obs, kept_by_size
from mlxfun.techniques.narrow.options import Method
from mlxfun.techniques.refit.least_squares import inverse_of
from mlxfun.techniques.workspace import Workspace

if TYPE_CHECKING:
    from mlxfun.arrays import Array

RIDGE = 0.01


@dataclass(frozen=True, slots=True)
class How:
    """method: how neurons are chosen, "mean" like "rms"; refit: whether output projections are
    fitted; repack: whether packed ones may lose single neurons and are packed anew."""

    method: Method
    refit: bool
    repack: bool


@dataclass(frozen=True, slots=True)
class Target:
    """MLPs of one kind that become narrower: neurons before and after."""

    kind: MlpKind
    mlps: tuple[Mlp, ...]
    before: int
    width: int

    def words(self) -> str:
        """As it is reported."""
        return f"{NAMES[self.kind]} {self.before} -> {self.width}"


def targets(
    workspace: Workspace, kinds: Sequence[MlpKind], experts: tuple[int, int], repack: bool
) -> tuple[Target, ...]:
    """The MLPs of those kinds, by the fraction of the experts, whose neurons go from and to
    `experts`. Raises PlanError where config.json cannot say it, or the MLPs cannot be sliced.
    """
    return tuple(_target(workspace, kind, experts, repack) for kind in kinds)


def _target(workspace: Workspace, kind: MlpKind, experts: tuple[int, int], repack: bool) -> Target:
    modules = workspace.resident.tree.modules
    mlps = tuple(mlp for mlp in workspace.resident.mlps if mlp.kind == kind)
    name = NAMES[kind]
    if not mlps:
        raise PlanError(f"the model has nothing that is known as {name}; leave out --{kind}")
    widths = {mlp.width(modules) for mlp in mlps}
    if len(widths) > 1:
        raise PlanError(f"{name} have {sorted(widths)} neurons; narrow needs one width")
    fused = next((f"{mlp.path}.{mlp.fused}" for mlp in mlps if mlp.fused is not None), None)
    if fused is not None or any(not mlp.inward for mlp in mlps):
        where = fused or mlps[0].path
        raise PlanError(f"{name} have projections that narrow does not know how to slice ({where})")
    before, (wide, narrow) = widths.pop(), experts
    group = 1 if repack else max(packed_group(modules[f"{m.path}.{m.outward}"]) for m in mlps)
    width = max(group, round(before * narrow / wide / group) * group)
    if kind == "shared" and before % wide == 0:
        # As many times as wide as an expert, which is how most configs say it.
        width = before // wide * narrow
    elif before == wide:
        width = narrow
    if width % group:
        raise PlanError(f"{name} are packed in groups of {group}, so {width} neurons cannot be cut")
    return Target(kind, mlps, before, width)


def require_key(config: dict[str, Any], target: Target) -> None:
    """Raise PlanError unless a key of config.json sizes those MLPs and nothing else."""
    mlp_key(config, [mlp.path for mlp in target.mlps], target.before, NAMES[target.kind])


# -- measuring --------------------------------------------------------------------------------


@dataclass(slots=True)
class _Sums:
    """H^T H of each MLP of one batch, float32 [N, N], lazy. mask: float32 [T, 1], real tokens."""

    mask: mx.array
    seen: dict[int, list[mx.array]] = field(default_factory=dict)
    pace: Pace = field(default_factory=Pace)

    def add(self, number: int, own: Any, neurons: mx.array) -> mx.array:
        """The output projection of an MLP is given its neurons [..., N]."""
        h = neurons.reshape(-1, neurons.shape[-1]).astype(mx.float32) * self.mask
        product = h.T @ h
        self.pace(product)
        self.seen.setdefault(number, []).append(product)
        out: mx.array = own(neurons)
        return out


def products(
    workspace: Workspace, mlps: Sequence[Mlp], batches: Sequence[Batch], ctx: Context
) -> list[Array]:
    """H^T H of each MLP over all real tokens, float64 [N, N]."""
    model = workspace.model
    modules = dict(model.named_modules())

    def watch(batch: Batch) -> Watch[list[Array]]:
        mask = mx.array(batch.mask.reshape(-1, 1).astype(np.float32))
        sums = _Sums(mask)

        def run() -> list[Array]:
            model(mx.array(batch.tokens))
            found = [
                sum(sums.seen[number][1:], sums.seen[number][0]) for number in range(len(mlps))
            ]
            mx.eval(found)
            sums.pace.end()
            return [np.array(product) for product in found]

        return Watch(run, partial(_watching, modules, mlps, sums), sums.seen)

    totals: list[Array] = []
    for _, found in each_forward(
        workspace.model,
        workspace.anatomy,
        batches,
        watch,
        ctx,
        Task("measuring MLPs beside the experts"),
    ):
        new = [product.astype(np.float64) for product in found]
        totals = [a + b for a, b in zip(totals, new, strict=True)] if totals else new
    return totals


@contextmanager
def _watching(modules: Mapping[str, nn.Module], mlps: Sequence[Mlp], sums: _Sums) -> Iterator[None]:
    hooks = Hooks(modules)
    for number, mlp in enumerate(mlps):
        # Not required: of a model on disk the layers run one at a time.
        path = f"{mlp.path}.{mlp.outward}"
        hooks.on_call(path, partial(sums.add, number), required=False)
    with hooks:
        yield


# -- making -----------------------------------------------------------------------------------


def narrowed_mlp(
    modules: Mapping[str, nn.Module],
    mlp: Mlp,
    product: Array,
    width: int,
    how: How,
    stored: Stored,
) -> tuple[LayerDelta, float]:
    """What replaces an MLP's arrays, and the squared error of its output relative to its square.

    product: H^T H, float64 [N, N].
    """
    module = modules[f"{mlp.path}.{mlp.outward}"]
    group = 1 if how.repack else packed_group(module)
    outward = np.array(dequantised(module)).T  # [N, D]
    kept = _kept(product, outward, width, how.method, group)
    arrays: dict[str, mx.array] = {}
    for name in mlp.inward:
        for leaf, array in sliced_matrix(modules[f"{mlp.path}.{name}"], kept, True).items():
            arrays[f"{mlp.path}.{name}.{leaf}"] = mx.contiguous(array)
    path = f"{mlp.path}.{mlp.outward}"
    # Whole groups are cut out as they are: nothing of them can be fitted.
    weight = _fitted(product, outward, kept) if how.refit and group == 1 else outward[kept]
    if group == 1:
        new = requantised(module, mx.array(weight.T), lambda leaf: stored(f"{path}.{leaf}"))
        if "bias" in module:
            new["bias"] = module["bias"]
    else:
        new = sliced_matrix(module, kept, False)
    arrays |= {f"{path}.{leaf}": mx.contiguous(array) for leaf, array in new.items()}
    mx.eval(list(arrays.values()))
    rows = {p: Rows.of(row_digests(array[None], stored(p))) for p, array in arrays.items()}
    delta = LayerDelta(None, arrays=arrays, rows=rows, made=frozenset(arrays))
    return delta, _error(product, outward, kept, weight)


def _kept(product: Array, outward: Array, width: int, method: Method, group: int) -> Array:
    """The neurons that stay, int [W], ascending."""
    if method == "obs":
        gram = outward @ outward.T
        return np.asarray(kept_by_obs(product[None], gram[None], width, group)[0])
    size = np.sqrt(product.diagonal()) * np.linalg.norm(outward, axis=1)
    return kept_by_size(size, width, group)


def _fitted(product: Array, outward: Array, kept: Array) -> Array:
    """W'_K, float32 [W, D]; see the module's text."""
    mu = max(RIDGE * float(product.diagonal().mean()), 1e-12)
    inverse = inverse_of(product[np.ix_(kept, kept)], mu)
    found: Array = inverse @ (product[kept] @ outward + mu * outward[kept])
    return found.astype(np.float32)


def _error(product: Array, outward: Array, kept: Array, weight: Array) -> float:
    rest = outward.astype(np.float64)
    whole = float(np.sum(rest * (product @ rest)))
    rest[kept] -= weight
    return float(np.sum(rest * (product @ rest))) / max(whole, 1e-30)


def along(found: Collection[Target]) -> list[str]:
    """The paths of all MLPs that become narrower."""
    return [mlp.path for target in found for mlp in target.mlps]
