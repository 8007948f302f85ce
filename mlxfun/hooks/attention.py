"""Taps inside attention: what it takes after norms, RoPE and cache, its weights, and its heads.

    taps = AttentionTaps(modules, {"model.layers.3.self_attn": visit}, wanted={"weights"})
    with taps:
        model(tokens)

No leaf module computes attention weights. Models call `scaled_dot_product_attention`, which their
Python module imported from mlx-lm, or `mx.fast.scaled_dot_product_attention`, or (gemma2, olmo)
`mx.softmax` on scores of their own. That name is rebound where the attention's code looks it up,
for as long as taps are attached; calls from outside the tapped attentions, and from other threads,
go through as they were. Taps may nest; detaching the last restores the very object that was there.

What is only looked at changes nothing: the model's own function makes the output, and weights are
computed beside it, by the formula `softmax(q k^T * scale + mask)`, with sinks where there are some.
Where weights are intervened in, the output is `weights @ values`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from types import TracebackType
from typing import Any, Literal, get_args

import mlx.core as mx
import mlx.nn as nn

from mlxfun.errors import HookError
from mlxfun.hooks.intercept import Hooks
from mlxfun.model.anatomy import facts

AttentionPart = Literal["queries", "keys", "values", "weights", "heads"]
ATTENTION_PARTS: tuple[AttentionPart, ...] = get_args(AttentionPart)
"""queries [B, H, T, Dh]; keys, values [B, G, S, Dh] of G key-value heads and S cached and new
positions, in the order of the cache (a rotating one writes over its oldest); weights [B, H, T, S];
heads [B, H, T, Dh], what each head hands to the output projection."""

Visit = Callable[[AttentionPart, mx.array], mx.array]
"""(part, its value) -> the value that the model goes on with, the same one to leave it."""

SDPA = "scaled_dot_product_attention"


class AttentionTaps:
    """Taps of some attentions. visits: {path of an attention module: what sees its parts}.

    wanted: the parts that are looked at. edits: whether weights may be changed by a visit; only
    then is the output made from them.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        visits: Mapping[str, Visit],
        wanted: Mapping[str, Collection[AttentionPart]],
        edited: Collection[str] = (),
    ) -> None:
        self._hooks = Hooks(modules)
        self._stack: list[tuple[Visit, Collection[AttentionPart], bool]] = []
        self._thread = threading.get_ident()
        self._places: dict[int, dict[str, Any]] = {}
        for path, visit in visits.items():
            self._places |= {id(place): place for place in _namespaces(modules, path)}
            entry = (visit, frozenset(wanted[path]), path in edited)
            self._hooks.on_call(path, self._inside(entry), required=False)

    def _inside(self, entry: tuple[Visit, Collection[AttentionPart], bool]) -> Callable[..., Any]:
        def call(own: Any, *args: Any, **kwargs: Any) -> Any:
            self._stack.append(entry)
            try:
                return own(*args, **kwargs)
            finally:
                self._stack.pop()

        return call

    def active(self) -> tuple[Visit, Collection[AttentionPart], bool] | None:
        """The tap whose attention is running on this thread, None outside of all."""
        if not self._stack or threading.get_ident() != self._thread:
            return None
        return self._stack[-1]

    def __enter__(self) -> AttentionTaps:
        self._thread = threading.get_ident()
        for place in self._places.values():
            _Rebound.of(place).add(self)
        self._hooks.attach()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        self._hooks.detach()
        for place in self._places.values():
            _Rebound.of(place).remove(self)


def _namespaces(modules: Mapping[str, nn.Module], path: str) -> Iterator[dict[str, Any]]:
    """Where the code of an attention, and of what is in it, looks names up."""
    for name, module in modules.items():
        if name == path or name.startswith(f"{path}."):
            for base in type(module).__mro__:
                own = base.__dict__.get("__call__")
                place = getattr(own, "__globals__", None)
                if place is not None and str(place.get("__name__", "")).startswith("mlx_lm."):
                    yield place


