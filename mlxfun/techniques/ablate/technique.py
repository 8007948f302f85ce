"""Ablation as a technique: finds or recalls a plan, computes its weights, measures.

The candidate is measured before it is staged, so that a cancel or failure at any point leaves the
model, and a plan that was staged before, as they were.
"""

from __future__ import annotations

import shlex
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import read_sequences
from mlxfun.data.expert_lists import MapFiles, read_maps
from mlxfun.data.options import DatasetOptions, source_words
from mlxfun.editing.plans import Provenance
from mlxfun.editing.reports import PlanReport, extended
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.evaluation.evaluator import EvalSet
from mlxfun.evaluation.refusal_metrics import Panel, answer_kl, ask_all
from mlxfun.evaluation.refusals import refusal_report
from mlxfun.evaluation.reports import RefusalReport
from mlxfun.generation.answers import Greedy
from mlxfun.model.components import COMPONENTS
from mlxfun.model.delta import Delta, Resident
from mlxfun.model.device.memory import Need
from mlxfun.model.model_map import ModelMap
from mlxfun.model.outputs import Output, leaks, part_path, residual_outputs
from mlxfun.model.parameters import unpacked_bytes
from mlxfun.techniques.ablate.delta import ROWS_AT_ONCE, ablate_delta, projections
from mlxfun.techniques.ablate.find import ERROR_WORTH_TELLING, Found, Model, Text, find, read_split
from mlxfun.techniques.ablate.options import POSITIONS, PROJECTIONS, TARGETS, AblateOptions
from mlxfun.techniques.ablate.plan import AblationPlan
from mlxfun.techniques.ablate.reports import AblationReport
from mlxfun.techniques.ablate.search import DAMAGE
from mlxfun.techniques.ablate.searching import Search
from mlxfun.techniques.prune.choose import stale_maps
from mlxfun.techniques.refit.sizes import copies_of
from mlxfun.techniques.technique import Proposal
from mlxfun.techniques.workspace import Workspace
from mlxfun.text import option_words

EXAMPLES = 3


class Abliterate:
    """See mlxfun.techniques.technique.Technique. Remembers the front of its last search."""

    def __init__(self) -> None:
        self._last: Found | None = None
        self._searched_by = ""  # the command of the last search

    def require(self, found: ModelMap) -> None:
        """Every model has directions."""

    def plan(
        self, workspace: Workspace, options: AblateOptions, command: str = "",
        ctx: Context = SILENT,
    ) -> Proposal:  # fmt: skip
        """Find or recall a direction, make the weights without it and measure them.

        Raises UsageError, DatasetError, PlanError, BudgetError or StateError ahead of the work
        where they can be foreseen, Cancelled in the middle of it.
        """
        _check(options)
        if options.target == "safety-experts":
            workspace.map.require_experts("abliterate with --target safety-experts")
        ablation = _Ablation(workspace, options, ctx)
        with workspace.editor.live("base"), workspace.editor.unsteered():
            if options.choose is not None:
                found = self._recall(workspace, options.choose)
            else:
                found = ablation.find()
            base = found.base or ablation.ask(found, "refusals before")
            plan, delta, details = ablation.realise(found, base)
        command = command or command_line(options)
        if options.choose is None and found.trials:
            self._last, self._searched_by = replace(found, base=base), command
        provenance = Provenance(
            command,
            source_commands=(self._searched_by,) if options.choose is not None else (),
            scores=_scores(details["refusals"]),
        )

        def describe(report: PlanReport) -> PlanReport:
            return extended(AblationReport, report, **details)

        return Proposal(plan, delta, provenance, describe=describe)

    def _recall(self, workspace: Workspace, number: int) -> Found:
        found = self._last
        if found is None:
            raise StateError("there is no search to choose from; run abliterate --search N first")
        if found.state != workspace.editor.state:
            raise StateError(
                f"the last search was made on state {found.state}, the model is at "
                f"{workspace.editor.state}; undo to that state, or search again"
            )
        if not 0 <= number < len(found.plans):
            raise UsageError(
                f"--choose {number}: the front of the last search has the points "
                f"0..{len(found.plans) - 1}"
            )
        return replace(found, chosen=number)


