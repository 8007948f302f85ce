"""What a map of each architecture must find, written by hand from mlx_lm/models."""

from __future__ import annotations

from mlxfun.model.anatomy import Head

LLAMA = {
    "attn": "self_attn",
    "attn.q": "self_attn.q_proj",
    "attn.k": "self_attn.k_proj",
    "attn.v": "self_attn.v_proj",
    "attn.output": "self_attn.o_proj",
    "mlp": "mlp",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}
QK_NORMS = {"attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm"}
SANDWICH = {
    "norm2": "pre_feedforward_layernorm",
    "post_norm1": "post_attention_layernorm",
    "post_norm2": "post_feedforward_layernorm",
}
EXPERTS = {
    "experts": "mlp.switch_mlp",
    "experts.gate": "mlp.switch_mlp.gate_proj",
    "experts.up": "mlp.switch_mlp.up_proj",
    "experts.down": "mlp.switch_mlp.down_proj",
    "router": "mlp.gate",
}
ATTENTION = {key: value for key, value in LLAMA.items() if not key.startswith("mlp.")}

# (family, layer) -> its parts, written by hand from mlx_lm/models.
PARTS = {
    ("llama", 2): LLAMA,
    ("mistral", 0): LLAMA,
    ("qwen2", 1): LLAMA,
    ("qwen3", 1): LLAMA | QK_NORMS,
    ("gemma", 0): LLAMA,
    ("gemma2", 0): LLAMA | SANDWICH,
    ("gemma3_text", 3): LLAMA | QK_NORMS | SANDWICH,
    ("olmo2", 0): {
        key: value
        for key, value in (LLAMA | QK_NORMS | SANDWICH).items()
        if key not in ("norm1", "norm2")
    },
    ("phi3", 0): {
        "attn": "self_attn",
        "attn.qkv": "self_attn.qkv_proj",
        "attn.output": "self_attn.o_proj",
        "mlp": "mlp",
        "mlp.gate_up": "mlp.gate_up_proj",
        "mlp.down": "mlp.down_proj",
        "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm",
    },
    ("gpt2", 1): {
        "attn": "attn",
        "attn.qkv": "attn.c_attn",
        "attn.output": "attn.c_proj",
        "mlp": "mlp",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
        "norm1": "ln_1",
        "norm2": "ln_2",
    },
    ("internlm2", 0): {
        "attn": "attention",
        "attn.qkv": "attention.wqkv",
        "attn.output": "attention.wo",
        "mlp": "feed_forward",
        "mlp.gate": "feed_forward.w1",
        "mlp.up": "feed_forward.w3",
        "mlp.down": "feed_forward.w2",
        "norm1": "attention_norm",
        "norm2": "ffn_norm",
    },
    ("exaone", 0): {
        "attn": "attn",
        "attn.q": "attn.attention.q_proj",
        "attn.k": "attn.attention.k_proj",
        "attn.v": "attn.attention.v_proj",
        "attn.output": "attn.attention.out_proj",
        "mlp": "mlp",
        "mlp.gate": "mlp.c_fc_0",
        "mlp.up": "mlp.c_fc_1",
        "mlp.down": "mlp.c_proj",
        "norm1": "ln_1",
        "norm2": "ln_2",
    },
    ("phi", 0): {
        "attn": "self_attn",
        "attn.q": "self_attn.q_proj",
        "attn.k": "self_attn.k_proj",
        "attn.v": "self_attn.v_proj",
        "attn.output": "self_attn.dense",
        "mlp": "mlp",
        "mlp.up": "mlp.fc1",
        "mlp.down": "mlp.fc2",
        "norm1": "input_layernorm",
    },
    ("mamba", 0): {
        "attn": "mixer",
        "attn.output": "mixer.out_proj",
        "attn.conv": "mixer.conv1d",
        "norm1": "norm",
    },
    ("falcon_h1", 0): {
        **{key: value for key, value in LLAMA.items() if key.startswith("attn")},
        "attn_2": "mamba",
        "attn_2.output": "mamba.out_proj",
        "attn_2.conv": "mamba.conv1d",
        "mlp": "feed_forward",
        "mlp.gate": "feed_forward.gate_proj",
        "mlp.up": "feed_forward.up_proj",
        "mlp.down": "feed_forward.down_proj",
        "norm1": "input_layernorm",
        "norm2": "pre_ff_layernorm",
    },
    ("glm4", 0): {
        **{key: value for key, value in LLAMA.items() if key not in ("mlp.gate", "mlp.up")},
        "mlp.gate_up": "mlp.gate_up_proj",
        "post_norm1": "post_self_attn_layernorm",
        "post_norm2": "post_mlp_layernorm",
    },
    ("olmo_hybrid", 0): {
        "attn": "linear_attn",
        "attn.q": "linear_attn.q_proj",
        "attn.k": "linear_attn.k_proj",
        "attn.v": "linear_attn.v_proj",
        "attn.output": "linear_attn.o_proj",
        **{k: v for k, v in LLAMA.items() if not k.startswith("attn")},
    },
    ("nemotron-nas", 2): {
        "attn": "self_attn",
        "attn.output": "self_attn.linear",
        "mlp": "mlp",
        "mlp.down": "mlp.linear",
        "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm",
    },
    ("qwen3_moe", 1): ATTENTION | QK_NORMS | EXPERTS,
    ("qwen2_moe", 0): ATTENTION
    | EXPERTS
    | {
        "shared": "mlp.shared_expert",
        "shared.gate": "mlp.shared_expert.gate_proj",
        "shared.up": "mlp.shared_expert.up_proj",
        "shared.down": "mlp.shared_expert.down_proj",
    },
    ("gemma4_text", 0): LLAMA
    | QK_NORMS
    | SANDWICH
    | {
        "router": "router",
        "experts": "experts.switch_glu",
        "experts.gate": "experts.switch_glu.gate_proj",
        "experts.up": "experts.switch_glu.up_proj",
        "experts.down": "experts.switch_glu.down_proj",
    },
    ("granitemoehybrid", 0): {
        "attn": "mamba",
        "attn.output": "mamba.out_proj",
        "attn.conv": "mamba.conv1d",
        "mlp": "block_sparse_moe",
        "router": "block_sparse_moe.router",
        "experts": "block_sparse_moe.switch_mlp",
        "experts.gate": "block_sparse_moe.switch_mlp.gate_proj",
        "experts.up": "block_sparse_moe.switch_mlp.up_proj",
        "experts.down": "block_sparse_moe.switch_mlp.down_proj",
        "shared": "shared_mlp",
        "shared.gate_up": "shared_mlp.input_linear",
        "shared.down": "shared_mlp.output_linear",
        "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm",
    },
    ("deepseek_v32", 0): {
        "attn": "self_attn",
        "attn.q": "self_attn.q_b_proj",
        "attn.output": "self_attn.o_proj",
        **{k: v for k, v in LLAMA.items() if not k.startswith("attn")},
    },
}

