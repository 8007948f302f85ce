"""Staging and committing edits: `prune`, `merge`, `plan`, `steer`, `apply`, `discard` and others."""

from __future__ import annotations

from dataclasses import replace

import click

from commands.conditions import (
    applicable,
    compactable,
    listable,
    staged,
    whole_experts,
    with_experts,
)
from commands.declare import (
    DATA_NAMES,
    Call,
    Needed,
    Params,
    command,
    data_option,
    data_options,
    positive,
)
from commands.table.maps import MAP, ExpertLimit, WithMaps, map_options
from commands.table.to_disk import carry_out, to_disk, with_text, without
from commands.types import ExpertPairs, Experts, FilePath, Levels, NewFile, Number, Whole
from mlxfun.calibration.options import METRICS
from mlxfun.editing.options import ApplyOptions
from mlxfun.errors import StateError, UsageError
from mlxfun.report import Report, TextReport
from mlxfun.session.reports import HeatView
from mlxfun.steering.options import ANCESTOR_MODES, STEER_MODES, STEER_RULES, SteerOptions
from mlxfun.techniques.merge.options import ALIGNMENTS, SIMILARITY_MODES, MergeOptions
from mlxfun.techniques.prune.options import BUDGETS, PRUNE_METRICS, STRATEGIES, PruneOptions

LIST = FilePath((".json", ".csv"))
NPZ = FilePath((".npz",))
REFIT = click.option(
    "--refit-experts", is_flag=True, help="Let the experts that stay take over, by least squares."
)
SUPER_EXPERTS = click.option(
    "--super-experts",
    type=click.Choice(["spare", "ignore"]),
    help="Whether experts with outlying outputs are protected (default: with --metric auto).",
)


def _complete(call: Call, values: Params) -> None:
    """Complete the values for a selection's options: an empty list for none, paths resolved."""
    values["ignore_experts"] = values["ignore_experts"] or ()
    for name in ("expert_list", "safety_map", "domain_map", "saliency"):
        if values[name] is not None:
            values[name] = call.bench.readable(values[name])


@command("prune", group="edit", key="p", when=with_experts)
@click.option(
    "--n-prune",
    cls=Needed,
    unless=("expert_list",),
    type=positive,
    metavar="N",
    help="Experts to drop per layer; with --model-wide, expert numbers to drop everywhere.",
)
@click.option(
    "--metric",
    type=click.Choice(PRUNE_METRICS),
    help="What makes an expert worth keeping (default: reap_sum). output_error: what the layer's "
    "output would miss. auto: per layer what held-out samples miss least. Others: help calibration.",
)
@click.option(
    "--strategy",
    type=click.Choice(STRATEGIES),
    default="bottom",
    help="bottom: the lowest scores. strided: even strides through high and low.",
)
@click.option("--model-wide", is_flag=True, help="Drop the same expert numbers in every layer.")
@click.option(
    "--ignore-experts", type=Experts(), metavar="LIST", help='Never drop these: "0,1,250..255".'
)
@click.option(
    "--min-experts-per-layer", type=positive, metavar="N", help="Keep at least N in each layer."
)
@click.option("--expert-list", type=LIST, help="JSON or CSV that says which experts stay.")
@click.option(
    "--budget",
    type=click.Choice(BUDGETS),
    default="equal",
    help="equal: N from each layer (default). global: N on average, fewer where it costs more.",
)
@click.option(
    "--sequential", is_flag=True, help="Judge each layer on what the pruned ones before it put out."
)
@click.option("--saliency", type=NPZ, help="Go by these statistics, as after stats load.")
@SUPER_EXPERTS
@REFIT
@map_options("drop them", "statistics and maps")
@to_disk
def prune(call: Call) -> Report:
    """Stage a prune: choose the experts to remove, without changing the model yet.

    The candidate becomes live, so chat talks to it; preview measures it, flip switches,
    apply commits it, discard drops it. Needs collected statistics or --expert-list. What is
    measured while pruning (output_error, auto, global, sequential, refit) takes about two forwards
    of the text that collect ran; refitted experts are new tensors, all others stay untouched.
    """
    values = without(call.params)
    values["metric"] = values["metric"] or call.bench.settings.metric
    _complete(call, values)
    return carry_out(call, PruneOptions(**values), call.session.prune)


