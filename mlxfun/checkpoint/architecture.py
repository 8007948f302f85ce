"""Checks config.json before a model is built from it, and the types of what was loaded.

mlx-lm takes the numbers of a config as they are: a million layers are built one by one, zero sizes
fail somewhere inside, more chosen experts than there are run and compute something else. Only keys
that are listed here are judged, whatever the architecture; a key that is missing or null is the
architecture's own affair.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _get_classes

from mlxfun.errors import ModelError
from mlxfun.model.parameters import flatten

_QUOTED = 200


@dataclass(frozen=True, slots=True)
class _Range:
    """Numbers from least to most; above: least itself is none of them. whole: integers only."""

    least: float
    most: float
    whole: bool = True
    above: bool = False

    def __contains__(self, value: object) -> bool:
        kinds = int if self.whole else (int, float)
        if isinstance(value, bool) or not isinstance(value, kinds):
            return False
        inside = self.least < value if self.above else self.least <= value
        return bool(inside and value <= self.most)

    def __str__(self) -> str:
        kind = "whole number" if self.whole else "number"
        start = f"above {self.least:g}" if self.above else f"from {self.least:,.0f}"
        return f"a {kind} {start} to {self.most:,.15g}"


_LAYERS = _Range(1, 2048)
_SIZE = _Range(1, 1 << 24)
_SIZE_OR_NONE = _Range(0, 1 << 24)
_EXPERTS = _Range(0, 1 << 16)
_POSITIONS = _Range(1, 1 << 27)
_EPSILON = _Range(0, 1, whole=False)
_BASE = _Range(0, 1e18, whole=False, above=True)
_SHARE = _Range(0, 1, whole=False, above=True)
_POSITIVE = _Range(0, 1e9, whole=False, above=True)
_FACTOR = _Range(-1e9, 1e9, whole=False)

_LAYER_KEYS = (
    "num_hidden_layers", "num_layers", "n_layer", "n_layers", "num_transformer_layers",
)  # fmt: skip
_EXPERT_KEYS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts",
)  # fmt: skip
_CHOSEN_KEYS = (
    "num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts",
    "moe_k",
)  # fmt: skip
_NUMBERS: dict[str, _Range] = {
    **dict.fromkeys(_LAYER_KEYS, _LAYERS),
    **dict.fromkeys(_EXPERT_KEYS, _EXPERTS),
    **dict.fromkeys(_CHOSEN_KEYS, _EXPERTS),
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "model_dim", "vocab_size", "num_vocab",
         "num_attention_heads", "n_head", "n_heads", "num_key_value_heads", "num_kv_heads",
         "n_kv_heads", "kv_n_heads", "head_dim", "v_head_dim", "kv_channels", "conv_kernel"),
        _SIZE,
    ),
    **dict.fromkeys(
        ("intermediate_size", "moe_intermediate_size", "ffn_hidden_size", "n_inner",
         "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim",
         "qk_nope_head_dim", "n_group", "topk_group", "n_shared_experts", "num_shared_experts",
         "first_k_dense_replace", "sliding_window", "state_size"),
        _SIZE_OR_NONE,
    ),
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "original_max_position_embeddings"), _POSITIONS
    ),
    **dict.fromkeys(
        ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps",
         "norm_epsilon"),
        _EPSILON,
    ),
    **dict.fromkeys(
        ("rope_theta", "rope_local_base_freq", "swa_rope_theta", "rotary_emb_base",
         "rope_embedding_base"),
        _BASE,
    ),
    "layer_rope_theta": _Range(0, 1e18, whole=False),  # 0 for a layer without rotary embeddings
    **dict.fromkeys(("partial_rotary_factor", "rotary_pct"), _SHARE),
    "routed_scaling_factor": _FACTOR,
}  # fmt: skip
_ROPE: dict[str, _Range] = {
    **dict.fromkeys(
        ("factor", "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "short_factor",
         "long_factor"),
        _POSITIVE,
    ),
    **dict.fromkeys(("mscale", "mscale_all_dim", "attention_factor"), _FACTOR),
    "mrope_section": _SIZE_OR_NONE,
}  # fmt: skip
_SWITCHES = (
    "tie_word_embeddings", "norm_topk_prob", "attention_bias", "mlp_bias", "use_qk_norm", "use_bias",
)  # fmt: skip
_TEXTS = ("hidden_act", "scoring_func", "topk_method", "rope_type", "type")
_PARTS = ("text_config", "language_config", "llm_config", "ffn_config", "attn_config")
_ROPE_PARTS = ("rope_scaling", "rope_parameters")
_BITS, _GROUPS = (2, 3, 4, 5, 6, 8), (16, 32, 64, 128)


def require_sound(config: Mapping[str, Any], file: Path, tensors: int) -> None:
    """Raise ModelError, naming file, field and value, for a config that no model can have.

    tensors: how many the checkpoint has; a layer has at least one of its own.
    """
    _Check(file, tensors).part(config, "")


def require_names(config: Mapping[str, Any], file: Path) -> None:
    """The same for `architectures`, which mlx-lm looks up together with the model's type."""
    value = config.get("architectures")
    names = value if isinstance(value, list) else [value]
    if value is not None and not all(isinstance(one, str) for one in names):
        raise _Check(file, 0).wrong("architectures", value, "a list of names")


