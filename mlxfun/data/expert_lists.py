"""Expert sets in files and on command lines: keep lists, safety and domain maps, ranges.

Layer keys in these files are positions 0..L-1 among the MoE layers, as the ancestor's tools write
and read them; `layer_indices` beside them says which decoder layers those are. A keep list whose
keys are those decoder layers is understood as well.

A safety or domain map that cannot be read in full is an error and never a smaller set.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mlxfun.arrays import Mask
from mlxfun.data.expert_notation import _is_number
from mlxfun.data.options import MAP_MODES, ExpertSets, MapMode
from mlxfun.errors import PlanError, UsageError
from mlxfun.files import Kind, json_with, read_text, write_text

VERSION = "1.0"
_COLUMNS = ("layer", "expert", "action")


def _is_list(path: Path) -> bool:
    if path.suffix.lower() != ".csv":
        return json_with("keep_map")(path)
    head = path.read_bytes()[:200].decode("utf-8-sig", "replace").partition("\n")[0]
    return set(_COLUMNS) <= {name.strip() for name in head.split(",")}


LIST = Kind("expert list", _is_list)


class MapOptions(Protocol):
    """Options that name reports of scans, and how each is used: "protect" or "target"."""

    @property
    def safety_map(self) -> Path | None: ...
    @property
    def safety_mode(self) -> MapMode: ...
    @property
    def domain_map(self) -> Path | None: ...
    @property
    def domain_mode(self) -> MapMode: ...


@dataclass(frozen=True, slots=True)
class MapFiles:
    """A safety map alone, of a technique that reads no other files."""

    safety_map: Path | None
    allow_stale: bool = False
    safety_mode: MapMode = "protect"
    domain_map: Path | None = None
    domain_mode: MapMode = "protect"
    expert_list: Path | None = None


# --- command lines ---------------------------------------------------------------------------


# --- keep lists ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Maker:
    """The model a list is made on: its checkpoint's identity and its name; "" for unknown."""

    model: str = ""
    name: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.model})" if self.name else self.model


def write_expert_list(
    path: Path, keep: Mapping[int, Sequence[int]], experts: int, made_on: Maker | None = None
) -> None:
    """Write a keep list, CSV when the name ends in .csv and JSON otherwise.

    keep: {decoder layer: experts that stay} for every MoE layer. experts: how many there were.

    Raises SaveError when the file cannot be written.
    """
    layers, made_on = sorted(keep), made_on or Maker()
    if path.suffix.lower() == ".csv":
        text = _csv_text(layers, keep, experts, made_on)
    else:
        document = {
            "version": VERSION,
            "original_num_experts": experts,
            "keep_map": {str(i): [int(e) for e in keep[layer]] for i, layer in enumerate(layers)},
            "layer_indices": layers,
        }
        if made_on.model:
            document |= {"model": made_on.model, "model_name": made_on.name}
        text = json.dumps(document, indent=2) + "\n"
    write_text(path, text, LIST)


def _csv_text(
    layers: list[int], keep: Mapping[int, Sequence[int]], experts: int, made_on: Maker
) -> str:
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    known = [made_on.model] if made_on.model else []
    writer.writerow([*_COLUMNS, "layer_index", *(["model"] if known else [])])
    for position, layer in enumerate(layers):
        staying = set(keep[layer])
        for expert in range(experts):
            action = "keep" if expert in staying else "prune"
            writer.writerow([position, expert, action, layer, *known])
    return stream.getvalue()


def list_warning(path: Path, now: Maker, earlier: Callable[[str], bool] | None = None) -> str:
    """That a list was made on another model than `now`; "" if it was not, or does not say.

    earlier: whether an identity is that which an earlier version gave to the model of `now`.

    No error: a list serves a quantised copy of its model as well.
    """
    if path.suffix.lower() == ".csv":
        try:
            row = next(csv.DictReader(io.StringIO(_read_text(path)), skipinitialspace=True), {})
        except csv.Error as problem:
            raise PlanError(f"{path} is no expert list: {problem}") from None
        made_on = Maker(str(row.get("model") or ""))
    else:
        found = read_document(path)
        made_on = Maker(*(str(found.get(key) or "") for key in ("model", "model_name")))
    if made_on.model in ("", now.model) or (earlier is not None and earlier(made_on.model)):
        return ""
    return f"{path} was made on the model {made_on}, this is {now}"


