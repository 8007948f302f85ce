"""Stages an ablation: find or recall a plan, compute its weights, measure.

The candidate is measured before it is staged, so that a cancel or failure at any point leaves the
model, and a plan that was staged before, as they were.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx

from mlxfun.context import SILENT, Context
from mlxfun.data.expert_lists import read_maps
from mlxfun.data.options import DatasetOptions
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.evaluation.options import RefusalOptions
from mlxfun.evaluation.refusal_metrics import Panel, Prompts, answer_kl, ask_all
from mlxfun.evaluation.refusal_rule import RULE
from mlxfun.evaluation.reports import RefusalReport
from mlxfun.generation.answers import read_prompts
from mlxfun.model.anatomy.outputs import COMPONENTS, LEAKS, Output, residual_outputs
from mlxfun.model.delta import Delta, Resident
from mlxfun.session.workspace import Workshop
from mlxfun.techniques.ablate.delta import ROWS_AT_ONCE, ablate_delta, projections
from mlxfun.techniques.ablate.find import ERROR_WORTH_TELLING, Finder, Found, Model, read_split
from mlxfun.techniques.ablate.options import POSITIONS, TARGETS, AblateOptions
from mlxfun.techniques.ablate.plan import AblationPlan
from mlxfun.techniques.ablate.reports import AblationReport
from mlxfun.techniques.ablate.search import DAMAGE
from mlxfun.techniques.prune import plan as planning
from mlxfun.techniques.prune.options import PruneOptions
from mlxfun.text import option_words

EXAMPLES = 3


class Candidate:
    """New weights that are not staged yet: either side can be borrowed, references are swapped."""

    def __init__(self, resident: Resident, delta: Delta) -> None:
        self.delta = delta
        self._resident = resident
        self._live = False

    @contextmanager
    def side(self, live: bool) -> Iterator[None]:
        """The new weights (or the old ones) inside the block; as before after it."""
        before = self._live
        self._go(live)
        try:
            yield
        finally:
            self._go(before)

    def _go(self, live: bool) -> None:
        if live != self._live:
            self.delta = self._resident.swap(self.delta)
            self._live = live


class Ablations:
    """Stages ablations of one session's model, and remembers the front of its last search."""

    def __init__(self, shop: Workshop) -> None:
        self._shop = shop
        self._last: Found | None = None
        self._searched_by = ""  # the command of the last search

    def stage(self, options: AblateOptions, command: str, ctx: Context = SILENT) -> AblationReport:
        """Stage the removal of a direction from the committed weights, replacing a staged plan.

        Raises UsageError, DatasetError, PlanError, BudgetError or StateError ahead of the work
        where they can be foreseen, Cancelled in the middle of it.
        """
        editor = self._shop.editor
        _check(options)
        with editor.live("current"), editor.unsteered():
            if options.choose is not None:
                found = self._recall(options.choose)
            else:
                model = self._model(options)
                self._require_memory(model.outputs)
                anatomy = editor.resident.taps.anatomy
                split, notes = read_split(options, self._shop.tokenizer, anatomy.vocabulary)
                notes += planning.stale_maps(editor, _as_prune(options))
                notes += self._leaks(options)
                found = Finder(model, options, ctx).run(split, notes)
            base = found.base or self._ask(found.split.check, found.answer_tokens, ctx, "before")
            report, plan, delta = self._realise(found, base, ctx)
        command = command or command_line(options)
        if options.choose is None and found.trials:
            self._last, self._searched_by = replace(found, base=base), command
        if editor.staged is not None:
            editor.discard()
        staged = editor.stage(plan, delta, command, report)
        staged.evidence = (self._searched_by,) if options.choose is not None else ()
        staged.scores = _scores(report)
        staged.report = report = replace(
            report, state_after=staged.state, bytes_after=self._shop.export().total_bytes()
        )
        return report

    def _recall(self, number: int) -> Found:
        found = self._last
        if found is None:
            raise StateError("there is no search to choose from; run abliterate --search N first")
        if found.state != self._shop.editor.state:
            raise StateError(
                f"the last search was made on state {found.state}, the model is at "
                f"{self._shop.editor.state}; undo to that state, or search again"
            )
        if not 0 <= number < len(found.plans):
            raise UsageError(
                f"--choose {number}: the front of the last search has the points "
                f"0..{len(found.plans) - 1}"
            )
        return replace(found, chosen=number)

    # -- what may be edited -------------------------------------------------------------------

    def _model(self, options: AblateOptions) -> Model:
        shop = self._shop
        resident = shop.editor.resident
        outputs = residual_outputs(resident.tree.modules, resident.taps.anatomy)
        wanted = {
            "all": COMPONENTS,
            "dense-only": tuple(c for c in COMPONENTS if c != "experts"),
            "safety-experts": ("experts",),
        }[options.target]
        there = {output.component for output in outputs}
        return Model(
            shop.tokenizer,
            shop.editor,
            shop.evaluator,
            tuple(o for o in outputs if o.component in wanted),
            tuple(c for c in wanted if c in there),
            self._safety_experts(options) if options.target == "safety-experts" else None,
        )

    def _safety_experts(self, options: AblateOptions) -> dict[int, tuple[int, ...]]:
        """{decoder layer: live experts that the safety map names}."""
        taps = self._shop.editor.resident.taps
        anatomy = taps.anatomy
        maps = read_maps(_as_prune(options), anatomy.indices, anatomy.num_experts)
        found = {
            tap.layer.index: tuple(e for e in tap.live if maps.protect[tap.layer.position, e])
            for tap in taps.layers
        }
        if not any(found.values()):
            raise PlanError(
                f"{options.safety_map} names no expert that is left as critical to safety; make "
                "the report anew, with a larger --alpha, or use another --target"
            )
        return found

    def _leaks(self, options: AblateOptions) -> list[str]:
        layers = self._shop.editor.resident.taps.anatomy.layers
        families = dict.fromkeys(layer.family for layer in layers)
        return [f"{f}: {LEAKS[f]}" for f in families if f in LEAKS and options.target == "all"]

    def _require_memory(self, outputs: tuple[Output, ...]) -> None:
        """Raise BudgetError with the figures if the new weights would not fit beside the old."""
        self._shop.require_room(
            estimate_bytes(self._shop.editor.resident, outputs),
            "abliterating",
            "use --target dense-only, or a quantised version of the model",
        )

    # -- new weights --------------------------------------------------------------------------

    def _realise(
        self, found: Found, base: Panel, ctx: Context
    ) -> tuple[AblationReport, AblationPlan, Delta]:
        """Make the chosen plan's weights and measure them beside `base`, the answers before.

        Nothing of them is live afterwards.
        """
        shop, plan = self._shop, found.plans[found.chosen]
        resident = shop.editor.resident
        before = shop.export().total_bytes()
        outputs = residual_outputs(resident.tree.modules, resident.taps.anatomy)
        delta = ablate_delta(projections(outputs, plan, resident), resident, shop.stored, ctx)
        if not delta.layers:
            raise PlanError(
                "the plan changes no weight: what it takes away is below the precision of the "
                "weights; give larger strengths"
            )
        candidate = Candidate(resident, delta)
        with candidate.side(True):
            now = self._ask(found.split.check, found.answer_tokens, ctx, "after")
            staged_kl = found.judge.harmless(ctx)[0] if found.judge is not None else None
            key = f"{shop.editor.state}|{shop.editor.steering.key}"
            kls = answer_kl(shop.evaluator, base, lambda: candidate.side(False), key, ctx)
        refusals = _refusal_report(("staged", "current"), (base, now), kls, shop.tokenizer)
        plan = replace(plan, warnings=(*found.warnings, *_doubts(found, staged_kl, refusals)))
        report = replace(
            _report(found, plan, candidate.delta),
            bytes_before=before,
            bytes_after=before,
            refusals=refusals,
            staged_kl=staged_kl,
        )
        return report, plan, candidate.delta

    def _ask(self, prompts: Prompts, tokens: int, ctx: Context, label: str) -> Panel:
        network = self._shop.editor.resident.tree.modules[""]
        return ask_all(network, self._shop.tokenizer, prompts, tokens, ctx, label)

    # -- counting -----------------------------------------------------------------------------

    def refusals(self, options: RefusalOptions, ctx: Context = SILENT) -> RefusalReport:
        """Count refusals of the staged plan beside the current weights, or of those beside the
        checkpoint. Raises UsageError, DatasetError, Cancelled.
        """
        shop, editor = self._shop, self._shop.editor
        if options.tokens < 1:
            raise UsageError(f"--answer-tokens {options.tokens} must be at least 1")
        vocabulary = editor.resident.taps.anatomy.vocabulary
        notices, parts = [], []
        for data in (options.harmful, options.harmless):
            prompts, skipped = read_prompts(data, shop.tokenizer, vocabulary)
            parts.append(tuple(prompts))
            if skipped:
                notices.append(f"{skipped} prompts of {data.source} are too long and were left out")
        asked = Prompts(*parts)
        sides = ("staged", "current") if editor.staged is not None else ("current", "checkpoint")
        subject, reference = sides
        root = editor.history.root.state
        steering = editor.steering_of("current").key
        steered = [side for side in sides if not editor.steering_of(side).empty]
        if steered:
            notices.append(f"counted while steering: {' and '.join(steered)}")
        key = f"{editor.state}|{steering}" if subject == "staged" else f"{root}|"
        with editor.live(reference):
            base = self._ask(asked, options.tokens, ctx, reference)
        now, kls = base, (0.0, 0.0)
        if subject == "staged" or (editor.state, steering) != (root, ""):
            with editor.live(subject):
                now = self._ask(asked, options.tokens, ctx, subject)
                kls = answer_kl(shop.evaluator, base, lambda: editor.live(reference), key, ctx)
        report = _refusal_report(sides, (base, now), kls, shop.tokenizer)
        return replace(report, notices=tuple(notices))