# embed, final norm, head, decoder layers.
ENDS = {
    "llama": ("model.embed_tokens", "model.norm", Head("lm_head", False), 3),
    "qwen3": ("model.embed_tokens", "model.norm", Head("model.embed_tokens", True), 3),
    "gemma3_text": ("model.embed_tokens", "model.norm", Head("lm_head", False), 4),
    "gpt2": ("model.wte", "model.ln_f", Head("model.wte", True), 3),
    "gpt_neox": (
        "model.embed_in", "model.final_layer_norm", Head("model.embed_out", False), 3,
    ),
    "internlm2": ("model.tok_embeddings", "model.norm", Head("output", False), 3),
    "mamba": ("backbone.embeddings", "backbone.norm_f", Head("lm_head", False), 3),
    "lfm2": ("model.embed_tokens", "model.embedding_norm", Head("model.embed_tokens", True), 3),
    "afm7": ("model.embedding", "model.output_norm", Head("model.embedding", True), 3),
    "nanochat": ("transformer.wte", None, Head("lm_head", False), 3),
    "talkie": ("model.embed", None, None, 3),
    "gemma4_text_dense": ("model.embed_tokens", "model.norm", Head("lm_head", False), 4),
    "phixtral": ("transformer.embd.wte", "lm_head.ln", Head("lm_head.linear", False), 2),
    "longcat_flash_ngram": (
        "model.ngram_embeddings.word_embeddings", "model.norm", Head("lm_head", False), 2,
    ),
    "dbrx": ("transformer.wte", "transformer.norm_f", Head("lm_head", False), 2),
    "llama4": (
        "language_model.model.embed_tokens",
        "language_model.model.norm",
        Head("language_model.lm_head", False),
        4,
    ),
}  # fmt: skip

KINDS = {
    "qwen3_next": ("linear attention", "attention"),
    "qwen3_5_dense": ("linear attention", "attention"),
    "jamba": ("state space", "attention"),
    "nemotron_h": ("state space", "attention", None),
    "lfm2": ("convolution", "attention", "convolution"),
    "recurrent_gemma": ("recurrent", "recurrent", "attention"),
    "plamo2": ("state space", "attention", "state space"),
    "kimi_linear": ("linear attention", "attention"),
    "minimax": ("attention", "attention"),
    "nemotron-nas": ("attention", None, "attention", "attention"),
    "rwkv7": ("linear attention",) * 3,
}

# Linears without a role, by attribute name: low-rank halves, gates, inputs of recurrent mixers.
OWN = {
    "q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj", "kv_proj", "g_proj", "gate_proj", "in_proj",
    "in_proj_qkvz", "in_proj_ba", "in_proj_z", "in_proj_b", "in_proj_a", "x_proj", "dt_proj",
    "bcdt_proj", "a_proj", "b_proj", "f_proj", "f_a_proj", "f_b_proj", "g_a_proj", "g_b_proj",
    "r_proj", "linear_x", "linear_y", "coefficient", "shared_expert_gate", "wq_b", "wk",
    "weights_proj", "fc1_latent_proj", "fc2_latent_proj", "routed_expert_down_proj",
    "routed_expert_up_proj", "per_layer_input_gate", "per_layer_projection", "linear_left",
    "linear_right", "correction_coefs", "prediction_coefs", "modality_router", "0", "2",
    "layer", "gate", "proj", "wg", "classifier",
}  # fmt: skip

# Norms of a layer without a role: of second branches, and of the first layer's input (rwkv7).
OWN_NORMS = {
    "post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2",
    "post_per_layer_input_norm", "pre_norm",
}  # fmt: skip
