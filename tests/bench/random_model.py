"""A random quantised Qwen3-MoE of any shape, written to disk layer by layer, with a tokenizer."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten


@dataclass(frozen=True)
class Shape:
    """A Qwen3-MoE. bits 0: float32, which CPUs are fastest with. wide: where weights are packed, 1 for
    scales and all else in float32, with which CPUs multiply nine times as fast as with bfloat16."""

    layers: int = 48
    experts: int = 128
    top_k: int = 8
    hidden: int = 2048
    width: int = 768
    heads: int = 32
    kv_heads: int = 4
    head_dim: int = 128
    vocabulary: int = 151_936
    bits: int = 4
    wide: int = 0


PRESETS = {
    "qwen3-30b-a3b": Shape(),
    "small": Shape(24, 16, 4, 256, 128, 4, 2, 64, 8192, bits=0),
}


def make(shape: Shape, directory: Path) -> Path:
    """Write the model; its layers exist one at a time."""
    from mlx_lm.models.qwen3_moe import Model, ModelArgs

    directory.mkdir(parents=True, exist_ok=True)
    config = _config(shape)
    if shape.bits:
        config["quantization"] = {"group_size": 64, "bits": shape.bits}
    mx.random.seed(0)
    model: Any = Model(ModelArgs.from_dict(config))
    index: dict[str, str] = {}
    parts = [(f"model.layers.{i}", model.model.layers, i) for i in range(shape.layers)]
    for number, (name, owner, place) in enumerate(parts):
        _write(name, owner[place], shape, directory / f"model-{number:05d}.safetensors", index)
        owner[place] = nn.Identity()
        mx.clear_cache()
    for name in ("model.embed_tokens", "model.norm", "lm_head"):
        module = model
        for step in name.split("."):
            module = module[step]
        _write(name, module, shape, directory / f"model-{name}.safetensors", index)
    (directory / "config.json").write_text(json.dumps(config))
    where = {"metadata": {}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(where))
    _tokenizer(shape.vocabulary, directory)
    return directory


def _write(name: str, module: nn.Module, shape: Shape, file: Path, index: dict[str, str]) -> None:
    holder: Any = nn.Module()
    holder.part = module
    if shape.bits:
        module.set_dtype(mx.float32 if shape.wide else mx.bfloat16)
        nn.quantize(holder, group_size=64, bits=shape.bits)
    arrays = {
        path.replace("part", name, 1): array for path, array in tree_flatten(holder.parameters())
    }
    mx.eval(arrays)
    mx.save_safetensors(str(file), arrays, metadata={"format": "mlx"})
    index.update(dict.fromkeys(arrays, file.name))


def _config(shape: Shape) -> dict[str, Any]:
    asked = asdict(shape)
    return {
        "model_type": "qwen3_moe", "hidden_size": asked["hidden"],
        "num_hidden_layers": asked["layers"], "intermediate_size": asked["width"],
        "num_attention_heads": asked["heads"], "num_key_value_heads": asked["kv_heads"],
        "head_dim": asked["head_dim"], "num_experts": asked["experts"],
        "num_experts_per_tok": asked["top_k"], "moe_intermediate_size": asked["width"],
        "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
        "rms_norm_eps": 1e-6, "vocab_size": asked["vocabulary"], "rope_theta": 1e6,
        "tie_word_embeddings": False, "max_position_embeddings": 32768, "eos_token_id": 0,
        "architectures": ["Qwen3MoeForCausalLM"],
    }  # fmt: skip


def _tokenizer(vocabulary: int, directory: Path) -> None:
    """Every token is a word, w0 to wN."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{i}": i for i in range(vocabulary)}
    own = Tokenizer(models.WordLevel(words, unk_token="w1"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, eos_token="w0", unk_token="w1")
    tokenizer.chat_template = (
        "{% for m in messages %}w2 {{ m['content'] }} {% endfor %}"
        "{% if add_generation_prompt %}w3{% endif %}"
    )
    tokenizer.save_pretrained(str(directory))


def words(count: int, vocabulary: int, seed: int) -> str:
    """`count` random words."""
    import numpy as np

    picks = np.random.default_rng(seed).integers(4, vocabulary, count)
    return " ".join(f"w{pick}" for pick in picks)


def write_lines(file: Path, lines: int, length: int, vocabulary: int, seed: int = 0) -> Path:
    """A JSONL data set of random words."""
    rows = [json.dumps({"text": words(length, vocabulary, seed + i)}) for i in range(lines)]
    file.write_text("\n".join(rows) + "\n")
    return file
