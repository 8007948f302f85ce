"""Distillation as a technique: after any edit, routers (or routers, norms and experts) are trained to
match what the checkpoint predicts on calibration text (Router KD, arXiv 2603.02217).

The teacher is the checkpoint itself, run once over the text ahead of the training; the committed
state is what is trained. See student.py for the loss, training.py for the loop and local.py for the
form that needs no gradient through the model.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from mlxfun.context import SILENT, Context, Quietly
from mlxfun.data.datasets import batches, read_lines, tokenize
from mlxfun.data.options import DatasetOptions, dataset_words
from mlxfun.data.split import HELD_OUT_LEAST, HELD_OUT_SHARE, split_samples
from mlxfun.editing.plans import Provenance
from mlxfun.editing.reports import PlanReport, extended
from mlxfun.errors import PlanError, StateError, UsageError
from mlxfun.evaluation.evaluator import EvalSet
from mlxfun.evaluation.figures import perplexity
from mlxfun.model.delta import Delta
from mlxfun.model.device.batch_size import batch_size
from mlxfun.model.device.memory import Need
from mlxfun.model.model_map import ModelMap
from mlxfun.model.parameters import unpacked_shape
from mlxfun.techniques.distil.local import Fitted, fit_routers
from mlxfun.techniques.distil.options import TRAINED, DistilOptions
from mlxfun.techniques.distil.plan import DistilPlan
from mlxfun.techniques.distil.reports import DistilReport, Judged
from mlxfun.techniques.distil.student import Student
from mlxfun.techniques.distil.training import Text, Trained, Trainer
from mlxfun.techniques.distil.variables import Variable, masters_of, trained_delta, variables
from mlxfun.techniques.refit.sizes import BACKWARD, WIDE, Sizes
from mlxfun.techniques.technique import Proposal
from mlxfun.techniques.workspace import Workspace, collected_text
from mlxfun.text import option_words

if TYPE_CHECKING:
    from mlxfun.data.datasets import Batch

COPIES = 6
"""Of what is trained, float32: the masters, Adam's two moments, the gradient, the best so far, and
the masters of the next step."""

SHARES = (1.0, 0.5, 0.25)
"""Of the way to their fits, how far routers may go that were fitted layer by layer."""

MORE_TEXT = 1.5
"""How many times as large the gain on fitted text may be before it is said that more would help."""


class Distil:
    """See mlxfun.techniques.technique.Technique."""

    def require(self, found: ModelMap) -> None:
        """Raise StateError for a dense model: there are no routers."""
        found.require_experts("distil")

    def plan(
        self, workspace: Workspace, options: DistilOptions, command: str = "",
        ctx: Context = SILENT,
    ) -> Proposal:  # fmt: skip
        """Train the committed state. A cancel keeps the best so far once there is something better
        than before, and leaves all as it was until then.

        Raises UsageError, StateError, BudgetError and ModelError (no gradient) ahead of the work,
        PlanError where nothing better was found.
        """
        _check(options)
        _require_trainable(workspace, options)
        fitted, held = _texts(workspace, options, ctx)
        with workspace.editor.live("base"), workspace.editor.unsteered():
            work = _Distillation(workspace, options, fitted, held, ctx)
            found = work.locally() if options.local else work.through_the_model()
        provenance = Provenance(
            command or command_line(options),
            source_commands=() if options.data is not None else workspace.source_commands,
        )
        live = zip(workspace.anatomy.indices, workspace.editor.committed, strict=True)
        plan = DistilPlan(dict(live), options.train, found.figures, found.how, found.notes)
        return Proposal(plan, found.delta, provenance, describe=partial(_described, plan, found))


@dataclass(frozen=True, slots=True)
class _Found:
    """What a distillation came to. trained: None with --local."""

    delta: Delta
    held_out: Judged
    fitted: Judged
    how: str
    notes: tuple[str, ...]
    trained: Trained | None = None
    local: Fitted | None = None

    @property
    def figures(self) -> dict[str, float]:
        """For the plan's JSON form."""
        texts = {"held_out": self.held_out, "fitted": self.fitted}
        return {
            f"{name}_{what}_{when}": getattr(measured, what)
            for name, text in texts.items()
            for when, measured in (("before", text.before), ("after", text.after))
            for what in ("kl", "perplexity")
        }


def _described(plan: DistilPlan, found: _Found, report: PlanReport) -> PlanReport:
    trained = found.trained
    return extended(
        DistilReport,
        report,
        train=plan.train,
        held_out=found.held_out,
        fitted=found.fitted,
        steps=0 if trained is None else trained.steps,
        planned=0 if trained is None else trained.planned,
        best=0 if trained is None else trained.best,
        errors={} if found.local is None else dict(found.local.errors),
    )


def command_line(options: DistilOptions) -> str:
    """The command that stages the same plan, for histories of library sessions."""
    words = ["distil", *(dataset_words(options.data) if options.data is not None else ())]
    return shlex.join(words + option_words(replace(options, data=None), DistilOptions()))


