"""A table of facts about architectures that their modules do not show. A new one is a row.

Rows are keyed by the mlx-lm module that *defines the MoE block* (kimi_vl's blocks are defined in
deepseek_v3, qwen3_5's in qwen3_next), read from mlx-lm 0.32.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockFacts:
    """How a block turns logits into weights.

    score: "softmax" (over all experts, then top-k), "topk-softmax" (top-k on logits, then softmax),
        "sigmoid" (elementwise; any selection bias does not enter the weights).
    grouped: the router restricts selection to topk_group of n_group groups.
    group_fill: what losing groups' scores are filled with.
    renormalised: surviving weights keep their sum when experts are removed.
    weights_inside: the weight multiplies the expert's *input* (llama4), so an expert's output
        already contains it.
    weights_from_router: the weighted sum happens in a compiled function where the product cannot
        be seen; the router's own return value holds the weights.
    post_scale: something multiplies the weighted sum after it was formed; the captured weights
        are exact up to it.
    """

    score: str
    grouped: bool = False
    group_fill: float = 0.0
    renormalised: bool = True
    weights_inside: bool = False
    weights_from_router: bool = False
    post_scale: str | None = None


_SOFTMAX = BlockFacts("softmax")
_SOFTMAX_PLAIN = BlockFacts("softmax", renormalised=False)
_TOPK_SOFTMAX = BlockFacts("topk-softmax")
_SIGMOID = BlockFacts("sigmoid")
_GROUPED = BlockFacts("sigmoid", grouped=True)
_GROUPED_INF = BlockFacts("sigmoid", grouped=True, group_fill=float("-inf"))

BLOCKS: dict[str, BlockFacts] = {
    "qwen3_moe": _SOFTMAX,
    "qwen3_next": _SOFTMAX,
    "qwen2_moe": _SOFTMAX_PLAIN,
    "mellum": _SOFTMAX,
    "olmoe": _SOFTMAX_PLAIN,
    "ernie4_5_moe": _SOFTMAX,
    "hunyuan": _SOFTMAX_PLAIN,
    "dbrx": _SOFTMAX,
    "mistral4": BlockFacts("softmax", grouped=True),
    "deepseek": _SOFTMAX_PLAIN,
    "deepseek_v2": BlockFacts("softmax", grouped=True, renormalised=False),
    "longcat_flash": _SOFTMAX_PLAIN,
    "longcat_flash_ngram": _SOFTMAX_PLAIN,
    "mixtral": _TOPK_SOFTMAX,
    "phimoe": _TOPK_SOFTMAX,
    "phixtral": _TOPK_SOFTMAX,
    "gpt_oss": _TOPK_SOFTMAX,
    "granitemoe": _TOPK_SOFTMAX,
    "granitemoehybrid": _TOPK_SOFTMAX,
    "jamba": _TOPK_SOFTMAX,
    "gemma4_text": _TOPK_SOFTMAX,
    "minimax": _SIGMOID,
    "minimax_m3_vl": _SIGMOID,
    "lfm2_moe": _SIGMOID,
    "Klear": BlockFacts("sigmoid", post_scale="coefficient(x)[0]"),
    "step3p5": _SIGMOID,
    "laguna": BlockFacts("sigmoid", post_scale="routed_scaling_factor"),
    "deepseek_v41": _SIGMOID,
    "deepseek_v3": _GROUPED,
    "deepseek_v32": _GROUPED,
    "glm4_moe": _GROUPED,
    "glm4_moe_lite": _GROUPED,
    "dots1": _GROUPED,
    "mimo_v2_flash": _GROUPED,
    "exaone_moe": _GROUPED,
    "nemotron_h": BlockFacts("sigmoid", grouped=True, post_scale="fc2_latent_proj"),
    "bailing_moe": BlockFacts("sigmoid", grouped=True, weights_from_router=True),
    "bailing_moe_linear": _GROUPED,
    "bailing_hybrid": _GROUPED_INF,
    "bailing_moe_v3": _GROUPED_INF,
    "afmoe": _GROUPED,
    "kimi_linear": _GROUPED,
    "kimi_k3": BlockFacts("sigmoid", grouped=True, post_scale="latent projection"),
    "llama4": BlockFacts("sigmoid", weights_inside=True),
}
"""Block facts by defining module. Unknown modules are treated as plain softmax routers."""

UNKNOWN = _SOFTMAX

UNSUPPORTED: dict[str, str] = {
    "muse_spark": "its MoE blocks run in Metal-only kernels that never call the router module",
}
"""Architectures with MoE layers that cannot be observed or pruned, and why."""

ROUTER_NAMES = ("gate", "router")
SELECTION_BIASES = ("e_score_correction_bias", "expert_bias", "router_bias")
SHARED_NAMES = ("shared_experts", "shared_expert", "shared_mlp", "share_expert")
TOP_K_ATTRIBUTES = ("top_k", "num_experts_per_tok", "num_experts_per_token", "moe_topk", "k")
TOP_K_KEYS = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "top_k_experts",
    "moe_topk",
    "moe_k",
    "moe_top_k",
)
EXPERT_COUNT_KEYS = (
    "num_experts",
    "n_routed_experts",
    "num_local_experts",
    "moe_num_experts",
)
GROUP_COUNT_KEYS = ("n_group", "num_expert_group")
GROUP_TOP_KEYS = ("topk_group",)
NESTED_CONFIGS = ("text_config", "ffn_config", "language_config", "llm_config")
HEAD_NAMES = ("lm_head", "output", "output_projection")
EMBEDDING_NAMES = (
    "embed_tokens",
    "wte",
    "embeddings",
    "embedding",
    "token_embeddings",
    "word_embeddings",
)
