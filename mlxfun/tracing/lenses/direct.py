"""Direct logit attribution: what each part writes to the residual stream adds to a token's logit.

    logit[a] - logit[b] = sum over parts c of  N(c) . (u_a - u_b)

N is the final norm with its scale held at what it was, u the rows of the head. Parts are the token
embedding, each attention (and its heads), each dense feed-forward part, each expert, and what else a
layer writes. N. Elhage et al., A mathematical framework for transformer circuits, 2021.

Nothing is assumed of how a family adds its parts up: post-norms are held fixed in the same way, and
what the named parts of a layer do not account for is shown as its `rest`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import numpy as np

from mlxfun.arrays import Array
from mlxfun.errors import ModelError, UsageError
from mlxfun.model.anatomy import facts
from mlxfun.tracing.axes import Positions
from mlxfun.tracing.lenses.ending import Ending
from mlxfun.tracing.parts import Parts
from mlxfun.tracing.patching.metrics import TokenLike, token_id
from mlxfun.tracing.prompts import Prompt, encode, padded
from mlxfun.tracing.trace import run_once
from mlxfun.tracing.tracer import Tracer
from mlxfun.tracing.values import Saved, SavedExpert

PartKind = Literal["embed", "bias", "attn", "head", "mlp", "expert", "rest"]
Linear = Callable[[Array], Array]
CLOSE = 0.02
"""Relative error within which a held norm must give the norm's own output."""


@dataclass(frozen=True, slots=True)
class Share:
    """What one part adds. number: of a head or expert, None for others."""

    kind: PartKind
    layer: int | None
    number: int | None
    logit: float

    @property
    def name(self) -> str:
        """In words."""
        at = "" if self.layer is None else f"layer {self.layer} "
        return f"{at}{self.kind}" if self.number is None else f"{at}{self.kind} {self.number}"


@dataclass(frozen=True, slots=True)
class DirectResult:
    """Shares of the logit of `answer`, less that of `other` where one was given, at `position`.

    total: that logit (difference) itself; what the shares do not sum up to is rounding
    (`unexplained`). Heads are a split of their attention; the mlp of a layer with experts is what
    is left of it without them: shared experts. bias: of the final norm and the head.
    """

    answer: str
    other: str
    position: int
    total: float
    shares: tuple[Share, ...]

    @property
    def unexplained(self) -> float:
        """total less all shares, heads left out as they are in their attention's."""
        return self.total - sum(s.logit for s in self.shares if s.kind != "head")

    def top_components(self, k: int = 10) -> list[Share]:
        """The k largest shares by size."""
        return sorted(self.shares, key=lambda share: -abs(share.logit))[:k]

    def summary(self) -> str:
        """One sentence."""
        best = self.top_components(1)[0]
        over = f" over {self.other!r}" if self.other else ""
        return f"{self.answer!r}{over}: {self.total:+.2f}; most by {best.name}: {best.logit:+.2f}"

    def to_dict(self) -> dict[str, Any]:
        """All of it, JSON-able."""
        return {
            "answer": self.answer,
            "other": self.other,
            "position": self.position,
            "total": self.total,
            "unexplained": self.unexplained,
            "shares": [
                {"kind": s.kind, "layer": s.layer, "number": s.number, "logit": s.logit}
                for s in self.shares
            ],
        }

    def to_json(self) -> str:
        """The same as a JSON object."""
        return json.dumps(self.to_dict())

    def to_markdown(self, k: int = 15) -> str:
        """The largest shares as a table."""
        rows = [f"| {s.name} | {s.logit:+.3f} |" for s in self.top_components(k)]
        return "\n".join([f"{self.summary()}.", "", "| part | logit |", "|---|---:|", *rows]) + "\n"


def direct_logit_attribution(
    model: Tracer,
    prompt: Prompt,
    answer: TokenLike | None = None,
    other: TokenLike | None = None,
    position: int = -1,
) -> DirectResult:
    """Which parts wrote a token's logit, directly. answer: by default what the model says.

    Raises ModelError for a model whose final norm is of no known kind, or with several streams.
    """
    parts = model.parts
    (row,) = encode(parts.tokenizer, prompt, parts.map.vocabulary)
    if not -len(row) <= position < len(row):
        raise UsageError(f"there is no position {position}: the prompt has {len(row)} tokens")
    seen = _Seen(parts, row, position)
    logits = seen.at("output")
    first = int(np.argmax(logits)) if answer is None else token_id(parts.tokenizer, answer)
    second = None if other is None else token_id(parts.tokenizer, other)
    total = float(logits[first]) - (0.0 if second is None else float(logits[second]))
    read, bias = _reading(parts, seen, first, second)
    shares = [Share("embed", None, None, read(seen.at("layers.0.input")))]
    if bias:
        shares.append(Share("bias", None, None, bias))
    for layer in range(parts.names.layers):
        shares += _of_layer(parts, seen, layer, read)
    decode = parts.tokenizer.decode
    over = "" if second is None else decode([second])
    return DirectResult(decode([first]), over, position % len(row), total, tuple(shares))


