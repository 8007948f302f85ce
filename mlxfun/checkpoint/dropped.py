"""Detects parts of a checkpoint that stock mlx-lm loading drops, such as vision towers.

mlx-lm's `sanitize` renames, stacks, transposes and drops tensors, so names alone decide nothing.
Parts are recognised by their names (towers for other modalities, multi-token-prediction layers)
and by decoder layers past the last loaded one; what remains is found by counting elements, and
only said when the dtypes show that nothing was repacked.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mlxfun.checkpoint.headers import Header, TensorInfo
from mlxfun.model.anatomy.facts import NESTED_CONFIGS
from mlxfun.text import readable_bytes

_TOWERS = {
    "vision": ("vision", "visual", "image", "mm_projector", "multi_modal_projector", "img"),
    "audio": ("audio", "speech", "sound"),
    "multi-token-prediction": ("mtp", "nextn", "eagle"),
}
_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d+)\.")
# Buffers and tied heads carry no information of their own; they are dropped by everybody.
_REDUNDANT = re.compile(r"rotary_emb\.inv_freq$|(?:^|\.)lm_head\.weight$|position_ids$")
_REPACKED = {"U8", "I8", "U32", "I32", "F4", "F8_E4M3", "F8_E5M2", "F8_E8M0"}


def dropped_notes(
    headers: Iterable[Header], loaded: Mapping[str, int], decoder_layers: int
) -> tuple[str, ...]:
    """One sentence for each part of the checkpoint that was not loaded.

    loaded: {parameter path: number of elements}; decoder_layers: how many the loaded model has.
    """
    tensors = {name: info for header in headers for name, info in header.tensors.items()}
    parts: dict[str, int] = {}
    counted = 0
    for name, info in tensors.items():
        part = _part(name, loaded, decoder_layers)
        if part is not None:
            parts[part] = parts.get(part, 0) + info.nbytes
            counted += info.size
        elif name not in loaded and _REDUNDANT.search(name):
            counted += info.size
    notes = [
        f"stock loading drops the {part} ({readable_bytes(count)}); a saved model lacks it"
        for part, count in sorted(parts.items())
    ]
    rest = sum(info.size for info in tensors.values()) - counted - sum(loaded.values())
    if rest > 0 and not _is_repacked(tensors.values()):
        notes.append(
            f"stock loading drops {rest:,} further elements of the checkpoint; "
            "a saved model lacks them"
        )
    return tuple(notes)


MTP_COUNTS = (
    "num_nextn_predict_layers", "num_mtp_layers", "mtp_num_hidden_layers", "num_mtp_modules",
    "mtp_num_layers", "n_mtp_layers",
)  # fmt: skip
"""Keys of config.json, at its top or nested, that count multi-token-prediction layers."""

MTP_SWITCHES = ("use_mtp",)
"""Keys that say whether there are any."""


def without_mtp(config: dict[str, Any]) -> dict[str, Any]:
    """`config` of a model whose multi-token-prediction layers were not loaded."""
    found = {k: 0 if k in MTP_COUNTS and _is_count(v) else v for k, v in config.items()}
    found |= {key: False for key in MTP_SWITCHES if isinstance(config.get(key), bool)}
    for key in NESTED_CONFIGS:
        if isinstance(config.get(key), dict):
            found[key] = without_mtp(config[key])
    return found


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _part(name: str, loaded: Mapping[str, int], decoder_layers: int) -> str | None:
    """The named part that tensor `name` belongs to, None if it may well have been loaded."""
    if name in loaded:
        return None
    for part, words in _TOWERS.items():
        for piece in name.split("."):
            if piece.startswith(words) and not _has_piece(loaded, piece):
                return f"{part} layers" if part.startswith("multi") else f"{part} parts"
    match = _LAYER.search(name)
    if match is not None and int(match.group(1)) >= decoder_layers:
        return "multi-token-prediction layers"
    return None


def _has_piece(loaded: Mapping[str, int], piece: str) -> bool:
    return any(piece in path.split(".") for path in loaded)


def _is_repacked(tensors: Iterable[TensorInfo]) -> bool:
    return any(info.dtype in _REPACKED for info in tensors)
