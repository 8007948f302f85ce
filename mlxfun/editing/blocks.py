"""Single layers of a model in another state of its history than the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from mlxfun.editing.editor import Editor
from mlxfun.model.delta import Delta


@contextmanager
def block_at_root(editor: Editor, position: int) -> Iterator[None]:
    """The MoE block at `position` is the checkpoint's inside the block, and all else as it is.

    The committed side must be live, without steering.
    """
    resident = editor.resident
    prefix = f"{resident.layers[position].layer.block}."
    with ExitStack() as stack:
        for edge in editor.edges_to_root():
            for layer in edge.layers:
                if layer.position == position:
                    arrays = {p: a for p, a in layer.arrays.items() if p.startswith(prefix)}
                    rows = {p: r for p, r in layer.rows.items() if p.startswith(prefix)}
                    part = replace(layer, arrays=arrays, rows=rows)
                    stack.enter_context(resident.trial(Delta((part,), edge.release)))
        yield
