"""File format of safety_report.json and domain_report.json: written by scans, read by steering.

The tables and their keys are those of other tools of the family: layers are positions 0..L-1 among
the MoE layers. `layer_indices` beside them lists the decoder layers, and `significance` what the
flags rest on; readers that do not know these keys ignore them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from mlxfun.arrays import Mask
from mlxfun.data.expert_lists import read_document, read_table
from mlxfun.data.options import ScanKind
from mlxfun.errors import PlanError, StateError
from mlxfun.files import Kind, json_with, write_json

if TYPE_CHECKING:
    from mlxfun.arrays import Array

DIGITS = 8
ROUNDING = 1e-6
"""How far beyond its bounds a score may be for having been rounded by another tool."""
REPORT = Kind("report of a scan", json_with("composite_score"))

TABLES: dict[ScanKind, tuple[str, str]] = {
    "safety": ("hcdg_experts", "hrcg_experts"),
    "domain": ("domain_experts", "general_experts"),
}
"""Per kind of report: the table of experts that work more on the first set, and on the second."""


@dataclass(frozen=True, slots=True)
class Identity:
    """The checkpoint and the state of its weights; "" where a file does not say."""

    model: str
    state: str
    model_name: str = ""

    def known(self, made_on: Identity) -> Identity:
        """`made_on` as this version calls it; see mlxfun.editing.earlier.Present."""
        return made_on


@dataclass(frozen=True, slots=True)
class Found:
    """A report as read. more, less: bool [L, E]. composite: float64 [L, E]. domain_name: "" for none.

    notices: sentences for the user on how it was read.
    """

    path: Path
    more: Mask
    less: Mask
    composite: Array
    identity: Identity
    domain_name: str = ""
    notices: tuple[str, ...] = ()


class ScanTables(Protocol):
    """What a scan found, all [L, E]; see mlxfun.scans.contrast.Contrast."""

    @property
    def composite(self) -> Array: ...
    @property
    def differential_freq(self) -> Array: ...
    @property
    def differential_activation(self) -> Array: ...
    @property
    def more(self) -> Mask: ...
    @property
    def less(self) -> Mask: ...
    @property
    def risk_difference(self) -> Array | None: ...
    @property
    def p(self) -> Array: ...
    @property
    def q(self) -> Array: ...
    @property
    def stability(self) -> Array: ...


def write_report(
    path: Path,
    kind: ScanKind,
    found: ScanTables,
    layers: Sequence[int],
    about: dict[str, Any],
) -> None:
    """Write a "safety" or "domain" report, whole or not at all.

    layers: the decoder layers of the L rows. about: model, state and the data sets, as JSON.

    Raises SaveError when the file cannot be written.
    """
    rows, experts = found.composite.shape
    above, below = TABLES[kind]
    document: dict[str, Any] = {
        "num_layers": rows,
        "num_experts": experts,
        "differential_freq": _listed(found.differential_freq),
        "differential_activation": _listed(found.differential_activation),
        "composite_score": _listed(found.composite),
        above: _table(found.more),
        below: _table(found.less),
    }
    if kind == "safety":
        document["safety_critical"] = _table(found.more | found.less)
    difference = found.risk_difference
    document["layer_indices"] = [int(layer) for layer in layers]
    document["significance"] = {
        "p": _listed(found.p),
        "q": _listed(found.q),
        "stability": _listed(found.stability),
        "risk_difference": None if difference is None else _listed(difference),
    }
    write_json(path, document | about, REPORT)


def _listed(values: Array) -> Any:
    return np.round(values, DIGITS).tolist()


def _table(mask: Mask) -> dict[str, list[int]]:
    """{position: experts}, positions without experts included: other tools look every one up."""
    return {str(row): np.flatnonzero(experts).tolist() for row, experts in enumerate(mask)}


def read_report(path: Path, kind: ScanKind, layers: Sequence[int], experts: int) -> Found:
    """Read a "safety" or "domain" report in full.

    Raises PlanError for a file that is unreadable, incomplete or of a model of another shape.
    """
    document = read_document(path)
    above, below = TABLES[kind]
    shape = (len(layers), experts)
    try:
        found = np.array(document.get("composite_score"))
    except ValueError:  # rows of different lengths
        found = np.empty(0)
    # Of a number too large for a float NumPy makes an object. NaN is within no bounds.
    numbers = found.dtype.kind in "iuf" and found.shape == shape
    largest = float(np.abs(found).max(initial=0.0)) if numbers else np.nan
    notices: tuple[str, ...] = ()
    # mlx_fun adds up two differences without bounds. It writes the first key, and the others not.
    ours = {"layer_indices", "significance"} & document.keys()
    if "threshold_percentile" in document and not ours and 1 + ROUNDING < largest < np.inf:
        found = found / largest
        notices = (
            f"{path} has composite scores up to {largest:.4g}, as mlx_fun writes them: they are "
            "divided by that, so that the largest is 1",
        )
        largest = 1.0
    if not largest <= 1 + ROUNDING:
        raise PlanError(
            f"{path} needs composite_score as {shape[0]} x {shape[1]} numbers (layers x experts) "
            "from -1 to 1; make the report on this model"
        )
    composite = found.astype(np.float64)
    return Found(
        path,
        read_table(path, document, above, layers, experts),
        read_table(path, document, below, layers, experts),
        composite,
        identity_of(document),
        str(document.get("domain_name") or ""),
        notices,
    )


def identity_of(document: dict[str, Any]) -> Identity:
    """What a report says it was made on."""
    model, state, name = (str(document.get(key) or "") for key in ("model", "state", "model_name"))
    return Identity(model, state, name)


def earlier_notice(path: Path) -> str:
    """That a file names the checkpoint in the old way, which fewer bytes of it decide."""
    return (
        f"{path} was made with the identity of an earlier version, which does not tell models "
        "apart that differ in few tensors: make sure that it is of this one"
    )


def require_current(path: Path, made_on: Identity, now: Identity, root: str, stale: bool) -> str:
    """A warning ("" for none) about a file made on other weights than the present ones.

    root: the checkpoint's own state, which is what a file that does not say was made on.

    Raises StateError unless `stale` allows it; both sides are named.
    """
    recorded, made_on = made_on, now.known(made_on)
    state = made_on.state or root
    if made_on.model and made_on.model != now.model:
        text = f"{path} was made on the model {made_on.model_name or made_on.model} "
        text += f"({made_on.model}), this is {now.model_name or now.model}"
    elif state != now.state:
        text = f"{path} was made on state {state}, the model is at {now.state}"
    else:
        return earlier_notice(path) if recorded.model != made_on.model else ""
    if not stale:
        raise StateError(f"{text}; scan again, or use it knowingly with --allow-stale")
    return text