def read_expert_list(path: Path, layers: Sequence[int], experts: int) -> ExpertSets:
    """Read a keep list for a model whose MoE layers are `layers`, with `experts` experts each.

    Returns {decoder layer: experts that stay, ascending} for every layer. CSV rows say keep or
    prune; a layer with prune rows alone keeps the others.

    Raises PlanError for a file that is unreadable, incomplete or of another model.
    """
    if path.suffix.lower() == ".csv":
        try:
            found = _read_csv(path, layers, experts)
        except csv.Error as problem:  # a field of more than 128 KiB
            raise PlanError(f"{path} is no expert list: {problem}") from None
    else:
        document = read_document(path)
        entries = document.get("keep_map")
        if not isinstance(entries, dict):
            raise PlanError(f"{path} is no expert list, as it has no keep_map; see plan save")
        stated = document.get("original_num_experts", experts)
        if type(stated) is not int or stated != experts:
            raise PlanError(
                f"{path} is for a model with {stated!r} experts per layer; this model has {experts}"
            )
        where = _layer_keys(path, entries, document.get("layer_indices"), layers)
        found = {where[key]: _experts(path, key, entries[key], experts) for key in entries}
    missing = [layer for layer in layers if layer not in found]
    if missing:
        raise PlanError(f"{path} says nothing about the MoE layers {_listed(missing)}")
    return {layer: found[layer] for layer in layers}


def _layer_keys(
    path: Path, entries: Mapping[str, Any], indices: Any, layers: Sequence[int]
) -> dict[str, int]:
    """{key: decoder layer}. Keys are positions, or decoder layers where the file lists them."""
    numbers = {key: _number(path, "layer", key) for key in entries}
    if len(set(numbers.values())) < len(numbers):
        raise PlanError(f"{path} names a layer twice")
    _check_indices(path, indices, layers)
    if indices is not None and set(numbers.values()) == set(layers):
        return numbers
    wrong = sorted(n for n in numbers.values() if n >= len(layers))
    if wrong:
        raise PlanError(
            f"{path} names the MoE layers {_listed(wrong)}, counted from 0; this model has "
            f"{len(layers)}"
        )
    return {key: layers[position] for key, position in numbers.items()}


def _check_indices(path: Path, indices: Any, layers: Sequence[int]) -> None:
    if indices is not None and indices != list(layers):
        raise PlanError(
            f"{path} is for a model with MoE layers {indices}; this model has {list(layers)}"
        )


def _read_csv(path: Path, layers: Sequence[int], experts: int) -> ExpertSets:
    keep: dict[int, set[int]] = {}
    prune: dict[int, set[int]] = {}
    reader = csv.DictReader(io.StringIO(_read_text(path)), skipinitialspace=True)
    if not set(_COLUMNS) <= set(reader.fieldnames or ()):
        raise PlanError(f"{path} needs the columns layer, expert and action")
    for row in reader:
        where = f"{path}:{reader.line_num}"
        action = (row["action"] or "").strip().lower()
        if action not in ("keep", "prune"):
            raise PlanError(f"{where}: action {row['action']!r} is neither keep nor prune")
        layer = _csv_layer(where, row, layers)
        expert = _number(where, "expert", row["expert"])
        if expert >= experts:
            raise PlanError(f"{where}: expert {expert} is unknown; they are 0..{experts - 1}")
        (keep if action == "keep" else prune).setdefault(layer, set()).add(expert)
    found = {}
    for layer in keep.keys() | prune.keys():
        both = sorted(keep.get(layer, set()) & prune.get(layer, set()))
        if both:
            raise PlanError(f"{path}: layer {layer} both keeps and prunes {_listed(both)}")
        rest = set(range(experts)) - prune.get(layer, set())
        unsaid = sorted(rest - keep.get(layer, rest))
        if unsaid and layer in prune:
            raise PlanError(
                f"{path}: layer {layer} keeps some experts and prunes others, and says nothing "
                f"about {_listed(unsaid)}; this model has {experts}, so the list may be of another"
            )
        found[layer] = tuple(sorted(keep.get(layer, rest)))
    return found


def _csv_layer(where: str, row: Mapping[str, str], layers: Sequence[int]) -> int:
    position = _number(where, "layer", row["layer"])
    if position >= len(layers):
        raise PlanError(
            f"{where}: MoE layer {position}, counted from 0, is unknown; the model has "
            f"{len(layers)}"
        )
    stated = row.get("layer_index")
    if stated and _number(where, "layer_index", stated) != layers[position]:
        raise PlanError(
            f"{where}: MoE layer {position} is decoder layer {layers[position]} here, and "
            f"{stated} in the file; it is of another model"
        )
    return layers[position]


# --- safety and domain maps ------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Masks:
    """protect, target: bool [L, E]. warnings: sentences for the user."""

    protect: Mask
    target: Mask
    warnings: tuple[str, ...] = ()


