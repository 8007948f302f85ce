"""Autoencoders as SAELens keeps them: a directory of cfg.json and sae_weights.safetensors.

    W_enc [D, F], b_enc [F], W_dec [F, D], b_dec [D], threshold [F] of jumprelu

cfg.json names the architecture and sizes, and in `metadata` the value: its hook's name where
TransformerLens has one (blocks.3.hook_resid_post is our layers.3.residual), else our own. Read are
the layout of SAELens 6 and those before it, whose keys stood at the top and had other names.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from safetensors.numpy import save as to_safetensors

from mlxfun.checkpoint.headers import read_header
from mlxfun.errors import DatasetError, ModelError, UsageError
from mlxfun.files import read_text, write_text, writing
from mlxfun.tracing.sae.autoencoder import Autoencoder
from mlxfun.tracing.sae.sources import vector_width
from mlxfun.tracing.tracer import Tracer

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
LAYOUT = "6.0.0"
"""The version of SAELens whose layout is written."""
HOOKS = {
    "input": "hook_resid_pre",
    "residual": "hook_resid_post",
    "attn.output": "hook_attn_out",
    "mlp.output": "hook_mlp_out",
}
"""{our value of a layer: TransformerLens' hook of a block}."""
OLDER = {"hook_point": "hook_name", "hook_point_layer": "hook_layer",
         "activation_fn_str": "activation_fn"}  # fmt: skip


def hook_name(at: str) -> str:
    """TransformerLens' name of a value of ours, else our own."""
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)", at)
    if layer is not None and layer[2] in HOOKS:
        return f"blocks.{layer[1]}.{HOOKS[layer[2]]}"
    return "hook_embed" if at == "embed" else at


def our_name(hook: str) -> str:
    """Our name of a value that TransformerLens names, else the name as it is."""
    block = re.fullmatch(r"blocks\.(\d+)\.(\w+)", hook)
    ours = {theirs: name for name, theirs in HOOKS.items()}
    if block is not None and block[2] in ours:
        return f"layers.{block[1]}.{ours[block[2]]}"
    return "embed" if hook == "hook_embed" else hook


def save_sae(sae: Autoencoder, directory: Path | str) -> None:
    """Write both files, weights first, each in place of the one before. Raises SaveError."""
    directory = Path(directory)
    arrays = {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}
    if sae.threshold is not None:
        arrays["threshold"] = sae.threshold
    layer = re.match(r"layers\.(\d+)\.", sae.at)
    about = {f"mlxfun_{key}": value for key, value in sae.about.items()}
    metadata: dict[str, Any] = {
        "sae_lens_version": LAYOUT, "hook_name": hook_name(sae.at), "hook_head_index": None,
        "hook_layer": None if layer is None else int(layer[1]), "mlxfun_at": sae.at,
        "mlxfun_skip": sae.skip, **about,
    }  # fmt: skip
    config: dict[str, Any] = {
        "d_in": sae.width, "d_sae": sae.features, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": sae.centred, "normalize_activations": "none",
        "reshape_activations": "none", "metadata": metadata, "architecture": sae.kind,
    }  # fmt: skip
    if sae.k is not None:
        config |= {"k": sae.k, "rescale_acts_by_decoder_norm": False}
    with writing(directory / WEIGHTS) as file:
        contiguous = {name: np.ascontiguousarray(np.array(a)) for name, a in arrays.items()}
        file.write(to_safetensors(contiguous))
    write_text(directory / CONFIG, json.dumps(config, indent=2) + "\n")