class _Ablation:
    """One ablation of the committed weights, which must be live and without steering."""

    def __init__(self, workspace: Workspace, options: AblateOptions, ctx: Context) -> None:
        self._workspace, self._options, self._ctx = workspace, options, ctx

    def find(self) -> Found:
        """A plan, or the front of a search."""
        workspace, options = self._workspace, self._options
        vocabulary, tally = workspace.anatomy.vocabulary, self._ctx.reading()
        text, unsaid = self._text(options)
        model = self._model(options, text)
        self._require_memory(model.outputs)
        split, notes = read_split(options, workspace.tokenizer, vocabulary, tally)
        notes += stale_maps(workspace.editor, _files(options))
        notes += self._leaks(options)
        source, found = find(model, options, split, [*notes, *unsaid], self._ctx)
        if not options.search:
            return found
        return Search(model, options, source, split, self._ctx).run(found)

    def _text(self, options: AblateOptions) -> tuple[Text, list[str]]:
        """Plain text to leave as it is: that of --text, four fifths to fit and the rest to judge, or
        that of the last collect; and a note where there is none."""
        workspace = self._workspace
        if options.text is not None:
            vocabulary = workspace.anatomy.vocabulary
            read = read_sequences(
                options.text, workspace.tokenizer, vocabulary, self._ctx.reading()
            )
            judge = tuple(read[4::5])
            fit = tuple(s for i, s in enumerate(read) if i % 5 != 4)
            name = f"a fifth of {options.text.source}"
            return Text(fit, EvalSet(name, judge) if judge else None), []
        if workspace.calibration:
            return Text(tuple(workspace.calibration), workspace.held_out), []
        if options.projection == "orthogonal":
            return Text(), []
        return Text(), [
            "no plain text is held unchanged: give --text FILE, or collect first, and the edit will "
            "cost less of what the model knows"
        ]

    def ask(self, found: Found, label: str) -> Panel:
        """The live model's answers to the prompts that judge."""
        answering = Greedy(self._workspace.model, self._workspace.tokenizer)
        return ask_all(answering, found.split.check, found.answer_tokens, self._ctx, label)

    # -- what may be edited -------------------------------------------------------------------

    def _model(self, options: AblateOptions, text: Text) -> Model:
        workspace = self._workspace
        resident = workspace.resident
        outputs = residual_outputs(resident.tree.modules, workspace.map)
        wanted = {
            "all": COMPONENTS,
            "dense-only": tuple(c for c in COMPONENTS if c != "experts"),
            "safety-experts": ("experts",),
        }[options.target]
        there = {output.component for output in outputs}
        layers = {layer.index: layer for layer in workspace.map.layers}
        return Model(
            workspace.tokenizer,
            text,
            workspace.editor,
            workspace.evaluator,
            tuple(o for o in outputs if o.component in wanted),
            tuple(c for c in wanted if c in there),
            {index: layer.path for index, layer in layers.items()},
            {output.path: part_path(output, layers[output.layer]) for output in outputs},
            workspace.map.hidden_size or 0,
            self._safety_experts(options) if options.target == "safety-experts" else None,
        )

    def _safety_experts(self, options: AblateOptions) -> dict[int, tuple[int, ...]]:
        """{decoder layer: live experts that the safety map names}."""
        resident = self._workspace.resident
        anatomy = resident.anatomy
        maps = read_maps(_files(options), anatomy.indices, anatomy.num_experts)
        found = {
            moe.layer.index: tuple(e for e in moe.live if maps.protect[moe.layer.position, e])
            for moe in resident.layers
        }
        if not any(found.values()):
            raise PlanError(
                f"{options.safety_map} names no expert that is left as critical to safety; make "
                "the report anew, with a larger --alpha, or use another --target"
            )
        return found

    def _leaks(self, options: AblateOptions) -> list[str]:
        workspace = self._workspace
        modules = workspace.resident.tree.modules
        return leaks(modules, workspace.map) if options.target == "all" else []

    def _require_memory(self, outputs: tuple[Output, ...]) -> None:
        """Raise BudgetError with the figures if the new weights would not fit beside the old."""
        self._workspace.require_room(
            estimate(self._workspace.resident, outputs),
            "abliterating",
            "use --target dense-only, or a quantised version of the model",
        )

    # -- new weights --------------------------------------------------------------------------

    def realise(self, found: Found, base: Panel) -> tuple[AblationPlan, Delta, dict[str, Any]]:
        """Make the chosen plan's weights and measure them beside `base`, the answers before.

        Nothing of them is live afterwards. The third part is what the report says beyond others'.
        """
        workspace, plan = self._workspace, found.plans[found.chosen]
        resident = workspace.resident
        outputs = residual_outputs(resident.tree.modules, workspace.map)
        wanted = projections(outputs, plan, resident)
        delta = ablate_delta(wanted, resident, workspace.stored, self._ctx, workspace.hold)
        if not delta.layers:
            raise PlanError(
                "the plan changes no weight: what it takes away is below the precision of the "
                "weights; give larger strengths"
            )
        key = workspace.editor.key()
        with workspace.trial(delta) as trial:
            now = self.ask(found, "refusals after")
            staged_kl = found.judge.harmless(self._ctx)[0] if found.judge is not None else None
            kls = answer_kl(workspace.evaluator, base, trial.suspended, key, self._ctx)
        refusals = refusal_report(("candidate", "current"), (base, now), kls, workspace.tokenizer)
        plan = replace(plan, warnings=(*found.warnings, *_doubts(found, staged_kl, refusals)))
        details = _details(found, plan, delta) | {"refusals": refusals, "staged_kl": staged_kl}
        return plan, delta, details


