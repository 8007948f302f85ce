"""Narrowing as a technique: neurons are taken out of every expert, layer by layer, and the output
projections of a layer are fitted together to what the layer put out before.

Inputs and routing of each layer are those of the model before it was narrowed, so one pass over the
calibration text serves all layers. Routers stay. Stock mlx-lm loads the result, because
config.json has one number for the width of all experts (mlxfun.model.anatomy.width).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import mlx.core as mx

from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import Tokens, read_sequences
from mlxfun.data.options import dataset_words
from mlxfun.editing.plans import Provenance
from mlxfun.editing.reports import PlanReport, extended
from mlxfun.errors import PlanError, UsageError
from mlxfun.hooks.layerwise import Carrier
from mlxfun.model.anatomy.width import WidthKeys, width_keys
from mlxfun.model.delta import Delta, LayerDelta
from mlxfun.model.device.batch_size import batch_size
from mlxfun.model.device.memory import Need
from mlxfun.model.experts import Bank
from mlxfun.model.live_experts import LiveExperts
from mlxfun.model.mlps import MlpKind
from mlxfun.model.model_map import ModelMap
from mlxfun.model.parameters import packed_group
from mlxfun.techniques.narrow.beside import (
    How,
    Target,
    along,
    narrowed_mlp,
    products,
    require_key,
    targets,
)
from mlxfun.techniques.narrow.delta import choose, narrowed, padded_shared
from mlxfun.techniques.narrow.options import METHODS, NarrowOptions
from mlxfun.techniques.narrow.plan import NarrowPlan
from mlxfun.techniques.narrow.reports import NarrowReport
from mlxfun.techniques.refit.layerwise import Fit, Recalibration, observe
from mlxfun.techniques.refit.least_squares import energy, output
from mlxfun.techniques.refit.sizes import WIDE, Sizes
from mlxfun.techniques.technique import Proposal
from mlxfun.techniques.workspace import Workspace, collected_text
from mlxfun.text import counted, option_words, readable_bytes

if TYPE_CHECKING:
    from mlxfun.data.datasets import Batch

RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Sliced experts are close to what is wanted, so a refit needs less of a ridge than after a prune."""


class Narrow:
    """See mlxfun.techniques.technique.Technique."""

    def require(self, found: ModelMap) -> None:
        """Raise ModelError for a dense model."""
        found.require_experts("narrow")

    def plan(
        self, workspace: Workspace, options: NarrowOptions, command: str = "",
        ctx: Context = SILENT,
    ) -> Proposal:  # fmt: skip
        """Narrow layer by layer. Raises UsageError, StateError and PlanError ahead of the work."""
        _check(options)
        text = _text(workspace, options, ctx)
        with workspace.editor.live("base"), workspace.editor.unsteered():
            work = _Narrowing.of(workspace, options, text)
            workspace.require_room(
                work.estimate(),
                "narrowing",
                "use less text, or a quantised version of the model",
            )
            deltas = work.run(ctx)
        plan = work.plan()
        return Proposal(
            plan,
            Delta(tuple(deltas)),
            Provenance(
                command or command_line(options),
                workspace.source_commands if options.data is None else (),
                made_on=workspace.editor.state,
            ),
            describe=lambda report: _described(plan, report),
        )


def _text(workspace: Workspace, options: NarrowOptions, ctx: Context) -> Sequence[Tokens]:
    """What to judge on. Raises StateError where there is nothing, and DatasetError."""
    if options.data is not None:
        vocabulary = workspace.anatomy.vocabulary
        return read_sequences(options.data, workspace.tokenizer, vocabulary, ctx.reading())
    return collected_text(workspace, "narrow measures on")


def command_line(options: NarrowOptions) -> str:
    """The command that stages the same plan, for histories of library sessions."""
    words = ["narrow", *(dataset_words(options.data) if options.data is not None else ())]
    return shlex.join(words + option_words(replace(options, data=None), NarrowOptions()))