def load_sae(directory: Path | str, at: str | None = None) -> Autoencoder:
    """Read an autoencoder of either layout. at: the value it is of, where the files do not say.

    Architectures are topk, jumprelu (batchtopk is kept as one), and standard, which is jumprelu with
    thresholds of 0. Raises DatasetError for a directory without one, or one that cannot be carried
    out exactly, ModelError for corrupt weights.
    """
    directory = Path(directory)
    config = _config(directory)
    read_header(directory / WEIGHTS)
    arrays = mx.load(str(directory / WEIGHTS))
    assert isinstance(arrays, dict)
    found = {name: array.astype(mx.float32) for name, array in arrays.items()}
    kind = _kind(config, directory)
    if "log_threshold" in found:
        found["threshold"] = mx.exp(found.pop("log_threshold"))
    if kind == "standard":
        found["threshold"] = mx.zeros_like(_part(found, "b_enc", directory))
    if config.get("rescale_acts_by_decoder_norm"):
        found = _unit_rows(found)
    metadata: Mapping[str, Any] = config.get("metadata") or {}
    name = (
        at
        or metadata.get("mlxfun_at")
        or our_name(str(metadata.get("hook_name") or config.get("hook_name") or ""))
    )
    if not name:
        raise UsageError(f"{directory} does not say which value it is of; name it")
    about = {str(k).removeprefix("mlxfun_"): str(v) for k, v in metadata.items()
             if k.startswith("mlxfun_") and k not in ("mlxfun_at", "mlxfun_skip")}  # fmt: skip
    parts = {part: _part(found, part, directory) for part in ("W_enc", "b_enc", "W_dec", "b_dec")}
    if kind != "topk":
        parts["threshold"] = _part(found, "threshold", directory)
    mx.eval(parts)
    _require_shapes(parts, directory)
    return Autoencoder(
        **parts, at=name, k=_k(config, directory) if kind == "topk" else None,
        centred=bool(config.get("apply_b_dec_to_input", True)),
        skip=int(metadata.get("mlxfun_skip", 0)), about=about,
    )  # fmt: skip


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_text(directory / CONFIG))
    except (OSError, ValueError) as error:
        raise DatasetError(
            f"{directory} holds no autoencoder: {CONFIG} cannot be read ({error}); name a directory "
            f"of sae train or of SAELens, with {CONFIG} and {WEIGHTS}"
        ) from None
    if not isinstance(config, dict):
        raise DatasetError(f"{directory / CONFIG} holds no configuration of an autoencoder")
    return {OLDER.get(str(key), str(key)): value for key, value in config.items()}


def _kind(config: Mapping[str, Any], directory: Path) -> str:
    """topk, jumprelu or standard. Raises DatasetError for what is not computed here."""
    kind = config.get("architecture", "standard")
    if kind == "standard" and config.get("activation_fn") in ("topk", "top_k"):
        kind = "topk"
    if kind not in ("topk", "jumprelu", "standard"):
        raise DatasetError(
            f"{directory} is of architecture {kind!r}; topk, jumprelu and standard can be read"
        )
    for key, plain in (("normalize_activations", ("none", False, None)),
                       ("reshape_activations", ("none", None)),
                       ("finetuning_scaling_factor", (False, None))):  # fmt: skip
        if config.get(key) not in plain:
            raise DatasetError(
                f"{directory} has {key} {config[key]!r}, which is not computed here; fold it into "
                "the weights with SAELens, and save it again"
            )
    return str(kind)


def _k(config: Mapping[str, Any], directory: Path) -> int:
    k = config.get("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    if not isinstance(k, int) or k < 1:
        raise DatasetError(f"{directory / CONFIG} names k {k!r}, which is no number of features")
    return k


def _part(found: Mapping[str, mx.array], name: str, directory: Path) -> mx.array:
    if name not in found:
        raise ModelError(f"{directory / WEIGHTS} has no {name}; it has {', '.join(sorted(found))}")
    return found[name]


def _unit_rows(found: dict[str, mx.array]) -> dict[str, mx.array]:
    """The same function with rows of W_dec of unit norm: what top-k compares is z times the norm."""
    norm = mx.linalg.norm(found["W_dec"], axis=-1)
    return found | {
        "W_enc": found["W_enc"] * norm, "b_enc": found["b_enc"] * norm,
        "W_dec": found["W_dec"] / mx.maximum(norm, 1e-30)[:, None],
    }  # fmt: skip


def _require_shapes(parts: Mapping[str, mx.array], directory: Path) -> None:
    if parts["W_enc"].ndim != 2:
        raise ModelError(f"{directory / WEIGHTS}: W_enc is {list(parts['W_enc'].shape)}")
    width, count = parts["W_enc"].shape
    wanted = {"b_enc": (count,), "W_dec": (count, width), "b_dec": (width,), "threshold": (count,)}
    for name, shape in wanted.items():
        if name in parts and parts[name].shape != shape:
            raise ModelError(
                f"{directory / WEIGHTS}: {name} is {list(parts[name].shape)} where W_enc "
                f"{[width, count]} asks for {list(shape)}"
            )


def require_fitting_sae(sae: Autoencoder, model: Tracer, where: str) -> None:
    """Raise UsageError for an autoencoder of another width, or of a value that the model has not."""
    width = vector_width(model, model.parts.names.point(sae.at))
    if width != sae.width:
        raise UsageError(
            f"{where} is an autoencoder of {sae.width} values; {sae.at} of "
            f"{model.parts.map.model_type} has {width}"
        )
