"""Detects what stock mlx-lm loading drops of a checkpoint, such as vision towers, or cannot unpack.

mlx-lm's `sanitize` renames, stacks, transposes and drops tensors, so names alone decide nothing.
Parts are recognised by their names (towers for other modalities, multi-token-prediction layers)
and by decoder layers past the last loaded one; what remains is found by counting elements, and
only said when the dtypes show that nothing was repacked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlxfun.checkpoint.headers import Header, TensorInfo
from mlxfun.files import read_text
from mlxfun.model.anatomy.facts import NESTED_CONFIGS
from mlxfun.text import cut, readable_bytes

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


# --- quantisations by tools that are not MLX ----------------------------------------------------

MODELOPT = "hf_quant_config.json"
"""Where NVIDIA's ModelOpt puts its settings, beside config.json or in its place."""


def packed_elsewhere(path: Path, config: dict[str, Any]) -> str:
    """The quantisation that a model directory declares and mlx-lm does not unpack, and what to do
    about it; "" where none is declared, or MLX's own."""
    if "quantization" in config:
        return ""
    file, settings = _declared(path, config)
    if settings is None:
        return f"{file} is no JSON object: restore it, or remove it if the model came without it"
    name = _name(settings)
    if not name:
        return ""
    return (
        f"{file} declares {name} quantisation, which mlx-lm does not read for "
        f"{config['model_type']}: take a version of the model in bfloat16, or one that was "
        "converted for MLX"
    )


def _declared(path: Path, config: dict[str, Any]) -> tuple[str, dict[str, Any] | None]:
    """(file, its settings or None for none that can be read), where stock loading looks for them."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        settings = part.get("quantization_config")
        if isinstance(settings, dict) and settings:
            return "config.json", settings
    try:
        settings = json.loads(read_text(path / MODELOPT))
    except FileNotFoundError:
        return MODELOPT, {}
    except (OSError, ValueError, RecursionError):
        return MODELOPT, None
    return MODELOPT, settings if isinstance(settings, dict) else None


def _name(settings: dict[str, Any]) -> str:
    """Tool and format in words, as "fp8" or "NVIDIA ModelOpt NVFP4"; "" for none."""
    inner = settings.get("quantization")
    inner = inner if isinstance(inner, dict) else settings
    method, algorithm = settings.get("quant_method"), inner.get("quant_algo")
    if method == "modelopt" or (method is None and algorithm is not None):
        return " ".join(
            ("NVIDIA ModelOpt", *([] if algorithm is None else [cut(str(algorithm), 40)]))
        )
    return "" if method is None else cut(str(method), 40)