class _Rebound:
    """The names of one Python module that are rebound, and the taps that listen there."""

    KEY = "_mlxfun_rebound"

    def __init__(self, place: dict[str, Any]) -> None:
        self._place, self._taps = place, list[AttentionTaps]()
        self._name = SDPA if SDPA in place else "mx"
        self._own: Any = None

    @classmethod
    def of(cls, place: dict[str, Any]) -> _Rebound:
        """What is rebound in a module's namespace, nothing yet where no tap listens."""
        found = place.get(cls.KEY)
        return found if isinstance(found, _Rebound) else cls(place)

    def add(self, taps: AttentionTaps) -> None:
        """Let taps listen; the first rebinds the name."""
        if not self._taps and self._name in self._place:
            self._own = self._place[self._name]
            self._place[self.KEY] = self
            family = str(self._place["__name__"]).rpartition(".")[2]
            by_hand = family in facts.SOFTMAX_ATTENTION
            new = self._sdpa if self._name == SDPA else _MX(self._own, self, by_hand)
            self._place[self._name] = new
        self._taps.append(taps)

    def remove(self, taps: AttentionTaps) -> None:
        """Stop listening; the last restores the name."""
        self._taps.remove(taps)
        if not self._taps and self.KEY in self._place:
            self._place[self._name] = self._own
            del self._place[self.KEY]

    def _sdpa(
        self, queries: mx.array, keys: Any, values: Any, cache: Any, *args: Any, **kwargs: Any
    ) -> Any:
        def own(q: mx.array, k: Any, v: Any) -> mx.array:
            out: mx.array = self._own(q, k, v, cache, *args, **kwargs)
            return out

        given = dict(zip(("scale", "mask", "sinks"), args, strict=False)) | kwargs
        return self.attend(own, (queries, keys, values), given, cache)

    def attend(
        self,
        own: Callable[..., mx.array],
        inputs: tuple[mx.array, Any, Any],
        given: Mapping[str, Any],
        cache: Any = None,
    ) -> mx.array:
        """One call of attention through every tap that it belongs to, the newest outermost."""
        for taps in self._taps:
            entry = taps.active()
            if entry is not None:
                own = _tapped(own, entry, dict(given), cache)
        return own(*inputs)

    def softmax(self, scores: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        """`mx.softmax` of an attention that multiplies by hand: its weights."""
        out: mx.array = self._own.softmax(scores, *args, **kwargs)
        for taps in self._taps:
            entry = taps.active()
            # Five dimensions where key-value heads are repeated: [B, G, H / G, T, S].
            if entry is not None and "weights" in entry[1] and out.ndim in (4, 5):
                flat = out.reshape(out.shape[0], -1, *out.shape[-2:])
                seen = entry[0]("weights", flat)
                out = out if seen is flat else seen.reshape(out.shape).astype(out.dtype)
        return out


def _tapped(
    own: Callable[..., mx.array],
    entry: tuple[Visit, Collection[AttentionPart], bool],
    given: dict[str, Any],
    cache: Any,
) -> Callable[..., mx.array]:
    """`own` with one tap around it."""
    visit, wanted, edited = entry

    def attend(q: mx.array, k: Any, v: Any) -> mx.array:
        plain_k, plain_v = _unpacked(k, cache), _unpacked(v, cache)
        if "queries" in wanted:
            q = visit("queries", q)
        if "keys" in wanted:
            seen = visit("keys", plain_k)
            plain_k, k = seen, k if seen is plain_k else seen
        if "values" in wanted:
            seen = visit("values", plain_v)
            plain_v, v = seen, v if seen is plain_v else seen
        out: mx.array | None = None
        if "weights" in wanted:
            weights = attention_weights(q, plain_k, **_known(given))
            seen = visit("weights", weights)
            if edited and seen is not weights:
                out = _weighed(seen, plain_v).astype(q.dtype)
        if out is None:
            out = own(q, k, v)
        return visit("heads", out) if "heads" in wanted else out

    return attend


def _known(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in ("scale", "mask", "sinks") if name in given}


def _unpacked(array: Any, cache: Any) -> mx.array:
    """Keys or values [B, G, S, Dh] of a cache, which may be quantised."""
    if isinstance(array, mx.array):
        return array
    packed, scales, biases = array
    return mx.dequantize(packed, scales, biases, cache.group_size, cache.bits)


def attention_weights(
    queries: mx.array,
    keys: mx.array,
    scale: float = 1.0,
    mask: mx.array | str | None = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """softmax(q k^T * scale + mask), [B, H, T, S] in the dtype of the queries, computed in float32.

    queries: [B, H, T, Dh]; keys: [B, G, S, Dh], H a multiple of G. mask: "causal", True where a
    query may look, or added. sinks: [H] logits that take weight and give no value (gpt_oss): the
    rows then sum to less than 1.
    """
    repeats = queries.shape[1] // keys.shape[1]
    k = mx.repeat(keys, repeats, axis=1) if repeats > 1 else keys
    scores = (queries.astype(mx.float32) * scale) @ k.astype(mx.float32).swapaxes(-1, -2)
    rows, columns = scores.shape[-2:]
    if isinstance(mask, str):
        if mask != "causal":
            raise HookError(f"an attention mask {mask!r} is not known here; please report it")
        mask = mx.arange(columns - rows, columns)[:, None] >= mx.arange(columns)[None]
    if mask is not None:
        if mask.dtype == mx.bool_:
            scores = mx.where(mask, scores, -mx.inf)
        else:
            scores = scores + mask.astype(mx.float32)
    if sinks is not None:
        sink = mx.broadcast_to(
            sinks.astype(mx.float32).reshape(1, -1, 1, 1), (*scores.shape[:-1], 1)
        )
        scores = mx.concatenate([sink, scores], axis=-1)
    # A padded query may look nowhere: its row is zeros and not nan.
    top = mx.max(scores, axis=-1, keepdims=True)
    exp = mx.exp(scores - mx.where(mx.isinf(top), 0.0, top))
    total = mx.sum(exp, axis=-1, keepdims=True)
    weights = exp / mx.where(total == 0, 1.0, total)
    return (weights if sinks is None else weights[..., 1:]).astype(queries.dtype)


def _weighed(weights: mx.array, values: mx.array) -> mx.array:
    """weights @ values, [B, H, T, Dh], in float32."""
    repeats = weights.shape[1] // values.shape[1]
    v = mx.repeat(values, repeats, axis=1) if repeats > 1 else values
    return weights.astype(mx.float32) @ v.astype(mx.float32)


class _MX:
    """Stands for `mlx.core` in a Python module whose attention calls it directly.

    Of a family in `facts.SOFTMAX_ATTENTION` its `softmax` makes the weights, of others
    `fast.scaled_dot_product_attention` does.
    """

    def __init__(self, own: Any, rebound: _Rebound, by_hand: bool) -> None:
        self._own, self._rebound, self._by_hand = own, rebound, by_hand
        self.fast = _Fast(own.fast, rebound)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def softmax(self, *args: Any, **kwargs: Any) -> mx.array:
        answer = self._rebound.softmax if self._by_hand else self._own.softmax
        out: mx.array = answer(*args, **kwargs)
        return out


class _Fast:
    """Stands for `mx.fast`."""

    def __init__(self, own: Any, rebound: _Rebound) -> None:
        self._own, self._rebound = own, rebound

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own, name)

    def scaled_dot_product_attention(
        self, queries: mx.array, keys: mx.array, values: mx.array, **kwargs: Any
    ) -> mx.array:
        def own(q: mx.array, k: mx.array, v: mx.array) -> mx.array:
            out: mx.array = self._own.scaled_dot_product_attention(q, k, v, **kwargs)
            return out

        return self._rebound.attend(own, (queries, keys, values), kwargs)
