"""A table of facts about architectures that their modules do not show. A new one is a row.

Rows are keyed by the mlx-lm module that *defines the MoE block* (kimi_vl's blocks are defined in
deepseek_v3, qwen3_5's in qwen3_next), read from mlx-lm 0.32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Scoring = Literal["softmax", "topk-softmax", "sigmoid"]
"""How logits become scores: see BlockFacts."""

MixerKind = Literal["attention", "linear attention", "state space", "convolution", "recurrent"]
"""How a decoder layer mixes tokens."""


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

    score: Scoring
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
CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length",
                "seq_length", "max_seq_length")  # fmt: skip
"""Keys of config.json that give the longest context, in tokens."""
ROPE_CONFIGS = ("rope_scaling", "rope_parameters")
HEAD_NAMES = ("lm_head", "output", "output_projection", "embed_out")
EMBEDDING_NAMES = (
    "embed_tokens",
    "wte",
    "embeddings",
    "embedding",
    "token_embeddings",
    "tok_embeddings",
    "word_embeddings",
    "embed_in",
    "embed",
)

MLP_NAMES = ("mlp", "mlps", "feed_forward", "ffn", "mlp_block")
MIXER_NAMES = (
    "self_attn",
    "attn",
    "attention",
    "linear_attn",
    "mixer",
    "mamba",
    "conv",
    "temporal_block",
)
"""Children of a decoder layer that mix tokens: attention, or what stands in for it."""

MIXER_KINDS: tuple[tuple[MixerKind, tuple[str, ...]], ...] = (
    ("linear attention", ("linearattention", "gateddelta", "deltaattention", "kda", "rwkv")),
    ("state space", ("mamba", "falconh1mixer")),
    ("convolution", ("shortconv",)),
    ("recurrent", ("recurrentblock",)),
)
"""(kind, words in the lower-case name of the mixer's class), first match; others are attention."""

FusedLayout = Literal["one after the other", "by key-value head", "unknown"]
FUSED_LAYOUT: dict[str, FusedLayout] = {
    "gpt_neox": "by key-value head",
    "internlm2": "by key-value head",
    "afm7": "unknown",
}
"""How a fused projection lays queries, keys and values out, by the module that defines the
attention; all others one after the other."""

SOFTMAX_ATTENTION = ("gemma2", "olmo")
"""Families whose attention multiplies by hand: its one call of `mx.softmax` makes the weights."""
HEAD_COUNTS = ("n_heads", "num_heads", "num_attention_heads", "n_head")
"""Attributes of an attention module that hold how many heads it has."""

MIXER_ROLES: dict[str, tuple[str, ...]] = {
    "q": ("q_proj", "c_q", "attn_query", "wq", "q_b_proj"),
    "k": ("k_proj", "c_k", "attn_key", "wk"),
    "v": ("v_proj", "c_v", "attn_value", "wv"),
    "qkv": (
        "qkv_proj",
        "c_attn",
        "query_key_value",
        "wqkv",
        "Wqkv",
        "W_pack",
        "q_k_v_proj",
        "in_proj_qkv",
    ),
    "output": (
        "o_proj",
        "out_proj",
        "wo",
        "dense",
        "c_proj",
        "attn_resid",
        "linear_out",
        "o_b_proj",
        "linear",
    ),
    "q_norm": ("q_norm", "q_layernorm", "query_layernorm"),
    "k_norm": ("k_norm", "k_layernorm", "key_layernorm"),
    "conv": ("conv1d", "conv_1d", "conv"),
}
"""{role in a mixer: names of its module}. A fused projection is one module with one role."""

MLP_ROLES: tuple[dict[str, str], ...] = (
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
    {"gate_up": "gate_up_proj", "down": "down_proj"},
    {"up": "up_proj", "down": "down_proj"},
    {"gate": "w1", "up": "v1", "down": "w2"},
    {"gate": "w1", "up": "w3", "down": "w2"},
    {"gate": "w2", "up": "w1", "down": "c_proj"},
    {"gate": "c_fc_0", "up": "c_fc_1", "down": "c_proj"},
    {"gate": "mlp_gate", "up": "mlp_linear", "down": "mlp_resid"},
    {"up": "c_fc", "down": "c_proj"},
    {"up": "fc1", "down": "fc2"},
    {"up": "fc_in", "down": "fc_out"},
    {"up": "dense_h_to_4h", "down": "dense_4h_to_h"},
    {"up": "proj_1", "down": "proj_2"},
    {"up": "input_linear", "down": "output_linear"},
    {"up": "key", "down": "value"},
    {"down": "linear"},
)
"""{role: child} of a feed-forward part, the first of which all children exist. An `up` that puts
out twice what `down` takes holds the gate too and has the role `gate_up`."""

FIRST_NORMS = (
    "input_layernorm",
    "ln_1",
    "ln",
    "attention_norm",
    "attn_norm",
    "attention_layernorm",
    "operator_norm",
    "temporal_pre_norm",
    "pre_mixer_norm",
    "norm_1",
    "norm",
)
SECOND_NORMS = (
    "ln_2",
    "ffn_norm",
    "pre_ff_layernorm",
    "feedforward_layernorm",
    "channel_pre_norm",
    "pre_mlp_norm",
    "pre_mlp_layernorm",
    "pre_feedforward_layernorm",
    "norm_2",
)
FIRST_POST_NORMS = ("post_self_attn_layernorm", "post_mixer_norm")
SECOND_POST_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_mlp_norm")
AMBIGUOUS_NORM = "post_attention_layernorm"
"""Norms of a decoder layer: of what enters the mixer, of what enters the feed-forward part, of what
leaves either. The ambiguous one is of what enters the feed-forward part, except in a layer that has
another norm there, or `post_feedforward_layernorm`: then it is of what leaves the mixer."""

FINAL_NORMS = (
    "norm",
    "ln_f",
    "norm_f",
    "final_layernorm",
    "final_layer_norm",
    "final_norm",
    "output_norm",
    "embedding_norm",
    "ln",
)

FURTHER_OUTPUTS = ("per_layer_projection",)
"""Children of a decoder layer beside mixer and feed-forward part that write to the stream."""

LATENT_OUTPUTS = ("fc2_latent_proj", "routed_expert_up_proj")
LATENT_NORM = "routed_expert_norm"
"""Children of an MoE block whose experts work in a latent space: the way back to the stream, and
the norm ahead of it."""

OUTPUT_NORMS: dict[str, dict[str, tuple[str, ...]]] = {
    "gemma4_text": {
        "mlp": ("post_feedforward_layernorm_1", "post_feedforward_layernorm"),
        "experts": ("post_feedforward_layernorm_2", "post_feedforward_layernorm"),
        "per_layer_projection": ("post_per_layer_input_norm",),
    },
}
"""{module that defines the decoder layer: {child of the layer: norms its output passes}}, where they
are others than the layer's `post_norm1` behind mixers and `post_norm2` behind feed-forward parts."""

LEAKS: dict[str, str] = {
    "longcat_flash": "its identity experts add their own input to the residual stream, and no "
    "weights of theirs could be projected: a token routed to one keeps what it has",
    "rwkv7": "a norm ahead of its first layer writes the token embedding to the residual stream, and "
    "that is no projection of a layer: a token keeps what its embedding has",
    "talkie": "each layer adds the token embedding to the residual stream again, and that is no "
    "projection of the layer: a token keeps what its embedding has",
}
"""Families that write to the stream in a way that is in no projection, and how."""

NO_PROJECTIONS: dict[str, str] = {
    "gemma3n": "it runs several residual streams that its layers mix (AltUp), and no projections "
    "of a layer could take a direction out of them",
}
"""Families whose stream no edit of projections can change as intended, and why."""

STREAMS: dict[str, int] = {"gemma3n": 0, "deepseek_v41": 2}
"""{module that defines the decoder layer: which axis of what it takes and puts out counts the
residual streams}, for models that run several; all others have one stream [B, T, D]."""
