"""The smoke test: finite logits, sane text and valid routing of the live model, in seconds."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlxfun.context import SILENT, Context
from mlxfun.data.datasets import prompt_tokens
from mlxfun.errors import UsageError
from mlxfun.generation.options import GenerateOptions
from mlxfun.model.parameters import finite, flatten
from mlxfun.model.places import Reader
from mlxfun.session.reports import SmokeReport

if TYPE_CHECKING:
    from mlxfun.data.datasets import Tokenizer
    from mlxfun.generation.decoder import Decoded
    from mlxfun.hooks.routing import Taps

PROMPT = "Name three things that one finds in a kitchen."
TOKENS = 24
MOST = 4096
"""Tokens of a prompt: its logits are compared on the host."""
CACHE_TOLERANCE = 0.02
"""Decoding through the cache may round differently from one long prefill, but not by more."""


UNDO = "undo the last edit, or discard the staged one"
NAMED = 3
"""Tensors that the advice names at most."""


class Tested(Protocol):
    """A session, see mlxfun.session.session.Session."""

    tokenizer: Tokenizer
    model: nn.Module
    taps: Taps

    def greedy(self, prompt: list[int], options: GenerateOptions, ctx: Context) -> Decoded:
        """Continue token ids with the live side."""


def smoke_test(
    session: Tested, prompt_text: str = PROMPT, max_tokens: int = TOKENS, ctx: Context = SILENT
) -> SmokeReport:
    """Run every check on the live side; failures are outcomes, not exceptions.

    Raises UsageError for a prompt without text, or of more than `MOST` tokens.
    """
    if not prompt_text.strip():
        raise UsageError("--prompt is empty: leave it out for the default one")
    prompt = [
        int(t) for t in prompt_tokens([{"role": "user", "content": prompt_text}], session.tokenizer)
    ]
    if len(prompt) > MOST:
        raise UsageError(f"--prompt has {len(prompt)} tokens; at most {MOST} are for a quick check")
    checks: dict[str, str] = {}
    plain, tapped = _twice(session, prompt)
    checks["finite logits"] = "ok" if np.isfinite(tapped).all() else "logits hold NaN or infinity"
    checks["taps change nothing"] = _taps_outcome(plain, tapped)
    ctx.check()
    checks["cache"] = _cache_outcome(session, prompt, tapped)
    ctx.check()
    decoded = session.greedy(prompt, GenerateOptions(max_tokens=max_tokens), ctx)
    distinct = len(set(decoded.tokens))
    repeats = len(decoded.tokens) > 8 and distinct <= 2
    checks["generation"] = f"repeats {distinct} tokens over and over" if repeats else "ok"
    passed = all(outcome == "ok" or outcome.startswith("ok ") for outcome in checks.values())
    return SmokeReport(passed, checks, decoded.text)


def advice(
    model: nn.Module,
    edited: bool,
    open_checkpoint: Callable[[], Reader],
    on_disk: Collection[str] = (),
) -> str:
    """Where the live weights hold NaN or infinity, and whether the checkpoint does.

    edited: the live weights may differ from the checkpoint's. on_disk: parameters that are not in
    memory, which is not looked at.
    """
    held = [one for one in flatten(model.parameters()) if one[0] not in on_disk]
    broken = [path for path, array in held if not finite(array)]
    if broken:
        read = open_checkpoint()
        own = [path for path in broken if not finite(read(path))]
        if not own:
            return f"{_names(broken)} hold NaN or infinity, which the checkpoint does not; {UNDO}"
        broken = own
    if broken:
        return (
            f"the checkpoint itself holds NaN or infinity in {_names(broken)}: fetch it again, or "
            "report it to whoever made it"
        )
    return UNDO if edited else "the checkpoint itself does not pass: no edit was made"


def _names(paths: list[str]) -> str:
    more = f" and {len(paths) - NAMED} more" if len(paths) > NAMED else ""
    return ", ".join(paths[:NAMED]) + more


def _twice(session: Tested, prompt: list[int]) -> tuple[Any, Any]:
    """Logits [T, V] without and with recording taps."""
    plain = session.model(mx.array([prompt]))[0]
    with session.taps.recording(logits=True):
        tapped = session.model(mx.array([prompt]))[0]
        mx.eval(plain, tapped)
    return _host(plain), _host(tapped)


def _host(array: mx.array) -> Any:
    return np.array(array.astype(mx.float32))


def _taps_outcome(plain: Any, tapped: Any) -> str:
    return "ok" if np.array_equal(plain, tapped, equal_nan=True) else "recording changes the logits"


def _cache_outcome(session: Tested, prompt: list[int], whole: Any) -> str:
    cache = make_prompt_cache(session.model)
    session.model(mx.array([prompt[:-1]]), cache=cache)
    last = _host(session.model(mx.array([prompt[-1:]]), cache=cache)[0, -1])
    spread = float(np.abs(last - whole[-1]).max()) / max(float(np.ptp(whole[-1])), 1e-9)
    if not spread <= CACHE_TOLERANCE:
        return f"the cached forward differs by {spread:.1%} of the logits' range"
    return "ok"
