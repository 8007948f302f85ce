"""Profiles: how much each expert of a model is used, as a file of plain JSON.

    {"model": "...", "num_experts": 128,
     "layers": {"0": {"universal": [3, 17, ...], "activation_counts": {"3": 812.5, ...}}, ...}}

These are the keys of mlx-moe's profiles, which are read as they are. A table of layer -> experts, the
most useful first, or of layer -> {expert: score} is understood too, with or without "layers" around
it. Layers are numbered as decoder layers; where a file's numbers are no MoE layers of the model, as
positions among those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mlxfun.data.expert_lists import read_document
from mlxfun.errors import PlanError
from mlxfun.files import Kind, json_with, write_json
from mlxfun.text import shown

if TYPE_CHECKING:
    from mlxfun.arrays import Array

FILE = Kind("profile of experts", json_with("layers"))
LISTS = ("universal", "experts")
TABLES = ("activation_counts", "scores")


@dataclass(frozen=True, slots=True)
class Layers:
    """The MoE layers of a model. indices: their decoder layers, [L]. experts: E."""

    indices: tuple[int, ...]
    experts: int


def write_profile(
    path: Path, layers: Layers, scores: Array, held: Array, model: tuple[str, str]
) -> None:
    """Write scores, float64 [L, E]; held: bool [L, E], the experts that are in memory. model: name
    and checkpoint identity. Raises SaveError."""
    tables: dict[str, Any] = {}
    for row, index in enumerate(layers.indices):
        order = np.argsort(-scores[row], kind="stable")
        tables[str(index)] = {
            "universal": [int(e) for e in order if held[row, e]],
            "activation_counts": {
                str(e): round(float(scores[row, e]), 6) for e in np.flatnonzero(scores[row])
            },
        }
    document = {
        "model": model[0],
        "checkpoint": model[1],
        "num_experts": layers.experts,
        "moe_layers": len(layers.indices),
        "layers": tables,
    }
    write_json(path, document, FILE)


def read_profile(path: Path, layers: Layers) -> Array:
    """Scores of the experts, float64 [L, E], larger for what is rather held.

    Raises PlanError for a file that is none, or is of a model of another shape.
    """
    document = read_document(path)
    count = document.get("num_experts")
    if isinstance(count, int) and count != layers.experts:
        raise PlanError(
            f"{path} is of a model with {count} experts a layer and this one has {layers.experts}: "
            "make a profile of this model with profile save"
        )
    tables = document.get("layers", document)
    if not isinstance(tables, Mapping) or not tables:
        raise PlanError(f"{path} has no table of experts by layer; write one with profile save")
    scores = np.zeros((len(layers.indices), layers.experts))
    for row, (name, value) in zip(_rows(path, tables, layers), tables.items(), strict=True):
        scores[row] = _scores(f"{path}: layer {name}", value, layers.experts)
    return scores


def _rows(path: Path, tables: Mapping[str, Any], layers: Layers) -> list[int]:
    odd = next((name for name in tables if not name.isdecimal() or len(name) > 6), None)
    if odd is not None:
        raise PlanError(
            f"{path}: layer {shown(odd)} is not a number; write a file with profile save"
        )
    numbers = [int(name) for name in tables]
    where = {index: row for row, index in enumerate(layers.indices)}
    if all(number in where for number in numbers):
        return [where[number] for number in numbers]
    if max(numbers) < len(layers.indices):
        return numbers
    raise PlanError(
        f"{path} names layer {max(numbers)}, and the MoE layers of this model are "
        f"{layers.indices[0]}..{layers.indices[-1]}: it is of another model"
    )


def _scores(where: str, value: Any, experts: int) -> Array:
    if isinstance(value, Mapping):
        found = next((value[key] for key in (*TABLES, *LISTS) if value.get(key)), value)
    else:
        found = value
    scores = np.zeros(experts)
    if isinstance(found, list):
        for place, expert in enumerate(found):
            # The first is held first; what is not named comes after all of them.
            scores[_expert(where, expert, experts)] = len(found) - place
        return scores
    if not isinstance(found, Mapping):
        raise PlanError(f"{where} has neither a list of experts nor a table of scores")
    for name, score in found.items():
        if name in (*TABLES, *LISTS):
            continue  # of a layer of which nothing was used
        number = int(name) if name.isdecimal() and len(name) < 7 else name
        good = isinstance(score, int | float) and not isinstance(score, bool)
        if not good or not 0 <= score < 1e300:
            raise PlanError(f"{where}: the score of expert {shown(name)} is {shown(score)}")
        scores[_expert(where, number, experts)] = score
    return scores


def _expert(where: str, expert: Any, experts: int) -> int:
    if type(expert) is not int or not 0 <= expert < experts:
        raise PlanError(f"{where} names expert {shown(expert)}; they are 0..{experts - 1}")
    return expert