class _Seen:
    """Values of one forward at one position, float64."""

    def __init__(self, parts: Parts, row: Sequence[int], position: Positions) -> None:
        names = ["output", "layers.0.input"]
        for layer in parts.map.layers:
            prefix = f"layers.{layer.index}"
            names += [f"{prefix}.residual", f"{prefix}.input"]
            names += [n for n in (f"{prefix}.attn.output", f"{prefix}.mlp.output",
                                  f"{prefix}.post_norm1", f"{prefix}.post_norm2") if n in parts.names.points]  # fmt: skip
            if f"{prefix}.attn.output" in parts.map.paths:
                names.append(f"{parts.map.paths[f'{prefix}.attn.output']}.input")
            if layer.moe is not None:
                names += [f"{prefix}.experts.{e}.output" for e in parts.experts(layer.index).live]
        self._saved: dict[str, Saved] = {}
        for name in dict.fromkeys(names):
            point = parts.names.point(name)
            expert = point.kind == "expert"
            self._saved[name] = SavedExpert(point, position) if expert else Saved(point, position)
        run_once(parts, padded([row]), [], list(self._saved.values()))

    def __contains__(self, name: str) -> bool:
        return name in self._saved

    def at(self, name: str) -> Array:
        """The value, a vector; of an expert that does not serve the token zeros of length 0."""
        value = self._saved[name].numpy().astype(np.float64)
        return value.reshape(-1) if value.size else np.zeros(0)


def held_norm(module: Any, x: Array) -> Linear:
    """A norm as a linear map, its scale held at what it is for x [D].

    RMS norms: c -> c g / rms(x). Layer norms: c -> (c - mean(c)) g / std(x). Raises ModelError for
    a norm that is neither.
    """
    own = np.array(module(mx.array(x[None].astype(np.float32))).astype(mx.float32))[0]
    shift = np.array(module.bias.astype(mx.float32)) if "bias" in module else np.zeros_like(own)
    own = own.astype(np.float64) - shift
    for centred in (False, True):
        y = x - x.mean() if centred else x
        if not y.any():
            continue
        unit = y / np.sqrt((y * y).mean())
        # Of ones, whose RMS is 1, an RMS norm gives its gain; a layer norm has it as its weight.
        if centred:
            gain = np.array(module.weight.astype(mx.float32)) if "weight" in module else 1.0
        else:
            gain = np.array(module(mx.ones((1, len(x)))).astype(mx.float32))[0].astype(np.float64)
        if np.abs(unit * gain - own).max() <= CLOSE * np.abs(own).max() + 1e-6:
            return _scaled(gain / np.sqrt((y * y).mean()), centred)
    raise ModelError(f"{type(module).__name__} is no norm whose scale could be held")


def _scaled(scale: Array | float, centred: bool) -> Linear:
    return (lambda c: (c - c.mean()) * scale) if centred else (lambda c: c * scale)


def _reading(
    parts: Parts, seen: _Seen, answer: int, other: int | None
) -> tuple[Callable[[Array], float], float]:
    """From what is written to the stream to the logit; and what the biases of norm and head add."""
    if Ending(parts).streams is not None or parts.map.norm is None or parts.map.head is None:
        raise ModelError(
            f"{parts.map.model_type} has several residual streams, or no final norm or head of its "
            "own, so a logit is no sum of what its parts write"
        )
    last = seen.at(f"layers.{parts.names.layers - 1}.residual")
    norm: Any = parts.modules[parts.map.norm]
    held = held_norm(norm, last)
    hidden = norm(mx.array(last[None].astype(np.float32)))
    head: Any = parts.modules[parts.map.head.path]
    apply = head.as_linear if parts.map.head.tied else head

    def value(h: mx.array) -> mx.array:
        z = apply(h)[0]
        out: mx.array = z[answer] if other is None else z[answer] - z[other]
        return out

    # The head is linear: its gradient is the row, whatever it is packed in.
    way = np.array(mx.grad(value)(hidden).astype(mx.float32))[0].astype(np.float64)
    scale = _behind_head(seen, value(hidden), answer, other)
    fixed = float(np.array(value(mx.zeros_like(hidden)).astype(mx.float32)))
    if "bias" in norm:
        fixed += float(np.array(norm.bias.astype(mx.float32)) @ way)
    return (lambda c: float(held(c) @ way) * scale if c.size else 0.0), fixed * scale