def _check(options: AblateOptions) -> None:
    if options.target not in TARGETS:
        raise UsageError(f"--target {options.target}: choose one of {', '.join(TARGETS)}")
    if options.extraction_position not in (None, *POSITIONS):
        raise UsageError(
            f"--extraction-position {options.extraction_position}: choose one of "
            f"{', '.join(POSITIONS)}"
        )
    _check_projection(options)
    if options.target == "safety-experts" and options.safety_map is None:
        raise UsageError(
            "--target safety-experts needs --safety-map FILE, the report of a safety-scan"
        )
    if options.target != "safety-experts" and options.safety_map is not None:
        raise UsageError("--safety-map serves --target safety-experts; give that too")
    if options.search and options.strength != AblateOptions().strength:
        raise UsageError("--search finds the strengths itself; leave out --strength or --search")
    if options.search < 0 or options.answer_tokens < 1 or not options.max_kl > 0:
        raise UsageError("--search, --answer-tokens and --max-kl must be above 0")


def _check_projection(options: AblateOptions) -> None:
    if options.projection not in PROJECTIONS:
        raise UsageError(
            f"--projection {options.projection}: choose one of {', '.join(PROJECTIONS)}"
        )
    if options.projection == "oblique" and (
        options.layers != "auto" or options.extraction_position is not None
    ):
        raise UsageError(
            "--layers and --extraction-position say where an orthogonal direction is taken; give "
            "--projection orthogonal too, or leave them out (--strength takes layers: 1@4-7)"
        )
    if options.directions < 1 or (options.projection == "orthogonal" and options.directions > 1):
        raise UsageError(
            f"--directions {options.directions}: give 1 or more, more than 1 only with --projection "
            "oblique"
        )
    if not options.max_perplexity > 1:
        raise UsageError(
            f"--max-perplexity {options.max_perplexity:g} must be above 1, for instance 1.01"
        )