# -- what can be foreseen ---------------------------------------------------------------------


def _check(options: DistilOptions) -> None:
    if options.train not in TRAINED:
        raise UsageError(f"--train {options.train}: choose one of {', '.join(TRAINED)}")
    if options.local and options.train != "router":
        raise UsageError(
            f"--local fits routers alone; leave out --train {options.train}, or --local"
        )
    if options.passes < 1:
        raise UsageError(f"--passes {options.passes} train nothing: give at least 1")
    if options.step_tokens is not None and options.step_tokens < 2:
        raise UsageError(f"--step-tokens {options.step_tokens} must be at least 2")
    if options.rate is not None and not 0 < options.rate <= 1:
        raise UsageError(f"--rate {options.rate:g} must be above 0 and at most 1, e.g. 0.001")


def _require_trainable(workspace: Workspace, options: DistilOptions) -> None:
    editor = workspace.editor
    if editor.state == editor.root_state:
        first = "apply the staged plan" if editor.staged is not None else "prune, narrow or merge"
        raise StateError(
            "distil trains an edited model to predict what the checkpoint does, and the weights are "
            f"still the checkpoint's: {first} first"
        )
    if workspace.resident.store is not None and not options.local:
        raise StateError(
            "distil takes a gradient through all layers at once, and this model's are read from "
            "disk one at a time; use distil --local, or load the model whole"
        )


def _texts(workspace: Workspace, options: DistilOptions, ctx: Context) -> tuple[EvalSet, EvalSet]:
    """(to fit, held out). Raises StateError where there is none, and DatasetError."""
    if options.data is not None:
        return _read(workspace, options.data, ctx)
    fitted = collected_text(workspace, "distil trains on")
    held = workspace.held_out
    if held is None or not held.sequences:
        raise StateError(
            "the last collect held nothing out that training could be judged on; give --dataset "
            "with at least 2 samples, or collect more"
        )
    return EvalSet("calibration text", tuple(fitted)), held


def _read(workspace: Workspace, data: DatasetOptions, ctx: Context) -> tuple[EvalSet, EvalSet]:
    """Both from a data set, split as collect does."""
    tally = ctx.reading()
    lines = read_lines(replace(data, max_samples=None), tally)
    parts = split_samples(len(lines), data.max_samples, data.seed, HELD_OUT_SHARE, HELD_OUT_LEAST)
    vocabulary = workspace.anatomy.vocabulary
    sets = [
        tuple(tokenize([lines[i] for i in part], workspace.tokenizer, data.max_tokens, vocabulary,
                       tally)) if part else ()
        for part in parts
    ]  # fmt: skip
    if not all(sets):
        raise UsageError(
            f"{data.source} has {len(lines)} usable samples; distil needs at least 2, one to train "
            "on and one to judge by"
        )
    return EvalSet(data.source, sets[0]), EvalSet(f"{data.source}, held out", sets[1])


# -- the work ---------------------------------------------------------------------------------


