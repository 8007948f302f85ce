"""Looking inside a model: traces, interventions, patching, lenses, attention, on its experts too.

    from mlxfun.tracing import activation_patching, get_activations, logit_lens, zero_out

The names below are imported, and MLX with them, when they are first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "activations": ("batch_get_activations", "get_activations", "run_prompts"),
    "interventions": ("add_vector", "clamp", "compose", "drop_expert", "force_route", "noise",
                      "replace_with", "scale", "scale_expert", "zero_out"),
    "lenses.direct": ("direct_logit_attribution",),
    "lenses.logit_lens": ("Lens", "logit_lens"),
    "lenses.patterns": ("attention_patterns", "find_heads", "residual_norms"),
    "lenses.probe": ("train_probe",),
    "patching.activation": ("activation_patching",),
    "patching.attribution": ("attribution_patching",),
    "patching.path": ("path_patching",),
    "patching.study": ("Patching",),
    "sae.autoencoder": ("Autoencoder",),
    "sae.features": ("clamp_feature", "feature_activity", "steer_feature"),
    "sae.files": ("load_sae", "save_sae"),
    "sae.judging": ("splice",),
    "sae.sources": ("FileSource", "ModelSource"),
    "sae.training": ("train_sae",),
    "vectors.vectors": ("load_vectors", "make_vectors", "save_vectors"),
}  # fmt: skip
_LAZY = {name: home for home, names in _HOMES.items() for name in names}
__all__ = sorted(_LAZY)  # noqa: PLE0605 - the names of the table


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"mlxfun.tracing.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'mlxfun.tracing' has no attribute {name!r}")