def _check(options: AblateOptions) -> None:
    if options.target not in TARGETS:
        raise UsageError(f"--target {options.target}: choose one of {', '.join(TARGETS)}")
    if options.extraction_position not in (None, *POSITIONS):
        raise UsageError(
            f"--extraction-position {options.extraction_position}: choose one of "
            f"{', '.join(POSITIONS)}"
        )
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


def _as_prune(options: AblateOptions) -> PruneOptions:
    """The part of the options that readers of maps look at."""
    return PruneOptions(safety_map=options.safety_map, allow_stale=options.allow_stale)


def command_line(options: AblateOptions) -> str:
    """The command that stages the same plan, for histories of library sessions."""
    words = ["abliterate"]
    for name, data in (("--harmful", options.harmful), ("--harmless", options.harmless)):
        if data is not None:
            words += [name, data.source]
    if options.harmful is not None:
        default = DatasetOptions(options.harmful.source, seed=options.seed)
        words += option_words(options.harmful, default)
    plain = replace(options, harmful=None, harmless=None)
    return shlex.join(words + option_words(plain, AblateOptions()))


def estimate_bytes(resident: Resident, outputs: tuple[Output, ...]) -> int:
    """Bytes of the new weights, and of the largest part unpacked while it is made: upper bounds."""
    sizes = [
        [
            array.nbytes
            for array in resident.tree.modules[output.path].values()
            if isinstance(array, mx.array)
        ]
        for output in outputs
    ]
    widest = max((max(each) for each in sizes), default=0)
    # Packed 4-bit weights are eight times as large in float32; three such parts are held at once.
    return sum(map(sum, sizes)) + widest + 3 * min(8 * widest, 2 * ROWS_AT_ONCE)


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