def _behind_head(seen: _Seen, raw: mx.array, answer: int, other: int | None) -> float:
    """What the model multiplies its logits by behind the head; 1 for most."""
    z = seen.at("output")
    own = z[answer] if other is None else z[answer] - z[other]
    plain = float(np.array(raw.astype(mx.float32)))
    return float(own) / plain if abs(plain) > 1e-6 else 1.0


def _of_layer(parts: Parts, seen: _Seen, index: int, read: Callable[[Array], float]) -> list[Share]:
    """Shares of one layer; they sum to what it adds to the stream."""
    prefix, layer = f"layers.{index}", parts.layer(index)
    added = seen.at(f"{prefix}.residual") - seen.at(f"{prefix}.input")
    shares: list[Share] = []
    known = np.zeros_like(added)
    factor = _factor(seen, prefix, added)
    for kind in ("attn", "mlp"):
        written = _written(parts, seen, prefix, kind)
        if written is None or factor is None:
            continue
        known = known + factor * written[0]
        own: PartKind = "attn" if kind == "attn" else "mlp"
        if kind == "mlp" and layer.moe is not None:
            held, left = written[1], factor * written[0]
            for expert in parts.experts(index).live:
                part = seen.at(f"{prefix}.experts.{expert}.output")
                if part.size == added.size and not layer.moe.facts.post_scale:
                    adds = factor * held(part)
                    left = left - adds
                    shares.append(Share("expert", index, expert, read(adds)))
            shares.append(Share("mlp", index, None, read(left)))
            continue
        shares.append(Share(own, index, None, read(factor * written[0])))
        if kind == "attn":
            shares += _heads(parts, seen, index, _after(written[1], factor, read))
    shares.append(Share("rest", index, None, read(added - known)))
    return shares


def _after(
    behind: Linear, factor: float, read: Callable[[Array], float]
) -> Callable[[Array], float]:
    return lambda c: read(factor * behind(c))


def _written(parts: Parts, seen: _Seen, prefix: str, kind: str) -> tuple[Array, Linear] | None:
    """What a part writes, and the map from its output to that: a post-norm, held, where it has one."""
    name, post = f"{prefix}.{kind}.output", f"{prefix}.post_norm{1 if kind == 'attn' else 2}"
    if name not in seen:
        return None
    if post not in seen:
        return seen.at(name), lambda c: c
    try:
        held = held_norm(parts.modules[parts.map.path(post)], seen.at(name))
    except ModelError:
        return None
    return seen.at(post), held


def _factor(seen: _Seen, prefix: str, added: Array) -> float | None:
    """What a layer multiplies its parts by before it adds them (granite, minicpm); None where the
    parts are not what it adds."""
    written = np.zeros_like(added)
    for kind, post in (("attn", "post_norm1"), ("mlp", "post_norm2")):
        for name in (f"{prefix}.{post}", f"{prefix}.{kind}.output"):
            if name in seen:
                written = written + seen.at(name)
                break
    size = float(written @ written)
    if size == 0:
        return None
    factor = float(added @ written) / size
    left = np.linalg.norm(added - factor * written)
    return factor if left <= CLOSE * np.linalg.norm(added) else None


def _heads(parts: Parts, seen: _Seen, index: int, read: Callable[[Array], float]) -> list[Share]:
    """The heads of an attention whose output projection takes them side by side."""
    path = parts.map.paths.get(f"layers.{index}.attn.output", "")
    mixer = parts.layer(index).mixers[0]
    count = next((vars(parts.modules[mixer.path])[name] for name in facts.HEAD_COUNTS
                  if name in vars(parts.modules[mixer.path])), None)  # fmt: skip
    given = seen.at(f"{path}.input") if f"{path}.input" in seen else np.zeros(0)
    if mixer.kind != "attention" or not count or not given.size or given.size % count:
        return []
    project: Any = parts.modules[path]
    split = np.zeros((count + 1, given.size), np.float32)  # the last row stays zero: the bias
    width = given.size // count
    for head in range(count):
        split[head, head * width : (head + 1) * width] = given[head * width : (head + 1) * width]
    out = np.array(project(mx.array(split)).astype(mx.float32)).astype(np.float64)
    return [Share("head", index, h, read(out[h] - out[-1])) for h in range(count)]
