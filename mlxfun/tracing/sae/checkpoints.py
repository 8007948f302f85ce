"""The state of a training run, in one safetensors file: parameters, Adam's moments, progress."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from safetensors.numpy import save as to_safetensors

from mlxfun.arrays import Array
from mlxfun.checkpoint.headers import read_tensors
from mlxfun.errors import DatasetError, UsageError
from mlxfun.files import writing
from mlxfun.tracing.options import SaeTraining
from mlxfun.tracing.sae.losses import Params

FORMAT = "mlxfun autoencoder in training 1"


@dataclass(slots=True)
class Progress:
    """How far a run is. passed: whole passes; block: of this pass; step: of this block. idle: int64
    [F], tokens since each feature was active. scale: what values are multiplied by. loss: see
    Trained; sums: (of the loss, tokens) since its last row."""

    params: Params = field(default_factory=dict)
    adam: dict[str, Any] = field(default_factory=dict)
    idle: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    scale: float = 1.0
    passed: int = 0
    block: int = 0
    step: int = 0
    tokens: int = 0
    steps: int = 0
    loss: list[tuple[int, float]] = field(default_factory=list)
    sums: tuple[float, int] = (0.0, 0)
    said: Mapping[str, Any] = field(default_factory=dict)


FIGURES = ("scale", "passed", "block", "step", "tokens", "steps", "loss", "sums")


def save_progress(
    at: Progress, options: SaeTraining, name: str, about: Mapping[str, str], path: Path
) -> None:
    """Write a checkpoint, in place of the one that is there. Raises SaveError."""
    arrays = {f"params.{key}": np.array(a) for key, a in at.params.items()}
    arrays |= {f"adam.{key}": np.array(a) for key, a in _flat(at.adam)}
    arrays["idle"] = at.idle
    said = {"format": FORMAT, "options": json.dumps(asdict(options)), "at": name,
            "about": json.dumps(dict(about)),
            "figures": json.dumps({key: getattr(at, key) for key in FIGURES})}  # fmt: skip
    with writing(path) as file:
        file.write(to_safetensors(arrays, said))


def _flat(tree: dict[str, Any]) -> list[tuple[str, mx.array]]:
    return cast(list[tuple[str, mx.array]], tree_flatten(tree))


def load_progress(path: Path) -> Progress:
    """Read a checkpoint. Raises DatasetError for a file that is none, ModelError for a corrupt one."""
    if not path.is_file():
        raise DatasetError(f"there is nothing to go on from: {path} is no file")
    arrays, said = read_tensors(path, FORMAT)
    if said.get("format") != FORMAT:
        raise DatasetError(f"{path} holds no training run of an autoencoder")
    figures = json.loads(said["figures"])
    figures["loss"] = [(int(tokens), float(loss)) for tokens, loss in figures["loss"]]
    figures["sums"] = (float(figures["sums"][0]), int(figures["sums"][1]))
    moved = {key: mx.array(a) for key, a in arrays.items() if key != "idle"}
    mx.eval(moved)
    params = {k.removeprefix("params."): a for k, a in moved.items() if k.startswith("params.")}
    adam = [(k.removeprefix("adam."), a) for k, a in moved.items() if k.startswith("adam.")]
    made_of = {key: said.get(key, "") for key in ("options", "at", "about")}
    return Progress(params, tree_unflatten(adam), arrays["idle"], **figures, said=made_of)


def require_same(
    at: Progress, options: SaeTraining, name: str, about: Mapping[str, str], where: Path
) -> None:
    """Raise UsageError for a checkpoint of other options, another value or other provenance."""
    before: dict[str, Any] = {"at": at.said["at"], **json.loads(at.said["options"]),
                              **json.loads(at.said["about"])}  # fmt: skip
    now: dict[str, Any] = {"at": name, **asdict(options), **about}
    for key in [*before, *(k for k in now if k not in before)]:
        if before.get(key) != now.get(key):
            raise UsageError(
                f"{where} was trained with {key} {before.get(key)}, and now it is {now.get(key)}: a "
                "run goes on as it began; start another one in another directory"
            )