@command("merge", group="edit", when=whole_experts)
@data_option("--dataset", "What experts are compared on (default: the text of the last collect).")
@data_options
@click.option(
    "--n-prune",
    cls=Needed,
    unless=("expert_list",),
    type=positive,
    metavar="N",
    help="Experts to merge away per layer; with --model-wide, expert numbers.",
)
@click.option(
    "--metric",
    type=click.Choice(METRICS),
    default="reap_sum",
    help="Saliency that picks the centroids and weighs the members (default: reap_sum).",
)
@click.option("--model-wide", is_flag=True, help="Merge the same expert numbers in every layer.")
@click.option("--expert-list", type=LIST, help="JSON or CSV whose kept experts are the centroids.")
@click.option(
    "--ignore-experts", type=Experts(), metavar="LIST", help='Keep as centroids: "0,1,250..255".'
)
@click.option(
    "--similarity-mode",
    type=click.Choice(SIMILARITY_MODES),
    default="gated",
    help="Compare mean outputs weighted by the gate (default), or plain averages.",
)
@click.option(
    "--alignment",
    type=click.Choice(ALIGNMENTS),
    default="hungarian",
    help="How neurons are matched before they are averaged (default: hungarian).",
)
@click.option(
    "--max-group-size",
    type=Whole(min=2),
    default=16,
    metavar="N",
    help="Experts in a group at most, its centroid included (default: 16).",
)
@click.option(
    "--max-similarity-tokens",
    type=Whole(min=2),
    default=1024,
    metavar="N",
    help="Compare experts on N tokens (default: 1024).",
)
@click.option(
    "--max-alignment-tokens",
    type=positive,
    default=1024,
    metavar="N",
    help="Align neurons on N of those tokens (default: 1024).",
)
@click.option(
    "--auto",
    is_flag=True,
    help="Per layer and expert merge, merge a part or drop: what leaves the least error in the output.",
)
@click.option(
    "--saliency",
    type=NPZ,
    help="Pick and weigh by these statistics (default: by what each layer sees while merging).",
)
@REFIT
@map_options("merge them away", "statistics and maps")
@to_disk
def merge(call: Call) -> Report:
    """Stage a merge: experts are averaged into the ones most similar to them (REAM).

    Layer by layer, each on what the merged layers before it put out, in about two forwards of the
    data set. Both sides stay in memory until apply or discard; --to PATH writes the merged model
    instead.
    """
    values = {name: value for name, value in without(call.params).items() if name not in DATA_NAMES}
    _complete(call, values)
    return with_text(call, lambda data: MergeOptions(data, **values), call.session.merge)


@command("steer", group="edit", between=True, parser=WithMaps, when=with_experts)
@click.option(
    "--activate", type=ExpertPairs(), metavar="L:E,...", help="Force these into the top-k."
)
@click.option(
    "--deactivate", type=ExpertPairs(), metavar="L:E,...", help="Keep these out of the top-k."
)
@click.option(
    "--level",
    "levels",
    type=Levels(),
    metavar="L:E=X,...",
    help="Faders: add X to these experts' scores, for instance 3:7=1.5; 0 takes one away.",
)
@click.option("--clear", is_flag=True, help="Drop the steering in force first.")
@click.option(
    "--safety-map",
    type=MAP,
    multiple=True,
    help="safety_report.json of a safety scan; any number of them, like --domain-map.",
)
@click.option(
    "--safety-mode",
    type=click.Choice(STEER_MODES["safety"]),
    multiple=True,
    help="safe: what works on harmful prompts in, what works on benign ones out (default). "
    "unsafe: reversed.",
)
@click.option("--domain-map", type=MAP, multiple=True, help="domain_report.json of a domain scan.")
@click.option(
    "--domain-mode",
    type=click.Choice(STEER_MODES["domain"]),
    multiple=True,
    help="The domain's experts in (boost, the default) or out; suppress-general: the general text's "
    "experts out.",
)
@click.option(
    "--ancestor-modes",
    is_flag=True,
    help="Modes as in mlx_fun: there safe activates the hrcg experts, and suppress puts the general "
    "experts out.",
)
@click.option(
    "--max-experts",
    type=ExpertLimit(),
    multiple=True,
    metavar="N",
    help="Take the N strongest of a map, or all (default).",
)
@click.option("--config", type=MAP, help="JSON: activate, deactivate, mask_value, boost_value.")
@click.option(
    "--rule",
    type=click.Choice(STEER_RULES),
    help="steermoe: always in, never out (default). additive: add to the router's scores.",
)
@click.option(
    "--boost-value",
    type=Number(min=0, min_open=True),
    metavar="X",
    help="What the additive rule adds for activated experts (default: 2).",
)
@click.option(
    "--mask-value",
    type=Number(max=0, max_open=True),
    metavar="X",
    help="What it adds for deactivated ones, below 0 (default: -10000, never chosen).",
)
@click.option("--allow-stale", is_flag=True, help="Use a map made on another state of the weights.")
def steer(call: Call) -> Report:
    """Steer the router from the next token on, for instance steer --activate 3:7,5:0..2.

    Experts come from the command line, from reports of scans, or from a JSON file whose layers are
    positions among the MoE layers. At most top-k experts of a layer can be activated: of a report,
    the strongest. Steering changes no weights and is never saved; --clear ends it.

    A mode or --max-experts given once counts for all maps; given more often, each for the map
    before it. Where maps disagree on an expert the later one decides, and before any map the
    experts that you name; what is left out is said.
    """
    values = dict(call.params)
    for name in ("activate", "deactivate", "levels"):
        values[name] = values[name] or {}
    if values["config"] is not None:
        values["config"] = call.bench.readable(values["config"])
    names = ANCESTOR_MODES if values.pop("ancestor_modes") else {}
    values["maps"] = tuple(
        replace(
            use,
            path=call.bench.readable(use.path),
            mode=names.get((use.kind, use.mode), use.mode),
        )
        for use in values["maps"]
    )
    options = SteerOptions(**values)
    if options == SteerOptions():
        raise UsageError(
            "steer: give --activate L:E, --deactivate L:E, --level L:E=X, --safety-map, "
            "--domain-map, --config, or --clear to stop"
        )
    return call.session.steer(options)