@dataclass(frozen=True, slots=True)
class _Check:
    file: Path
    tensors: int

    def wrong(self, name: str, value: Any, needed: str) -> ModelError:
        shown = repr(value) if not _huge(value) else "a number of hundreds of digits"
        shown = shown if len(shown) <= _QUOTED else f"{shown[:_QUOTED]}..."
        return ModelError(
            f"{self.file}: {name} is {shown} and must be {needed}; restore the file from the "
            "model's source"
        )

    def part(self, config: Mapping[str, Any], inside: str) -> None:
        """A table of the config; inside: its name with a dot."""
        self.numbers(config, inside, _NUMBERS)
        for key, value in config.items():
            if value is not None:
                self.setting(key, value, inside)
        for key in _LAYER_KEYS:
            value = config.get(key)
            if isinstance(value, int) and value > self.tensors:
                needed = f"at most {self.tensors:,}, since there are so many tensors in all"
                raise self.wrong(inside + key, value, needed)
        self.experts(config, inside)
        self.heads(config, inside)
        if not inside:
            self.quantization(config.get("quantization"), "quantization")

    def setting(self, key: str, value: Any, inside: str) -> None:
        """A value that is no number."""
        name = inside + key
        if key in _SWITCHES and not (isinstance(value, bool) or value in (0, 1)):
            raise self.wrong(name, value, "true or false")
        if key in _TEXTS and not isinstance(value, str):
            raise self.wrong(name, value, "a text")
        if key in _PARTS + _ROPE_PARTS and not isinstance(value, dict):
            raise self.wrong(name, value, "a table")
        if key in _PARTS:
            self.part(value, f"{name}.")
        elif key in _ROPE_PARTS:
            self.rope(value, f"{name}.")

    def numbers(self, config: Mapping[str, Any], inside: str, known: Mapping[str, _Range]) -> None:
        for key in known.keys() & config.keys():
            value, wanted = config[key], known[key]
            # Some architectures have one number a layer.
            each = value if isinstance(value, list) and value else [value]
            wrong = next((one for one in each if one is not None and one not in wanted), None)
            if wrong is not None or value == []:
                raise self.wrong(inside + key, value if value == [] else wrong, str(wanted))

    def rope(self, settings: Mapping[str, Any], inside: str) -> None:
        """Rotary embeddings: one table of settings, or one for each kind of layer."""
        self.numbers(settings, inside, {**_NUMBERS, **_ROPE})
        for key, value in settings.items():
            if isinstance(value, dict):
                self.rope(value, f"{inside}{key}.")
            elif key in _TEXTS and value is not None and not isinstance(value, str):
                raise self.wrong(inside + key, value, "a text")
        low, high = settings.get("low_freq_factor"), settings.get("high_freq_factor")
        numbers = isinstance(low, int | float) and isinstance(high, int | float)
        if numbers and cast(float, low) >= cast(float, high):
            raise self.wrong(f"{inside}high_freq_factor", high, f"above low_freq_factor, {low}")

    def experts(self, config: Mapping[str, Any], inside: str) -> None:
        known = [config[key] for key in _EXPERT_KEYS if isinstance(config.get(key), int)]
        experts = max(known, default=0)
        if not experts:
            return
        for key in _CHOSEN_KEYS:
            value = config.get(key)
            for chosen in value if isinstance(value, list) else [value]:
                if chosen is not None and not 1 <= chosen <= experts:
                    needed = f"from 1 to the number of experts, {experts}"
                    raise self.wrong(inside + key, chosen, needed)
        groups, opened = (config.get(key) or 1 for key in ("n_group", "topk_group"))
        if not isinstance(groups, int) or not isinstance(opened, int):
            return
        if experts % groups:
            raise self.wrong(f"{inside}n_group", groups, f"a divisor of the {experts} experts")
        if opened > groups:
            raise self.wrong(f"{inside}topk_group", opened, f"at most n_group, {groups}")

    def heads(self, config: Mapping[str, Any], inside: str) -> None:
        heads, shared = config.get("num_attention_heads"), config.get("num_key_value_heads")
        if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
            needed = f"a divisor of num_attention_heads, {heads}"
            raise self.wrong(f"{inside}num_key_value_heads", shared, needed)

    def quantization(self, settings: Any, name: str) -> None:
        """The settings as mlx-lm writes them, with those of single modules among them."""
        if settings is None:
            return
        if not isinstance(settings, dict):
            raise self.wrong(name, settings, "a table")
        for key, allowed in (("bits", _BITS), ("group_size", _GROUPS)):
            value = settings.get(key)
            if value is not None and (type(value) is not int or value not in allowed):
                needed = f"one of {', '.join(map(str, allowed))}"
                raise self.wrong(f"{name}.{key}", value, needed)
        for key, value in settings.items():
            if isinstance(value, dict):
                self.quantization(value, f"{name}.{key}")


