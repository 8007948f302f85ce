"""Chooses bits per module: sensitivities from one pass with a gradient, then a knapsack, and what the
choice costs, measured on held-out text with the values that the packed weights stand for.

The weights in memory stay as they are: bits are how a model is saved.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlxfun.checkpoint.bits_plan import BitsPlan
from mlxfun.checkpoint.requantize import BITS, GROUP_SIZES, describe_quantization
from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import Batch, Tokens, batches, read_sequences
from mlxfun.errors import StateError, UsageError
from mlxfun.evaluation.evaluator import EvalSet
from mlxfun.evaluation.figures import perplexity
from mlxfun.hooks.intercept import Hooks
from mlxfun.model.device.memory import Need
from mlxfun.techniques.bits.fisher import Fisher
from mlxfun.techniques.bits.knapsack import Solution, solve
from mlxfun.techniques.bits.options import UNPACKED, BitsOptions
from mlxfun.techniques.bits.prices import (
    SAFE,
    Candidate,
    Errors,
    candidates,
    covered,
    expected_kl,
    group_of,
    unpacked,
)
from mlxfun.techniques.bits.reports import BitsReport, BitsRow, Uniform
from mlxfun.techniques.refit.sizes import Sizes
from mlxfun.techniques.workspace import Workspace

STEP_TOKENS = 2048

CORRECTED_TOKENS = 4096
"""Of the text, so many tokens tell what packing a whole layer costs."""

MOST_FACTOR = 20.0
"""How far a layer's costs are corrected at most: a measured KL of little text is noisy."""


def choose_bits(
    workspace: Workspace, options: BitsOptions, ctx: Context = SILENT
) -> tuple[BitsPlan, BitsReport]:
    """The plan for the committed weights, and what it costs. Raises UsageError, StateError and
    BudgetError ahead of the work, PlanError for a size that no choice reaches, and ModelError for a
    model without a gradient."""
    _check(workspace, options)
    with workspace.editor.live("base"), workspace.editor.unsteered():
        return _Choosing(workspace, options, ctx).run()


def _check(workspace: Workspace, options: BitsOptions) -> None:
    known = (*BITS, UNPACKED)
    wrong = [bits for bits in options.choices if bits not in known]
    if wrong or not options.choices:
        given = ", ".join(map(str, options.choices)) or "nothing"
        raise UsageError(
            f"--choices {given}: choose among {', '.join(map(str, known))} ({UNPACKED}: left as it is)"
        )
    if options.group_size not in GROUP_SIZES:
        sizes = ", ".join(map(str, GROUP_SIZES))
        raise UsageError(f"group size {options.group_size}: choose one of {sizes}")
    packed = describe_quantization(workspace.config)
    if packed is not None:
        raise StateError(
            f"the model is quantised already ({packed}); bits needs floating-point weights"
        )
    if workspace.resident.store is not None:
        raise StateError(
            "bits takes a gradient through all layers at once, and this model's are read from disk "
            "one at a time; load it whole, or use save --quantize BITS"
        )