@command("apply", group="edit", undoable=True, key="a", when=applicable)
@click.option("--max-kl", type=Number(min=0), metavar="X", help="Refuse above this mean KL.")
@click.option(
    "--max-perplexity-ratio",
    type=Number(min=0, min_open=True),
    metavar="Y",
    help="Refuse above this perplexity, as a multiple of the checkpoint's.",
)
@click.option(
    "--max-loops",
    type=Number(0, 1),
    metavar="Z",
    help="Refuse if this share of answers more than the checkpoint's goes round in circles.",
)
def apply(call: Call) -> Report:
    """Commit the staged plan as a new step of the history.

    With a limit, from here or from set, a preview is made if there is none, and apply refuses when
    it exceeds the limit. Steering is no part of what is applied: a preview that was made while
    steering is made again without.
    """
    settings = call.bench.settings
    limits = {
        name: getattr(settings, name) if value is None else value
        for name, value in call.params.items()
    }
    return call.session.apply(ApplyOptions(**limits), call.ctx)


@command("discard", group="edit", danger=True, key="d", when=staged)
def discard(call: Call) -> Report:
    """Drop the staged plan."""
    return call.session.discard()


@command("flip", group="edit", key="f", when=staged)
@click.argument("side", required=False, type=click.Choice(["current", "candidate", "base"]))
def flip(call: Call) -> Report:
    """Switch the live model between current and candidate while a plan is staged.

    Or make the side named live; base is an older name of current.
    """
    side = call["side"]
    return call.session.flip("base" if side == "current" else side)


@command("compact", group="edit", undoable=True, when=compactable)
def compact(call: Call) -> Report:
    """Free the memory of pruned experts; undo reads them from the checkpoint again."""
    return call.session.compact(call.ctx)


@command("plan show", group="edit", when=staged)
def plan_show(call: Call) -> Report:
    """Show the staged plan again: the experts pruned, and what that saves."""
    plan = call.session.view().plan
    if plan is None:
        raise StateError("nothing is staged to show: stage a plan first, e.g. with prune")
    return plan


@command("plan save", group="edit", when=listable, read_only=True)
@click.argument("path", type=NewFile((".json", ".csv")))
def plan_save(call: Call) -> Report:
    """Write the kept experts as an expert list, JSON or CSV by the file's name.

    The list is that of the staged plan, or of the applied prune when nothing is staged. prune
    --expert-list reads it, on this model or on a quantised copy of it.
    """
    from mlxfun.data.expert_lists import Maker, write_expert_list  # brings NumPy: not at the top

    view = call.session.view()
    if view.heat is None:
        raise StateError(f"there is no list to write: {listable(view)}")
    keep = view.plan.kept if view.plan else _alive(view.heat)
    counts = sorted({len(experts) for experts in keep.values()})
    if len(counts) > 1:
        raise StateError(
            f"the layers keep different numbers of experts ({counts[0]} to {counts[-1]}), and a list "
            "is read for one number only: `select --even` evens a selection out, another budget "
            "than global prunes evenly; `save` writes the model as it is"
        )
    why_not = listable(view)
    if why_not is not None:
        raise StateError(f"there is no list to write: {why_not}")
    path = call.bench.writable(call["path"])
    name = view.model.model_id if view.model else ""
    made_on = Maker(call.session.checkpoint_id, name)
    write_expert_list(path, keep, view.heat.experts, made_on)
    kept, of = sum(map(len, keep.values())), len(keep) * view.heat.experts
    return TextReport(f"wrote {path}: {kept} of {of} experts kept, {of - kept} pruned")


def _alive(heat: HeatView) -> dict[int, tuple[int, ...]]:
    """{decoder layer: experts that are not pruned}."""
    return {
        layer: tuple(int(e) for e in row.nonzero()[0])
        for layer, row in zip(heat.layers, heat.alive, strict=True)
    }


COMMANDS = (prune, merge, plan_show, plan_save, steer, apply, discard, flip, compact)