class _Distillation:
    """One run on the committed state, which must be live without steering."""

    def __init__(
        self,
        workspace: Workspace,
        options: DistilOptions,
        fitted: EvalSet,
        held: EvalSet,
        ctx: Context,
    ) -> None:
        self._workspace, self._options, self._ctx = workspace, options, ctx
        self._fitted, self._held = fitted, held

    def through_the_model(self) -> _Found:
        """Train by the gradient of the whole model."""
        workspace, options = self._workspace, self._options
        wanted = variables(workspace.map, workspace.resident, options.train)
        student = Student(workspace, wanted)
        workspace.require_room(
            self._estimate(wanted),
            "distilling",
            "lower --step-tokens, use less text, "
            + ("--train router, " if options.train == "moe" else "")
            + "or --local",
        )
        texts = self._seen(self._fitted), self._seen(self._held)
        trainer = Trainer(workspace, student, wanted, *texts, options)
        trained = trainer.run(masters_of(wanted, workspace.resident), self._ctx)
        delta = trained_delta(workspace, wanted, trained.masters)
        fitted, held = self._judged(texts[0], delta), self._judged(texts[1], delta)
        layers = tuple(workspace.hold(layer) for layer in delta.layers)
        how = f"step {trained.best} of {trained.steps}, {trained.planned} planned"
        notes = (*_end_note(trained), more_text(held, fitted, trained))
        return _Found(Delta(layers, delta.release), held, fitted, how, notes, trained)

    def locally(self) -> _Found:
        """Fit layer by layer."""
        workspace, options = self._workspace, self._options
        split = batch_size(workspace.model, workspace.anatomy).split(list(self._fitted.sequences))
        workspace.require_room(
            self._local_estimate(split), "fitting routers", "use less text, or load the model "
            "with its layers on disk",
        )  # fmt: skip
        texts = self._seen(self._fitted), self._seen(self._held)
        found = fit_routers(workspace, split, options, self._ctx)
        if not found.routers:
            raise PlanError(
                "no layer's output came closer to the checkpoint's on tokens left out of the fit; "
                "collect more text, or use distil without --local"
            )
        share = self._best_share(found, texts[1])
        delta = found.delta(workspace, share)
        fitted, held = (self._judged(text, delta) for text in texts)
        better = f"{len(found.routers)} of {len(found.errors)} layers"
        note = f"{better} put out more like the checkpoint's; their routers went {share:.0%} of the way"
        layers = tuple(workspace.hold(layer) for layer in delta.layers)
        return _Found(Delta(layers), held, fitted, "layer by layer", (note,), local=found)

    def _best_share(self, found: Fitted, held: Text) -> float:
        """How far routers go to their fits: what has the least KL on held-out text."""
        before = held.judged(self._workspace, Delta(()), Quietly(self._ctx)).kl
        measured = {}
        for share in SHARES:
            delta = found.delta(self._workspace, share)
            measured[share] = held.judged(self._workspace, delta, Quietly(self._ctx)).kl
        best = min(measured, key=measured.__getitem__)
        if not measured[best] < before:
            raise PlanError(
                "the layers' outputs came closer to the checkpoint's, but the KL on held-out text rose "
                f"({before:.4f} -> {measured[best]:.4f}); collect more text, or use distil without "
                "--local"
            )
        return best

    def _seen(self, data: EvalSet) -> Text:
        """A text with what the checkpoint makes of it."""
        editor = self._workspace.editor
        again = partial(editor.live, "checkpoint")
        with again():
            teacher = self._workspace.evaluator.reference(editor.key(), data, self._ctx)
        return Text(data, teacher, again)

    def _judged(self, text: Text, delta: Delta) -> Judged:
        """A text, or part of it, before and after; also once the job was cancelled."""
        part = text.part(len(self._held.sequences))
        checkpoint, _ = perplexity(part.teacher.likelihood)
        before, after = (part.judged(self._workspace, one) for one in (Delta(()), delta))
        return Judged(len(part.data.sequences), before, after, checkpoint)

    def _estimate(self, wanted: Sequence[Variable]) -> Need:
        """What training needs: see COPIES and `Sizes.gradient`, and besides them the checkpoint's
        hidden states in float16."""
        workspace = self._workspace
        resident, modules = workspace.resident, workspace.resident.tree.modules
        tokens = sum(map(len, self._fitted.sequences))
        steps = batches(list(self._fitted.sequences), self._options.step_of(tokens), 1 << 30)
        size = Sizes.of(workspace, steps)
        counts, new = 0, dict.fromkeys((v.layer for v in wanted), 0)
        for v in wanted:
            shape = (
                unpacked_shape(modules[v.module]) if v.packed else resident.tree.get(v.path).shape
            )
            count = 1
            for length in shape:
                count *= length
            counts += count
            new[v.layer] += resident.tree.get(v.path).nbytes
        tokens += sum(map(len, self._held.sequences))
        vocabulary = workspace.anatomy.vocabulary or 1
        work = 2 * tokens * size.hidden + COPIES * WIDE * counts
        work += size.gradient(len(workspace.map.layers), vocabulary)
        return Need(tuple(new.values()), work, work)

    def _local_estimate(self, split: list[Batch]) -> Need:
        """The states carried, the layer's inputs twice (router and experts), outputs of both
        sides, and the gradient of a step."""
        size = Sizes.of(self._workspace, split)
        tokens = sum(map(len, self._fitted.sequences))
        step = self._options.step_of(tokens) * size.top_k * (size.hidden + 3 * size.width) * WIDE
        held = size.states + 2 * size.inputs + 2 * size.outputs
        routers = tuple(
            len(moe.live) * size.hidden * WIDE for moe in self._workspace.resident.layers
        )
        return Need(routers, held + max(size.forward, size.output, BACKWARD * step))


def _end_note(trained: Trained) -> tuple[str, ...]:
    if trained.end == "cancelled":
        return (
            f"cancelled after {trained.steps} of {trained.planned} steps: what is staged is the best "
            f"until then, of step {trained.best}",
        )
    if trained.end == "early":
        return (
            f"stopped after {trained.steps} of {trained.planned} steps, since held-out text became "
            f"no better after step {trained.best}",
        )
    return ()


def more_text(held: Judged, fitted: Judged, trained: Trained) -> str:
    """Whether more text would help, by what the KL fell on both."""
    gains = (
        f"KL fell by {fitted.gain:.1%} on text that was fitted and by {held.gain:.1%} on held-out"
    )
    if fitted.gain > MORE_TEXT * held.gain or trained.end == "early":
        return f"{gains} text: more calibration text would help"
    if trained.end == "done" and trained.best == trained.planned:
        return f"{gains} text, and still at the last step: more --passes may help, more text less"
    return f"{gains} text: more calibration text would help little"