def _files(options: AblateOptions) -> MapFiles:
    return MapFiles(options.safety_map, options.allow_stale)


def command_line(options: AblateOptions) -> str:
    """The command that stages the same plan, for histories of library sessions."""
    words = ["abliterate"]
    for name, data in (("--harmful", options.harmful), ("--harmless", options.harmless)):
        if data is not None:
            words += source_words(data, name)
    if options.harmful is not None:
        given = options.harmful
        default = DatasetOptions(given.source, seed=options.seed, mixture=given.mixture)
        words += option_words(options.harmful, default)
    if options.text is not None:
        words += source_words(options.text, "--text")
    plain = replace(options, harmful=None, harmless=None, text=None)
    return shlex.join(words + option_words(plain, AblateOptions()))


def estimate(resident: Resident, outputs: tuple[Output, ...]) -> Need:
    """The new weights, and what making the largest of them holds: a part of it in float32 and
    projected, or unpacked and packed. What measures them sizes its batches by what is free.
    """
    layers: dict[int, int] = {}
    making = 0
    for output in outputs:
        module = resident.tree.modules[output.path]
        size = sum(array.nbytes for array in module.values() if isinstance(array, mx.array))
        layers[output.layer] = layers.get(output.layer, 0) + size
        unpack, pack = copies_of(module)
        copies = max(unpack + 1.65, pack + 2.5) if unpack else 2.0
        # Of stacks a few rows at a time are unpacked.
        making = max(making, int(copies * min(unpacked_bytes(module), ROWS_AT_ONCE)))
    return Need(tuple(layers.values()), 0, making, both=True)


def _doubts(found: Found, staged_kl: float | None, refusals: RefusalReport) -> list[str]:
    """Warnings about a damaged model, and about weights that are not what the trial promised."""
    warnings = []
    if refusals.first_token_kl > DAMAGE:
        warnings.append(
            f"a first-token KL of {refusals.first_token_kl:.2f} means a damaged model; take the "
            "direction from earlier layers (--layers), or let --search find one"
        )
    if not refusals.before.harmful:
        warnings.append(
            f"the model refused none of {refusals.before.of_harmful} unseen harmful prompts before, "
            "so the direction may not be that of refusal"
        )
    if staged_kl is not None and found.front:
        promised = found.front[found.chosen].kl
        if abs(staged_kl - promised) > max(ERROR_WORTH_TELLING, 0.25 * promised):
            warnings.append(
                f"the staged weights have a first-token KL of {staged_kl:.4f} where the trial had "
                f"{promised:.4f}: rounding or requantising the edited weights makes the difference"
            )
    return warnings


def _scores(refusals: RefusalReport) -> dict[str, float]:
    """What the history shows of a measured ablation."""
    after = refusals.after
    return {
        "harmful_refused": after.harmful / after.of_harmful,
        "harmless_refused": after.harmless / after.of_harmless,
        "first_token_kl": refusals.first_token_kl,
    }


def _details(found: Found, plan: AblationPlan, delta: Delta) -> dict[str, Any]:
    """What the report says beyond that of other techniques, see AblationReport."""
    searched = bool(found.trials)
    return {
        "target": plan.target,
        "projection": "oblique" if plan.erasers else "orthogonal",
        "source_layer": plan.source_layer,
        "position": plan.position,
        "norms": dict(plan.norms),
        "strengths": {part: dict(each) for part, each in plan.strengths.items()},
        "edited": sum(len(layer.arrays) for layer in delta.layers),
        "samples": found.split.sizes,
        "trials": len(found.trials),
        "judged": found.judged,
        "trials_per_minute": found.per_minute,
        "front": found.front,
        "chosen": found.chosen if searched else None,
        "trial_kl": found.front[found.chosen].kl if searched else None,
    }
