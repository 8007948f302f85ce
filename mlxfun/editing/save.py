"""Saving from a session, and reading single parameters back from the checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx

from mlxfun.checkpoint.identity import earlier_id
from mlxfun.checkpoint.load import Loaded, short
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.checkpoint.reports import SaveReport
from mlxfun.checkpoint.save import Export, write
from mlxfun.context import SILENT, Context
from mlxfun.editing.editor import Editor
from mlxfun.editing.history import Node
from mlxfun.editing.plans import SavedExperts
from mlxfun.errors import ModelError, StateError
from mlxfun.memory.streaming.unread import require_unchanged, unread
from mlxfun.model.export import ExportView
from mlxfun.model.places import Reader


def open_checkpoint(loaded: Loaded, dtypes: Callable[[str], mx.Dtype]) -> Reader:
    """A reader of single parameters as stock loading makes them from the checkpoint.

    The model is built lazily, so only the tensors that are asked for are read. dtypes: the
    resident dtype of a parameter. Raises ModelError if the files are not those that were loaded.
    """
    arrays = unread(loaded)

    def read(path: str) -> mx.array:
        array = arrays[path].astype(dtypes(path))
        try:
            mx.eval(array)
        except (RuntimeError, ValueError) as error:
            require_unchanged(loaded)
            raise ModelError(f"{path} cannot be read back: {short(error)}") from error
        # Only after the read is it certain that it was of the files that were loaded.
        require_unchanged(loaded)
        return array

    return read


def earlier_checkpoint_id(loaded: Loaded) -> str:
    """What earlier versions called the checkpoint, "" where the files are not there any more."""
    if loaded.changed:
        return ""
    try:
        return earlier_id(loaded.path)
    except (ModelError, OSError):
        return ""


def save(
    loaded: Loaded,
    editor: Editor,
    view: ExportView,
    options: SaveOptions,
    ctx: Context = SILENT,
    node: Node | None = None,
) -> SaveReport:
    """Write the live side as a model of its own, with the recipe that made it.

    The gate compares with the resident model's logits, so steering (which is not saved) is off
    while it looks. node: of an edit that is not in the history, whose tensors are not all in
    memory, so that there are no logits to compare with.
    """
    plan = options.bits
    if plan is not None and plan.state != editor.live_state and not options.allow_stale:
        raise StateError(
            f"the plan of bits was measured on state {plan.state}, and this is state "
            f"{editor.live_state}: run bits again, or give --allow-stale"
        )
    model = view.model
    end = node or editor.history.current
    with editor.unsteered():
        return write(
            Export(
                weights=view,
                config=view.config(loaded.config),
                source=loaded.path,
                model_id=loaded.model_id,
                checkpoint_id=loaded.checkpoint_id,
                experts=len(editor.committed[0]) if editor.committed else 0,
                metadata=_metadata(editor, end),
                recipe=editor.history.recipe(end),
                scores=dict(end.scores),
                logits=model if node is None else None,
                changed=loaded.changed,
                tokenizer=loaded.tokenizer,
                companions=loaded.companions,
                chat_template=_given_template(loaded),
                identity=f"{editor.live_state} {loaded.checkpoint_id} {_stamps(loaded)}",
            ),
            options,
            ctx,
        )


def _stamps(loaded: Loaded) -> str:
    """Names, sizes and times of the checkpoint's files."""
    return " ".join(f"{one.name}:{one.bytes}:{one.mtime_ns}" for one in loaded.files)


def _given_template(loaded: Loaded) -> str | None:
    """The chat template that the user gave in place of the model's, None for the model's own."""
    found = loaded.tokenizer.chat_template if loaded.given_template else None
    return found if isinstance(found, str) else None


def _metadata(editor: Editor, end: Node) -> dict[str, Any]:
    """Metadata files of an edited model, as its plans write them."""
    plans = [node.plan for node in editor.history.ancestors(end) if node.plan is not None]
    anatomy = editor.resident.anatomy
    live = dict(zip(anatomy.indices, editor.committed, strict=True))
    saved = SavedExperts(anatomy.num_experts, live)
    files: dict[str, Any] = {}
    kinds = {type(plan): plan for plan in plans}
    for kind, one in kinds.items():
        files |= one.metadata([plan for plan in plans if type(plan) is kind], saved)
    return files
