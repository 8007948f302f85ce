"""Steering vectors of the residual stream, from texts that have a quality and texts that lack it.

    mean    v = mean(positive) - mean(negative)
    pca     v = first principal component of the centred activations of both sets, with the mean
            difference's sign and its length along that direction

At strength 1 a vector moves the stream as far as the sets are apart. N. Rimsky et al., Steering
Llama 2 via contrastive activation addition, 2024; A. Zou et al., Representation engineering, 2023.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx
import numpy as np
from safetensors.numpy import save as to_safetensors

from mlxfun.arrays import Array
from mlxfun.checkpoint.headers import read_tensors
from mlxfun.errors import DatasetError, ModelError, UsageError
from mlxfun.files import writing
from mlxfun.tracing.activations import Work, get_activations
from mlxfun.tracing.options import VECTOR_METHODS, VectorMethod
from mlxfun.tracing.tracer import Tracer

FORMAT = "mlxfun steering vectors 1"
HELD_OUT = 0.25


@dataclass(frozen=True, slots=True)
class SteeringVectors:
    """layers: {decoder layer: float32 [D]}. method: how they were made. told_apart: {layer: share of
    held-out samples on their own side of the midpoint}, empty where there were too few samples.

    about: their provenance, as text: model_type, state, checkpoint, positive, negative, position,
    and how many samples there were.
    """

    layers: Mapping[int, Array]
    method: VectorMethod
    told_apart: Mapping[int, float] = field(default_factory=dict)
    about: Mapping[str, str] = field(default_factory=dict)


def make_vectors(
    model: Tracer,
    sets: tuple[Sequence[Sequence[int]], Sequence[Sequence[int]]],
    method: VectorMethod = "mean",
    layers: Sequence[int] | None = None,
    position: int = -1,
    work: Work = Work(),  # noqa: B008 - frozen
) -> SteeringVectors:
    """Vectors of the residual stream that leaves `layers` (all by default).

    sets: token ids of samples that have the quality, and of samples that lack it.
    A quarter of the samples of each set judges vectors that are made of the others; what is
    returned is made of all. Raises UsageError for an empty set or an unknown method.
    """
    if method not in VECTOR_METHODS:
        raise UsageError(f"there is no method {method!r}; there are {', '.join(VECTOR_METHODS)}")
    positive, negative = sets
    if not positive or not negative:
        raise UsageError("a steering vector is made of two sets of texts, and one is empty")
    chosen = list(range(model.parts.names.layers)) if layers is None else list(layers)
    sides = [
        get_activations(model, list(rows), chosen, position, work) for rows in (positive, negative)
    ]
    found: dict[int, Array] = {}
    apart: dict[int, float] = {}
    for layer in chosen:
        one, other = (np.array(side[layer].astype(mx.float32), np.float64) for side in sides)
        if one.ndim != 2:
            raise ModelError(
                f"{model.parts.map.model_type} has several residual streams; a vector of one of them "
                "is not known here"
            )
        found[layer] = direction(one, other, method).astype(np.float32)
        if (share := _told_apart(one, other, method)) is not None:
            apart[layer] = share
    about = {"positive samples": str(len(positive)), "negative samples": str(len(negative)),
             "position": str(position), "model_type": model.parts.map.model_type, **work.made_on}  # fmt: skip
    return SteeringVectors(found, method, apart, about)


def direction(positive: Array, negative: Array, method: VectorMethod) -> Array:
    """The vector [D] from negative [N, D] to positive [P, D]; see the module's text."""
    difference: Array = positive.mean(0) - negative.mean(0)
    if method == "mean":
        return difference
    both = np.concatenate([positive, negative])
    first: Array = np.linalg.svd(both - both.mean(0), full_matrices=False)[2][0]
    return np.asarray(first * float(first @ difference))


def _told_apart(positive: Array, negative: Array, method: VectorMethod) -> float | None:
    """The share of held-out samples on their own side; None with fewer than 4 of either set."""
    if min(len(positive), len(negative)) < 4:
        return None
    rng = np.random.default_rng(0)
    parts = []
    for rows in (positive, negative):
        order = rng.permutation(len(rows))
        cut = max(1, round(HELD_OUT * len(rows)))
        parts.append((rows[order[cut:]], rows[order[:cut]]))
    (p_train, p_test), (n_train, n_test) = parts
    way = direction(p_train, n_train, method)
    middle = float((p_train.mean(0) + n_train.mean(0)) @ way) / 2
    return float((np.mean(p_test @ way > middle) + np.mean(n_test @ way < middle)) / 2)


def save_vectors(vectors: SteeringVectors, path: Path) -> None:
    """Write a safetensors file: one tensor "layers.N" for each layer, provenance in its metadata.

    Raises SaveError where it cannot be written.
    """
    arrays = {f"layers.{n}": np.ascontiguousarray(v, np.float32) for n, v in vectors.layers.items()}
    said = {"format": FORMAT, "method": vectors.method,
            "told_apart": json.dumps({str(k): v for k, v in vectors.told_apart.items()}),
            **vectors.about}  # fmt: skip
    with writing(path) as file:
        file.write(to_safetensors(arrays, said))


def load_vectors(path: Path) -> SteeringVectors:
    """Read such a file. Raises DatasetError for one that is none, ModelError for a corrupt one."""
    if not path.is_file():
        raise DatasetError(f"{path} is no file; name a file that vector save has written")
    arrays, said = read_tensors(path, FORMAT)
    if said.get("format") != FORMAT:
        raise DatasetError(
            f"{path} holds no steering vectors ({said.get('format', 'no format is named')}); name a "
            "file that vector save has written"
        )
    layers = {}
    for name, array in sorted(arrays.items(), key=lambda item: item[0]):
        number = name.removeprefix("layers.")
        if not number.isdigit() or array.ndim != 1:
            raise DatasetError(f"{path}: {name} {list(array.shape)} is no vector of a layer")
        layers[int(number)] = array.astype(np.float32)
    method: VectorMethod = "pca" if said.get("method") == "pca" else "mean"
    apart = {int(k): float(v) for k, v in json.loads(said.get("told_apart", "{}")).items()}
    about = {k: v for k, v in said.items() if k not in ("format", "method", "told_apart")}
    return SteeringVectors(dict(sorted(layers.items())), method, apart, about)


def require_fitting(vectors: SteeringVectors, model: Tracer, where: str) -> None:
    """Raise UsageError for vectors of another width, or of layers that the model has not."""
    width, count = model.parts.map.hidden_size, model.parts.names.layers
    for layer, vector in vectors.layers.items():
        if layer >= count or (width is not None and len(vector) != width):
            raise UsageError(
                f"{where} has a vector of {len(vector)} values for layer {layer}; "
                f"{model.parts.map.model_type} has {count} layers of {width}"
            )