class _Choosing:
    """One run on the committed state, which must be live without steering."""

    def __init__(self, workspace: Workspace, options: BitsOptions, ctx: Context) -> None:
        self._workspace, self._options, self._ctx = workspace, options, ctx
        self._view = workspace.export()
        self._found = candidates(workspace, options)
        if not self._found:
            raise UsageError(
                f"nothing in this model can be packed in groups of {options.group_size}: no module's "
                "width is a multiple of it; try --group-size 32"
            )
        self._total = self._view.total_bytes()
        self._held = sum(self._view.nbytes(f"{c.name}.weight") for c in self._found)

    def run(self) -> tuple[BitsPlan, BitsReport]:
        """See `choose_bits`."""
        text, held = self._text()
        todo = _equally_long(text)
        # Ahead of the work: the least size does not depend on sensitivities.
        budget = self._options.to_bytes - (self._total - self._held)
        sizes = [dict(c.sizes) for c in self._found]
        solve([dict.fromkeys(each, 0.0) for each in sizes], sizes, budget)
        size = Sizes.of(self._workspace, todo)
        vocabulary = self._workspace.anatomy.vocabulary or 1
        work = size.gradient(len(self._workspace.map.layers), vocabulary)
        work += (2 + len(self._options.choices)) * size.stack()
        self._workspace.require_room(
            Need((), work), "measuring sensitivities", "use shorter samples, --max-tokens"
        )
        sums = self._sums(todo)
        tokens = sum(len(sequence) - 1 for sequence in text)
        costs, fixed = self._costs(sums, tokens)
        costs = self._corrected(costs, text)
        sizes = [
            {bits: c.sizes[bits] for bits in each}
            for c, each in zip(self._found, costs, strict=True)
        ]
        solution = solve(costs, sizes, budget)
        plan = self._plan(solution, costs)
        return plan, self._report(plan, solution, costs, held, (tokens, fixed))

    def _text(self) -> tuple[Sequence[Tokens], EvalSet]:
        """(what sensitivities are measured on, what the choice is judged on)."""
        workspace, data = self._workspace, self._options.data
        held = workspace.held_out
        if data is not None:
            vocabulary, tally = workspace.anatomy.vocabulary, self._ctx.reading()
            text: Sequence[Tokens] = read_sequences(data, workspace.tokenizer, vocabulary, tally)
        else:
            text = workspace.calibration
        if not text:
            raise StateError(
                "bits measures on the text of the last collect, and there is none; give --dataset, "
                "or run `collect --dataset ...` first"
            )
        if held is None or not held.sequences:
            held = EvalSet("the same text", tuple(text[: max(1, len(text) // 8)]))
        return text, held

    def _sums(self, todo: Sequence[Batch]) -> dict[str, mx.array]:
        workspace, options = self._workspace, self._options
        paths = [c.path for c in self._found if c.layout is None]
        fisher = Fisher(workspace, paths, Errors(workspace, self._found, options))
        total: dict[str, mx.array] = {}
        key = mx.random.key(self._options.seed)
        for number, batch in enumerate(todo):
            self._ctx.check()
            key, drawn = mx.random.split(key)
            here = fisher.sums(batch, drawn)
            total = {p: s + total[p] if p in total else s for p, s in here.items()}
            mx.eval(total)
            self._ctx.progress("measuring sensitivities", number + 1, len(todo), "batches")
        return total

    def _costs(self, sums: dict[str, mx.array], tokens: int) -> tuple[list[dict[int, float]], int]:
        """{bits: expected KL} of each module, with one entry where there is no choice; how many of
        those there are."""
        modules, costs, fixed = self._workspace.resident.tree.modules, [], 0
        routers = {layer.logits for layer in self._workspace.anatomy.layers}
        for number, one in enumerate(self._found):
            self._ctx.check()
            if covered(one, modules[one.path], sums, routers):
                costs.append(expected_kl(one, sums, tokens, self._options))
            else:
                packed = [bits for bits in one.sizes if bits >= SAFE] or [max(one.sizes)]
                costs.append({min(packed): 0.0})
                fixed += 1
            self._ctx.progress("packing modules", number + 1, len(self._found), "modules")
        return costs, fixed

    def _corrected(
        self, costs: list[dict[int, float]], text: Sequence[Tokens]
    ) -> list[dict[int, float]]:
        """The costs of each decoder layer times what packing the whole layer costs in fact, over what
        was expected of it: routers further on choose other experts, which has no gradient."""
        workspace, layers = self._workspace, self._by_layer()
        count = int(np.searchsorted(np.cumsum([len(s) for s in text]), CORRECTED_TOKENS)) + 1
        some = EvalSet("some of the text", tuple(text[:count]))
        base = workspace.evaluator.reference(workspace.editor.key(), some, self._ctx)
        again, new = partial(workspace.editor.live, "base"), [dict(each) for each in costs]
        for number, members in enumerate(layers):
            self._ctx.check()
            bits = {m: middle_of(costs[m]) for m in members}
            expected = sum(costs[m][b] for m, b in bits.items())
            some_of = [self._found[m] for m in members]
            with packed_as(workspace, some_of, list(bits.values()), self._options.group_size):
                _, (found,) = workspace.evaluator.compare(some, [base], [again])
            factor = float(found.kl.mean()) / expected if expected > 0 else 1.0
            factor = min(max(factor, 1 / MOST_FACTOR), MOST_FACTOR)
            for m in members:
                new[m] = {b: factor * kl for b, kl in costs[m].items()}
            self._ctx.progress("measuring layers", number + 1, len(layers), "layers")
        return new

    def _by_layer(self) -> list[list[int]]:
        """The modules that have a choice, by decoder layer; each outside of them alone."""
        paths = [f"{layer.path}." for layer in self._workspace.map.layers]
        groups: dict[str, list[int]] = {}
        for m, one in enumerate(self._found):
            inside = next((path for path in paths if one.path.startswith(path)), one.path)
            groups.setdefault(inside, []).append(m)
        return list(groups.values())

    def _plan(self, solution: Solution, costs: list[dict[int, float]]) -> BitsPlan:
        pairs = list(zip(self._found, solution.chosen, strict=True))
        total = self._total - self._held + sum(c.sizes[b] for c, b in pairs)
        expected = sum(each[b] for each, b in zip(costs, solution.chosen, strict=True))
        return BitsPlan(
            state=self._workspace.editor.live_state,
            group_size=self._options.group_size,
            bits={c.name: b for c, b in pairs if b != UNPACKED},
            bytes=total,
            expected_kl=expected,
            groups={
                c.name: group_of(c.layout)
                for c, _ in pairs
                if c.layout is not None and group_of(c.layout) != self._options.group_size
            },
        )

    def _report(
        self,
        plan: BitsPlan,
        solution: Solution,
        costs: list[dict[int, float]],
        held: EvalSet,
        counted: tuple[int, int],
    ) -> BitsReport:
        workspace = self._workspace
        again = partial(workspace.editor.live, "checkpoint")
        with again():
            teacher = workspace.evaluator.reference(workspace.editor.key(), held, self._ctx)

        def compared() -> tuple[float, float]:
            losses, (found,) = workspace.evaluator.compare(held, [teacher], [again], self._ctx)
            return float(found.kl.mean()), perplexity(losses)[0]

        before, _ = compared()
        with packed_as(workspace, self._found, solution.chosen, self._options.group_size):
            after, loss = compared()
        return BitsReport(
            state=plan.state,
            bytes_before=self._total,
            bytes=plan.bytes,
            target=self._options.to_bytes,
            expected_kl=plan.expected_kl,
            kl_before=before,
            kl_after=after,
            perplexity=loss,
            ratio=loss / perplexity(teacher.likelihood)[0],
            gap=solution.gap,
            rows=_rows(self._found, solution.chosen),
            uniform=self._uniform(costs),
            tokens=counted[0],
            fixed=counted[1],
        )

    def _uniform(self, costs: list[dict[int, float]]) -> tuple[Uniform, ...]:
        found = []
        for bits in self._options.choices:
            size = self._total - self._held
            expected = 0.0
            for one, each in zip(self._found, costs, strict=True):
                taken = bits if bits in each else min(each)
                size, expected = size + one.sizes[taken], expected + each[taken]
            found.append(Uniform(bits, size, expected))
        return tuple(found)


def _rows(found: Sequence[Candidate], chosen: Sequence[int]) -> tuple[BitsRow, ...]:
    kinds: dict[str, list[tuple[Candidate, int]]] = {}
    for one, bits in zip(found, chosen, strict=True):
        kinds.setdefault(one.projection, []).append((one, bits))
    rows = []
    for name, pairs in kinds.items():
        taken = [bits for _, bits in pairs]
        size = sum(one.sizes[bits] for one, bits in pairs)
        mean = float(np.mean(taken))
        rows.append(BitsRow(name, len(pairs), min(taken), mean, max(taken), size))
    return tuple(rows)


def _equally_long(text: Sequence[Tokens]) -> list[Batch]:
    """Batches without padding, which would count as inputs."""
    lengths: dict[int, list[Tokens]] = {}
    for sequence in text:
        lengths.setdefault(len(sequence), []).append(sequence)
    return [one for alike in lengths.values() for one in batches(alike, STEP_TOKENS, STEP_TOKENS)]


def middle_of(costs: Mapping[int, float]) -> int:
    """The middle one of the numbers of bits."""
    bits = sorted(costs)
    return bits[(len(bits) - 1) // 2]


@contextmanager
def packed_as(
    workspace: Workspace, found: Sequence[Candidate], chosen: Sequence[int], group: int
) -> Iterator[None]:
    """Modules compute, inside the block, with the values that their packed weights stand for. One
    module at a time is packed, when it is called."""
    tree = workspace.resident.tree
    hooks = Hooks(tree.modules)

    def packing(path: str, bits: int, size: int, own: Any, *args: Any, **kwargs: Any) -> Any:
        name = f"{path}.weight"
        held = tree.get(name)
        tree.put(name, unpacked(held, bits, size, workspace.stored(name)).astype(held.dtype))
        try:
            return own(*args, **kwargs)
        finally:
            tree.put(name, held)

    for one, bits in zip(found, chosen, strict=True):
        if bits == UNPACKED:
            continue
        size = group if one.layout is None else group_of(one.layout)
        methods = ["__call__"] + ["as_linear"] * hasattr(tree.modules[one.path], "as_linear")
        for method in methods:
            work = partial(packing, one.path, bits, size)
            hooks.on_call(one.path, work, method=method, required=False)
    with hooks:
        yield
