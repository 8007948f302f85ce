"""Every name against a forward written out by hand in NumPy, one dense model and one of experts."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from tracing_rigs import TOKENS, tiny

from mlxfun.tracing.model import Model

Weights = dict[str, np.ndarray]
EPS = 1e-5


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


class ByHand:
    """A slow forward of llama and qwen3_moe that keeps every value, by its canonical name."""

    def __init__(self, model: Model, config: dict) -> None:
        flat = tree_flatten(model.parts.model.parameters())
        self.w: Weights = {name: np.array(array, np.float64) for name, array in flat}
        self.c, self.seen = config, {}

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        eps = self.c["rms_norm_eps"]
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * self.w[f"{name}.weight"]

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self.w[f"{name}.weight"].T

    def rope(self, x: np.ndarray) -> np.ndarray:
        half = x.shape[-1] // 2
        base = self.c.get("rope_theta", 10000)
        angle = np.arange(x.shape[2])[:, None] * base ** (-np.arange(half) / half)
        a, b = x[..., :half], x[..., half:]
        return np.concatenate(
            [a * np.cos(angle) - b * np.sin(angle), a * np.sin(angle) + b * np.cos(angle)], -1
        )

    def attention(self, x: np.ndarray, path: str, name: str) -> np.ndarray:
        heads, groups = self.c["num_attention_heads"], self.c["num_key_value_heads"]
        seen = self.seen
        split: dict[str, np.ndarray] = {}
        for part, count in (("q", heads), ("k", groups), ("v", groups)):
            seen[f"{name}.{part}"] = flat = self.linear(x, f"{path}.{part}_proj")
            split[part] = flat.reshape(*x.shape[:2], count, -1)
            if f"{path}.{part}_norm.weight" in self.w:
                split[part] = self.norm(split[part], f"{path}.{part}_norm")
            split[part] = split[part].swapaxes(1, 2)
        q, k, v = self.rope(split["q"]), self.rope(split["k"]), split["v"]
        seen |= {f"{name}.queries": q, f"{name}.keys": k, f"{name}.values": v}
        k, v = (np.repeat(a, heads // groups, axis=1) for a in (k, v))
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
        scores[..., np.triu(np.ones(scores.shape[-2:], bool), 1)] = -np.inf
        seen[f"{name}.weights"] = weights = softmax(scores)
        seen[f"{name}.heads"] = out = weights @ v
        flat = out.swapaxes(1, 2).reshape(*x.shape[:2], -1)
        return self.linear(flat, f"{path}.o_proj")

    def dense(self, x: np.ndarray, path: str, name: str) -> np.ndarray:
        gate, up = self.linear(x, f"{path}.gate_proj"), self.linear(x, f"{path}.up_proj")
        self.seen |= {f"{name}.gate": gate, f"{name}.up": up}
        return self.linear(silu(gate) * up, f"{path}.down_proj")

    def experts(self, x: np.ndarray, path: str, layer: str) -> np.ndarray:
        logits = self.linear(x, f"{path}.gate")
        p, k = softmax(logits), self.c["num_experts_per_tok"]
        self.seen[f"{layer}.router.logits"] = logits
        self.chosen: dict = getattr(self, "chosen", {})
        out = np.zeros_like(x)
        for place in np.ndindex(*x.shape[:2]):
            top = np.argsort(-p[place])[:k]
            total = p[place][top].sum() if self.c["norm_topk_prob"] else 1.0
            for e in top:
                g, u, d = (
                    self.w[f"{path}.switch_mlp.{n}_proj.weight"][e] for n in ("gate", "up", "down")
                )
                w = p[place][e] / total
                adds = w * ((silu(g @ x[place]) * (u @ x[place])) @ d.T)
                self.chosen.setdefault((layer, int(e)), []).append((place, w, adds))
                out[place] += adds
        return out

    def __call__(self, tokens: list[list[int]]) -> dict[str, np.ndarray]:
        seen = self.seen
        seen["embed"] = x = self.w["model.embed_tokens.weight"][np.array(tokens)]
        for i in range(self.c["num_hidden_layers"]):
            path, name = f"model.layers.{i}", f"layers.{i}"
            seen[f"{name}.input"] = x
            seen[f"{name}.norm1"] = h = self.norm(x, f"{path}.input_layernorm")
            seen[f"{name}.attn.output"] = h = self.attention(h, f"{path}.self_attn", f"{name}.attn")
            x = x + h
            seen[f"{name}.norm2"] = h = self.norm(x, f"{path}.post_attention_layernorm")
            sparse = f"{path}.mlp.gate.weight" in self.w
            part: Callable[..., np.ndarray] = self.experts if sparse else self.dense
            seen[f"{name}.mlp.output"] = h = part(
                h, f"{path}.mlp", name if sparse else f"{name}.mlp"
            )
            seen[f"{name}.residual"] = x = x + h
        seen["norm"] = x = self.norm(x, "model.norm")
        head = "lm_head" if "lm_head.weight" in self.w else "model.embed_tokens"
        seen["output"] = self.linear(x, head)
        return seen


@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_every_value_is_that_of_the_forward_written_out(name: str) -> None:
    import tiny_models

    model = tiny(name)
    by_hand = ByHand(model, (tiny_models.CONFIGS | tiny_models.DENSE)[name])
    expected = by_hand(TOKENS)
    with model.trace(TOKENS) as t:
        saved = {n: t[n].save() for n in expected}
    assert len(saved) > 25
    for n, value in expected.items():
        assert saved[n].shape == value.shape, n
        assert np.allclose(np.array(saved[n]), value, atol=2e-4, rtol=1e-3), n


def test_each_expert_adds_for_its_tokens_what_the_written_out_forward_adds() -> None:
    import tiny_models

    model = tiny("qwen3_moe")
    by_hand = ByHand(model, tiny_models.CONFIGS["qwen3_moe"])
    by_hand(TOKENS)
    layers = [layer.index for layer in model.parts.map.experts.layers]
    with model.trace(TOKENS) as t:
        saved = {(f"layers.{i}", e): t.layers[i].experts[e].output.save()
                 for i in layers for e in range(8)}  # fmt: skip
    served = 0
    for key, one in saved.items():
        expected = sorted(by_hand.chosen.get(key, []), key=lambda row: row[0])
        assert [tuple(row) for row in one.tokens.tolist()] == [place for place, _, _ in expected]
        if expected:
            assert np.allclose(np.array(one.weights), [w for _, w, _ in expected], atol=1e-4)
            assert np.allclose(np.array(one), [adds for _, _, adds in expected], atol=1e-4)
        served += len(expected)
    assert served == len(layers) * 2 * 12


def test_an_edit_in_the_middle_is_what_the_written_out_forward_makes_of_it() -> None:
    model = tiny("llama")
    module = model.parts.model
    with model.trace(TOKENS) as t:
        early = t.layers[0].residual.save()
        t.layers[1].mlp.output = 0.0
        middle = t.layers[1].residual.save()
        attention = t.layers[1].attn.output.save()
    expected = np.array(early) + np.array(attention)
    assert np.allclose(np.array(middle), expected, atol=1e-5)
    assert module(mx.array(TOKENS)).shape == (2, 6, 64)
