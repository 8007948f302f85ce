"""What an edit that runs the model works with, handed out by the session."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn

from mlxfun.anatomy import Anatomy
from mlxfun.editor import Editor
from mlxfun.evaluate import EvalSet, Evaluator
from mlxfun.export import ExportView

if TYPE_CHECKING:
    from mlxfun.datasets import Tokens


@dataclass(frozen=True, slots=True)
class Workshop:
    """calibration: the sequences of the last collect, empty before one; held_out: those it kept
    away. stored: the dtype of a parameter on disk. export: the live side as it would be saved.
    memory_limit: bytes that may be active, None if unknown.
    """

    model: nn.Module
    anatomy: Anatomy
    editor: Editor
    tokenizer: Any
    evaluator: Evaluator
    calibration: Sequence[Tokens]
    held_out: EvalSet | None
    stored: Callable[[str], mx.Dtype]
    export: Callable[[], ExportView]
    memory_limit: int | None

    def modules(self) -> dict[str, nn.Module]:
        """Every module of the model by its path."""
        return dict(self.model.named_modules())