def _described(plan: NarrowPlan, report: PlanReport) -> PlanReport:
    return extended(
        NarrowReport,
        report,
        width_before=plan.width_before,
        width=plan.width,
        errors=dict(plan.errors),
        scarce=dict(plan.scarce),
        beside=dict(plan.beside),
    )


def _check(options: NarrowOptions) -> None:
    given = [options.width, options.fraction, options.to_bytes]
    if sum(value is not None for value in given) != 1:
        raise UsageError(
            "say how wide the experts shall be by one of --width W, --fraction F and --to-bytes SIZE"
        )
    if options.method not in METHODS:
        raise UsageError(f"--method {options.method}: choose one of {', '.join(METHODS)}")
    if options.fraction is not None and not 0 < options.fraction < 1:
        raise UsageError(
            f"--fraction {options.fraction:g} is the share of neurons that goes, between 0 and 1"
        )


@dataclass
class _Narrowing:
    """One pass over the layers. unit: widths are multiples of it. repack: whether packed output
    projections are packed anew. beside: MLPs that become narrower along with the experts."""

    workspace: Workspace
    options: NarrowOptions
    text: Sequence[Tokens]
    keys: WidthKeys
    before: int
    width: int
    unit: int
    repack: bool
    refits: bool
    beside: tuple[Target, ...] = ()
    scarce: dict[int, tuple[int, ...]] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)
    fits: list[Fit] = field(default_factory=list)
    beside_errors: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, workspace: Workspace, options: NarrowOptions, text: Sequence[Tokens]) -> _Narrowing:
        """The work, all that can be refused ahead of it refused."""
        resident = workspace.resident
        banks = [Bank.of(moe, resident.tree.modules) for moe in resident.layers]
        widths = {bank.width for bank in banks}
        if len(widths) > 1:
            raise PlanError(
                f"the layers have experts of {sorted(widths)} neurons; narrow needs one"
            )
        before = widths.pop()
        checkpoint = resident.checkpoint_widths[0]
        assert checkpoint is not None  # there is a bank for each layer
        unit = max(packed_group(bank.projection(bank.outward)) for bank in banks)
        width = _width(workspace, options, before, unit)
        packed = unit > 1
        repack = packed and options.requantize
        refits = options.refit and (repack or not packed)
        kinds: list[MlpKind] = ["shared"] if options.shared else []
        kinds += ["dense"] if options.dense else []
        beside = targets(workspace, kinds, (before, width), repack)
        keys = width_keys(workspace.config, workspace.anatomy, checkpoint, along(beside))
        for target in beside:
            if not keys.same and (target.kind != "shared" or keys.shared is None):
                require_key(workspace.config, target)
        return cls(workspace, options, text, keys, before, width, unit, repack, refits, beside)

    def batches(self) -> list[Batch]:
        """The calibration text."""
        workspace = self.workspace
        return batch_size(workspace.model, workspace.anatomy).split(self.text)

    def estimate(self) -> Need:
        """What narrowing needs on top of the resident model, see mlxfun.techniques.refit.sizes."""
        resident, size = self.workspace.resident, Sizes.of(self.workspace, self.batches())
        stacks = []
        for moe in resident.layers:
            arrays = [resident.tree.get(p.path) for p in moe.layer.expert_parameters()]
            rows = len(resident.stack[moe.layer.position])
            whole = sum(array.nbytes for array in arrays) * len(moe.live) // rows
            stacks.append(whole * self.width // self.before)
        # H^T H of the MLPs beside the experts, in float64, and one more while it is added up.
        beside = sum(16 * len(target.mlps) * target.before**2 for target in self.beside)
        held = size.states + size.inputs + beside
        # Products of the output projections [E, N, N], and of the neurons.
        products = size.experts * size.width**2 * WIDE
        unpacked = int(size.unpack * size.stack())
        choosing = products + max(unpacked, size.features())
        making = max(size.output, size.sliced() if self.repack else 0)
        if self.refits:
            narrow = size.refit(size.experts, self.width), size.refitted(size.experts, self.width)
            making = max(making, *narrow)
        return Need(
            tuple(stacks),
            held + max(size.forward, choosing, size.output),
            held + 2 * size.outputs + making,
        )

    def run(self, ctx: Context) -> list[LayerDelta]:
        """The deltas of all layers; the model is as before."""
        workspace = self.workspace
        carrier = Carrier(workspace.model, workspace.taps, self.batches(), ctx)
        refitting = Recalibration(workspace, follow=False, refit_experts=True, ridges=RIDGES)
        deltas, layers = [], workspace.resident.layers
        for number, moe in enumerate(layers):
            with carrier.at(moe.layer, ctx):
                deltas.append(workspace.hold(self._layer(carrier, refitting, moe, ctx)))
            ctx.progress("narrowing", number + 1, len(layers), "layers")
        return [*deltas, *self._beside(ctx)]

    def _beside(self, ctx: Context) -> Iterator[LayerDelta]:
        """The deltas of the MLPs beside the experts."""
        workspace = self.workspace
        mlps = [(mlp, target.width) for target in self.beside for mlp in target.mlps]
        if not mlps:
            return
        how = How(self.options.method, self.refits, self.repack)
        sums = products(workspace, [mlp for mlp, _ in mlps], self.batches(), ctx)
        for number, ((mlp, width), product) in enumerate(zip(mlps, sums, strict=True)):
            ctx.check()
            with workspace.resident.layer(mlp.layer):
                delta, error = narrowed_mlp(
                    workspace.resident.tree.modules, mlp, product, width, how, workspace.stored
                )
            self.beside_errors[mlp.path] = error
            yield workspace.hold(delta)
            ctx.progress("narrowing beside the experts", number + 1, len(mlps), "MLPs")

    def _layer(
        self, carrier: Carrier, refitting: Recalibration, moe: LiveExperts, ctx: Context
    ) -> LayerDelta:
        resident, options = self.workspace.resident, self.options
        routed = observe(carrier, moe, ctx).routed
        bank = Bank.of(moe, resident.tree.modules)
        group = 1 if self.repack else self.unit
        choice = choose(bank, routed, self.width, options.method, group, ctx)
        index = moe.layer.index
        if choice.scarce:
            self.scarce[index] = tuple(moe.live[e] for e in choice.scarce)
        wanted = output(bank, routed, ctx)
        sliced = narrowed(moe, bank, choice.kept, self.repack, self.workspace.stored)
        with resident.trial(Delta((sliced,))):
            if self.refits:
                sliced, fit = refitting.refitted(moe, sliced, routed, wanted, ctx)
                self.fits.append(fit)
                self.errors[index] = fit.after if fit.kept else fit.before
            else:
                rest = wanted - output(Bank.of(moe, resident.tree.modules), routed, ctx)
                self.errors[index] = energy(rest) / max(energy(wanted), 1e-30)
        return self._with_shared(moe, sliced)

    def _with_shared(self, moe: LiveExperts, delta: LayerDelta) -> LayerDelta:
        """With zeros in the shared expert where its width has to be a multiple of the new one."""
        target = self._shared_target()
        if target is None:
            return delta
        arrays, rows = padded_shared(
            self.workspace.resident.tree.modules, moe.layer.shared, target, self.workspace.stored
        )
        return replace(
            delta,
            arrays={**delta.arrays, **arrays},
            rows={**delta.rows, **rows},
            made=delta.made | frozenset(arrays),
        )

    def _shared_target(self) -> int | None:
        """The width of the shared expert beside narrower ones, None where it stays as it is."""
        wide = self.workspace.export().shared_width()
        if self.options.shared or self.keys.shared is None or wide is None:
            return None
        if wide % self.width == 0:
            return None
        return -(-wide // self.width) * self.width

    def plan(self) -> NarrowPlan:
        """What was decided."""
        layers = self.workspace.resident.layers
        how = f"{self.before} -> {self.width} neurons"
        how += ", refitted" if self.refits else ", in whole groups" if self.unit > 1 else ""
        return NarrowPlan(
            keep={moe.layer.index: moe.live for moe in layers},
            width_before=self.before,
            width=self.width,
            scarce=self.scarce,
            errors=self.errors,
            metric=self.options.method,
            strategy=how + (", packed anew" if self.repack else "") + self._beside_words(),
            beside=self.beside_errors,
            warnings=(*self._scarce_note(), *self._refit_note()),
        )

    def _beside_words(self) -> str:
        return "".join(f", {target.words()}" for target in self.beside)

    def _scarce_note(self) -> Sequence[str]:
        count = sum(map(len, self.scarce.values()))
        if not count:
            return ()
        worst = max(self.scarce, key=lambda layer: len(self.scarce[layer]))
        some = ", ".join(f"{worst}:{e}" for e in self.scarce[worst][:5])
        return (
            f"{counted(count, 'expert', 'experts')} saw too few tokens to judge by and kept the "
            f"largest neurons ({some}{', ...' if count > 5 else ''}); collect more text",
        )

    def _refit_note(self) -> Sequence[str]:
        if self.options.refit and not self.refits:
            return (
                "whole groups of packed neurons were taken out and nothing was refitted, so every "
                "value that stays is as it was; --requantize chooses single neurons and refits, "
                "which loses less",
            )
        unused = [fit.layer for fit in self.fits if not fit.kept]
        if not unused:
            return ()
        return (
            f"the refit was no better as it is stored in layers {unused}, which keep what was sliced",
        )


def _width(workspace: Workspace, options: NarrowOptions, before: int, unit: int) -> int:
    """The width that the options ask for. Raises UsageError and PlanError where there is none."""
    if options.width is not None:
        if options.width % unit:
            near = max(unit, round(options.width / unit) * unit)
            raise UsageError(
                f"--width {options.width}: the experts are packed in groups of {unit}; choose a "
                f"multiple, e.g. {near}"
            )
        width = options.width
    elif options.fraction is not None:
        width = round(before * (1 - options.fraction) / unit) * unit
    else:
        width = _width_for(workspace, options.to_bytes or 0, before, unit)
    if not 0 < width < before:
        raise UsageError(
            f"experts of {width} neurons: they have {before} now, so choose a width of {unit} to "
            f"{before - unit}"
        )
    return width


def _width_for(workspace: Workspace, target: int, before: int, unit: int) -> int:
    """The widest experts with which the model as saved takes at most `target` bytes."""
    view = workspace.export()
    total = view.total_bytes()
    per_neuron = _neuron_bytes(workspace)
    over = total - target
    if over <= 0:
        raise UsageError(
            f"--to-bytes {readable_bytes(target)}: the model takes {readable_bytes(total)} already"
        )
    width = before - -(-over // (per_neuron * unit)) * unit
    if width < unit:
        least = total - (before - unit) * per_neuron
        raise PlanError(
            f"--to-bytes {readable_bytes(target)}: with {counted(unit, 'neuron', 'neurons')} per expert "
            f"the model still takes {readable_bytes(least)}; prune experts as well"
        )
    return width


def _neuron_bytes(workspace: Workspace) -> int:
    """Bytes, as saved, of one neuron of every live expert of all layers."""
    total = 0
    view = workspace.export()
    names = set(view.names)
    for moe in workspace.resident.layers:
        bank = Bank.of(moe, workspace.resident.tree.modules)
        for name in bank.names:
            for leaf, array in bank.projection(name).items():
                path = f"{bank.path}.{name}.{leaf}"
                alone = leaf == "global_scale" or (leaf == "bias" and name == bank.outward)
                if isinstance(array, mx.array) and path in names and not alone:
                    total += view.nbytes(path) // bank.width
    return total