def _huge(value: Any) -> bool:
    """Whether Python refuses to write the number out."""
    return isinstance(value, int) and abs(value) >= 1 << 1000


# --- what was loaded -------------------------------------------------------------------------


def require_dtypes(model: nn.Module, config: dict[str, Any]) -> None:
    """Raise ModelError for a parameter of another kind of type than the architecture gives it.

    A float in place of an integer, or the reverse, of the same size passes every check of shapes.
    """
    model_class, arguments = _get_classes(config)
    plain = model_class(arguments.from_dict(copy.deepcopy(config)))
    expected = {path: _kind(array.dtype) for path, array in flatten(plain.parameters())}
    modules = dict(model.named_modules())
    for path, array in flatten(model.parameters()):
        parent, _, leaf = path.rpartition(".")
        module, kind = modules.get(parent), _kind(array.dtype)
        if module is not None and "scales" in module and hasattr(module, "bits"):
            wanted = _quantised(module, leaf)
        else:
            wanted = expected.get(path, kind)
        if kind != wanted:
            raise ModelError(
                f"{path} is {str(array.dtype).removeprefix('mlx.core.')} where the architecture has "
                f"{wanted} values; download or copy the weights again"
            )


def _quantised(module: nn.Module, leaf: str) -> str:
    if leaf == "weight":
        return "integer"
    affine = getattr(module, "mode", "affine") == "affine"
    return "integer" if leaf == "scales" and not affine else "float"


def _kind(dtype: mx.Dtype) -> str:
    return "float" if mx.issubdtype(dtype, mx.floating) else "integer"
