"""Saving from a session, and reading single parameters back from the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from mlxfun.checkpoint.identity import checkpoint_id
from mlxfun.checkpoint.load import Loaded
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.checkpoint.save import Export, write
from mlxfun.context import SILENT, Context
from mlxfun.editing.editor import Editor
from mlxfun.editing.plans import BoostPlan, MergePlan, PrunePlan
from mlxfun.editing.reports import SaveReport
from mlxfun.errors import ModelError
from mlxfun.model.anatomy import Anatomy
from mlxfun.model.delta import Reader
from mlxfun.model.export import ExportView
from mlxfun.techniques.ablate.plan import AblationPlan


def open_checkpoint(loaded: Loaded, dtypes: Callable[[str], mx.Dtype]) -> Reader:
    """A reader of single parameters as stock loading makes them from the checkpoint.

    The model is built lazily, so only the tensors that are asked for are read. dtypes: the
    resident dtype of a parameter. Raises ModelError if the files are not those that were loaded.
    """
    if checkpoint_id(loaded.path) != loaded.checkpoint_id:
        raise ModelError(
            f"{loaded.path} is not the checkpoint that was loaded any more, so pruned experts "
            "cannot be read back from it; restore the files, or reload"
        )
    model, _ = load_model(loaded.path, lazy=True)
    arrays = dict(cast(list[tuple[str, mx.array]], tree_flatten(model.parameters())))

    def read(path: str) -> mx.array:
        array = arrays[path].astype(dtypes(path))
        mx.eval(array)
        return array

    return read


def save(
    loaded: Loaded,
    editor: Editor,
    anatomy: Anatomy,
    view: ExportView,
    options: SaveOptions,
    ctx: Context = SILENT,
) -> SaveReport:
    """Write the live side as a model of its own, with the recipe that made it.

    The gate compares with the resident model's logits, so steering (which is not saved) is off
    while it looks.
    """
    model: Any = view.model
    with editor.unsteered():
        return write(
            Export(
                weights=view,
                config=view.config(loaded.config),
                source=loaded.path,
                model_id=loaded.model_id,
                checkpoint_id=loaded.checkpoint_id,
                experts=len(editor.committed[0]),
                metadata=_metadata(editor, anatomy),
                recipe=editor.history.recipe(),
                scores=dict(editor.history.current.scores),
                logits=model,
            ),
            options,
            ctx,
        )


def _metadata(editor: Editor, anatomy: Anatomy) -> dict[str, Any]:
    """Metadata files of an edited model: keys of their maps are decoder layers."""
    plans = [node.plan for node in editor.history.ancestors() if node.plan is not None]
    prunes = [plan for plan in plans if isinstance(plan, PrunePlan)]
    merges = [plan for plan in plans if isinstance(plan, MergePlan)]
    ablations = [plan for plan in plans if isinstance(plan, AblationPlan)]
    live = dict(zip(anatomy.indices, editor.committed, strict=True))
    kept = {str(layer): list(experts) for layer, experts in live.items()}
    files: dict[str, Any] = {}
    if prunes:
        files["reap_metadata.json"] = {
            "original_num_experts": anatomy.num_experts,
            "pruned_num_experts": len(editor.committed[0]),
            "metric": next((p.metric for p in reversed(prunes) if p.metric), None),
            "keep_map": kept,
            "layer_indices": list(anatomy.indices),
        }
        silent = _never_chosen(prunes, kept)
        files["reap_metadata.json"] |= {"never_chosen": silent} if silent else {}
    if merges:
        files["ream_metadata.json"] = {
            "method": "ream",
            "original_num_experts": anatomy.num_experts,
            "merged_num_experts": len(editor.committed[0]),
            "metric": merges[-1].metric,
            "similarity_and_alignment": merges[-1].strategy,
            "centroid_map": kept,
            "group_map": {
                str(layer): {str(expert): _origins(expert, layer, merges) for expert in experts}
                for layer, experts in live.items()
            },
            "layer_indices": list(anatomy.indices),
        }
    if ablations:
        files["abliteration_metadata.json"] = _ablation_metadata(ablations)
    names = {"amplify": "amplification_metadata.json", "bake": "bake_metadata.json"}
    for plan in plans:
        if isinstance(plan, BoostPlan):  # of several, the last is written
            files[names[plan.technique]] = plan.metadata()
    return files


def _never_chosen(
    prunes: Sequence[PrunePlan], kept: Mapping[str, Sequence[int]]
) -> dict[str, list[int]]:
    """{decoder layer: experts that are there and that the router can never choose}."""
    silent: dict[str, set[int]] = {}
    for plan in prunes:
        for layer, experts in plan.dead.items():
            silent.setdefault(str(layer), set()).update(experts)
    found = {layer: sorted(experts & set(kept[layer])) for layer, experts in silent.items()}
    return {layer: experts for layer, experts in found.items() if experts}


def _ablation_metadata(plans: Sequence[AblationPlan]) -> dict[str, Any]:
    """What the last ablation was, the layers of all of them, and each in full under `edits`."""
    last = plans[-1]
    return {
        "method": "directional ablation, output side",
        "target": last.target,
        "abliterated_layers": sorted({layer for plan in plans for layer in plan.layers}),
        "direction_norms": {str(layer): norm for layer, norm in last.norms.items()},
        "source_layer": last.source_layer,
        "position": last.position,
        "edits": [plan.to_json() for plan in plans],
    }


def _origins(expert: int, layer: int, merges: Sequence[MergePlan]) -> list[int]:
    """The experts of the checkpoint that went into a live one, ascending."""
    members = {expert}
    for plan in reversed(merges):
        members = {m for e in members for m in plan.groups[layer].get(e, (e,))}
    return sorted(members)