def read_maps(options: MapOptions, layers: Sequence[int], experts: int) -> Masks:
    """The union of --safety-map and --domain-map, each in its mode.

    Raises PlanError for a map that is unreadable, malformed or of another model: a map is used
    whole or the work stops. Raises UsageError for an unknown mode.
    """
    shape = (len(layers), experts)
    masks = {mode: np.zeros(shape, dtype=np.bool_) for mode in MAP_MODES}
    warnings = []
    for path, mode, key in (
        (options.safety_map, options.safety_mode, "safety_critical"),
        (options.domain_map, options.domain_mode, "domain_experts"),
    ):
        if mode not in MAP_MODES:
            raise UsageError(f"mode {mode!r} of a map: choose one of {', '.join(MAP_MODES)}")
        if path is None:
            continue
        found = read_map(path, key, layers, experts)
        masks[mode] |= found
        if not found.any():
            warnings.append(f"{path} names no experts under {key}: it has no effect")
    return Masks(masks["protect"], masks["target"], tuple(warnings))


def read_map(path: Path, key: str, layers: Sequence[int], experts: int) -> Mask:
    """bool [L, E]: the experts under `key` of a safety or domain report.

    Raises PlanError unless every entry is understood.
    """
    return read_table(path, read_document(path), key, layers, experts)


def read_table(
    path: Path, document: Mapping[str, Any], key: str, layers: Sequence[int], experts: int
) -> Mask:
    """The same of a report already read, bool [L, E]."""
    for name, expected in (("num_layers", len(layers)), ("num_experts", experts)):
        if document.get(name) != expected:
            raise PlanError(
                f"{path} has {name} {document.get(name)!r} and this model {expected}; make the "
                "map on this model"
            )
    return read_sets(path, document, key, layers, experts)


def read_sets(
    path: Path, document: Mapping[str, Any], key: str, layers: Sequence[int], experts: int
) -> Mask:
    """bool [L, E]: the table {layer position: experts} under `key`, whatever else there is."""
    entries = document.get(key)
    if not isinstance(entries, dict):
        raise PlanError(f"{path} has no table {key!r} of experts by layer; give a report that has")
    _check_indices(path, document.get("layer_indices"), layers)
    numbers = {name: _number(path, "layer", name) for name in entries}
    if len(set(numbers.values())) < len(numbers) or max(numbers.values(), default=0) >= len(layers):
        raise PlanError(f"{path}: the layers under {key!r} must be 0..{len(layers) - 1}, each once")
    mask = np.zeros((len(layers), experts), dtype=np.bool_)
    for name, position in numbers.items():
        mask[position, list(_experts(path, name, entries[name], experts))] = True
    return mask


# --- shared ----------------------------------------------------------------------------------


def _experts(path: Path, layer: str, value: Any, experts: int) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(e) is not int for e in value):
        raise PlanError(f"{path}: layer {layer} must have a list of expert numbers")
    unknown = sorted({e for e in value if not 0 <= e < experts})
    if unknown:
        raise PlanError(
            f"{path}: layer {layer} names unknown experts {_listed(unknown)}; they are "
            f"0..{experts - 1}"
        )
    return tuple(sorted(set(value)))


def _number(where: Path | str, name: str, value: Any) -> int:
    if not isinstance(value, str) or not _is_number(value):
        raise PlanError(f"{where}: {name} {value!r} is not a number")
    return int(value)


def _read_text(path: Path) -> str:
    try:
        text = read_text(path, "utf-8-sig")
    except OSError as error:
        raise PlanError(f"cannot read {path}: {error.strerror}; check the path") from error
    except UnicodeDecodeError as error:
        raise PlanError(f"{path} is not UTF-8 text; write it anew") from error
    if "\0" in text:  # Python's csv takes it as part of a field
        raise PlanError(f"{path} holds zero bytes, as no text does; write it anew")
    return text


def read_document(path: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises PlanError for anything else, or a key given twice."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        # json would keep the last of two equal keys: silently a smaller set.
        if len(dict(pairs)) < len(pairs):
            raise PlanError(f"{path} has a key twice in one table; it cannot be used")
        return dict(pairs)

    try:
        document = json.loads(_read_text(path), object_pairs_hook=unique)
    except (json.JSONDecodeError, RecursionError) as error:
        raise PlanError(f"{path} is not valid JSON ({error}); write it anew") from error
    except ValueError as error:  # what Python says tells how to lift its limit
        raise PlanError(f"{path} holds a number of thousands of digits; write it anew") from error
    if not isinstance(document, dict):
        raise PlanError(f"{path} does not hold a JSON object; write it anew")
    return document


def _listed(values: Sequence[int]) -> str:
    shown = ", ".join(str(v) for v in values[:8])
    return shown + (f", ... ({len(values)} in all)" if len(values) > 8 else "")