def _refusal_report(
    sides: tuple[str, str], panels: tuple[Panel, Panel], kls: tuple[float, float], tokenizer: Any
) -> RefusalReport:
    base, now = panels
    changed = [
        (_shown(tokenizer, prompt), one.text, other.text)
        for prompt, one, other in zip(base.prompts.harmful, base.harmful, now.harmful, strict=True)
        if one.text != other.text
    ]
    return RefusalReport(
        subject=sides[0],
        reference=sides[1],
        rule=RULE,
        before=base.count,
        after=now.count,
        first_token_kl=kls[0],
        answer_kl=kls[1],
        examples=tuple(changed[:EXAMPLES]),
    )


def _shown(tokenizer: Any, prompt: Any) -> str:
    """A prompt in one line, without the marks of the chat template."""
    return " ".join(tokenizer.decode(prompt.tolist(), skip_special_tokens=True).split())


def _scores(report: AblationReport) -> dict[str, float]:
    """What the history and the saved model's card show of it, on unseen prompts."""
    if report.refusals is None:
        return {}
    after = report.refusals.after
    return {
        "harmful_refused": after.harmful / after.of_harmful,
        "harmless_refused": after.harmless / after.of_harmless,
        "first_token_kl": report.refusals.first_token_kl,
    }


def _report(found: Found, plan: AblationPlan, delta: Delta) -> AblationReport:
    """What is known without measuring. state_after and bytes are filled in later."""
    experts = len(next(iter(plan.keep.values())))
    searched = bool(found.trials)
    return AblationReport(
        technique=plan.technique,
        metric=plan.metric,
        strategy=plan.strategy,
        experts_before=experts,
        experts_after=experts,
        kept=dict(plan.keep),
        pruned={},
        bytes_before=0,
        bytes_after=0,
        delta_bytes=delta.bytes,
        mass_lost=None,
        state_after="",
        warnings=plan.warnings,
        target=plan.target,
        source_layer=plan.source_layer,
        position=plan.position,
        norms=dict(plan.norms),
        strengths={part: dict(each) for part, each in plan.strengths.items()},
        edited=sum(len(layer.arrays) for layer in delta.layers),
        samples=found.split.sizes,
        trials=len(found.trials),
        judged=found.judged,
        trials_per_minute=found.per_minute,
        front=found.front,
        chosen=found.chosen if searched else None,
        trial_kl=found.front[found.chosen].kl if searched else None,
    )
