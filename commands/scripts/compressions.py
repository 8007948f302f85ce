"""The ways in which `compress` spends a model's bytes: fewer experts, narrower ones, fewer bits."""

from __future__ import annotations

import shlex

from mlxfun.errors import UsageError
from mlxfun.session.measuring.variants import Target
from mlxfun.session.reports import InfoReport
from mlxfun.techniques.bits.options import CHOICES, GROUP_SIZE
from mlxfun.text import readable_bytes

PRUNE = "prune --n-prune {} --metric output_error --refit-experts"

FRACTIONS = (0.125, 0.25, 0.375, 0.5)
"""Shares of the experts' neurons, and of their number, that are tried within a bound on the loss."""

SIZES = (0.5, 0.375, 0.28)
"""Shares of the model's bytes that are tried with fewer bits within a bound on the loss: 16-bit values
with 8, 6 and 4 bits and their scales."""

NARROWER = 0.25
"""Of the neurons, what goes ahead of fewer bits."""

Steps = tuple[str, ...]


def variants(
    model: InfoReport, target: Target, output: str = "", bits: bool = True
) -> tuple[Steps, ...]:
    """For each variant the command lines that make it. With `bits`, some choose bits per module of a model
    that is not packed; their plans go to files in `output`.

    Within a size each variant takes as much as the size asks for: from the width of the experts
    alone, from their number alone, and a quarter and half of it from their number. Within a loss,
    several amounts are tried of each. Raises UsageError for a size that cannot be reached.
    """
    packing = _packing(model, target, output) if bits and not model.quantization else ()
    if target.of == "KL":
        return (*_within_loss(model), *packing)
    over = model.checkpoint_bytes - target.limit
    if over <= 0:
        raise UsageError(
            f"the model takes {readable_bytes(model.checkpoint_bytes)} as saved already; ask for less"
        )
    if target.limit < (least := _least(model, bool(packing))):
        raise UsageError(
            f"--to-bytes {readable_bytes(int(target.limit))}: compress can make about "
            f"{readable_bytes(int(least))} of this model at the smallest; ask for more, or begin with a "
            "smaller model"
        )
    narrow = _narrow(model, f"--to-bytes {int(target.limit)}")
    count = _count(model, over)
    if count is None:
        # So few experts are left that a token could not be routed: they have to become narrower.
        half = _rounded(model, (model.experts_kept - model.top_k) // 2)
        mixed = (PRUNE.format(half), narrow)
        few_left = ((narrow,), mixed) if half else ((narrow,),)
        return (*few_left, *packing)
    some = dict.fromkeys(_rounded(model, part) for part in (-(-count // 4), -(-count // 2)))
    both = [(PRUNE.format(few), narrow) for few in some if 0 < few < count]
    return ((narrow,), (PRUNE.format(count),), *both, *packing)


def _least(model: InfoReport, packing: bool) -> float:
    """No variant within a size takes fewer bytes than this: experts without neurons, or everything
    packed in the fewest bits where a quarter of the experts' neurons are gone before.
    """
    experts = model.experts_kept * sum(model.expert_bytes)
    beside = model.checkpoint_bytes - experts
    if not packing:
        return beside
    value = 32 if "32" in model.dtype else 16
    # A scale and an offset for each group, of the type of the values.
    share = (min(CHOICES) + 2 * value / GROUP_SIZE) / value
    return min(beside, (beside + (1 - NARROWER) * experts) * share)


def _packing(model: InfoReport, target: Target, output: str) -> list[Steps]:
    """Fewer bits alone, with narrower experts, and with fewer."""
    few = _rounded(model, model.experts_kept // 8)
    ahead: list[Steps] = [(), (f"narrow --fraction {NARROWER:g}",)]
    ahead += [(PRUNE.format(few),)] if few and _left(model, few) else []
    whole = model.checkpoint_bytes
    if target.of == "KL":
        made: list[tuple[Steps, int]] = [((), int(whole * share)) for share in SIZES]
        made.append((ahead[1], int(whole * SIZES[-1])))
    else:
        made = [(steps, int(target.limit)) for steps in ahead]
    return [
        (*steps, f"bits --to-bytes {size} --output {shlex.quote(f'{output}/bits-{number}.json')}")
        for number, (steps, size) in enumerate(made, 1)
    ]


def _within_loss(model: InfoReport) -> tuple[Steps, ...]:
    narrower = [(_narrow(model, f"--fraction {share:g}"),) for share in FRACTIONS]
    counts = dict.fromkeys(_rounded(model, int(model.experts_kept * f)) for f in FRACTIONS[:2])
    fewer = [PRUNE.format(count) for count in counts if count and _left(model, count)]
    both = [(fewer[0], _narrow(model, "--fraction 0.25"))] if fewer else []
    return (*narrower, *((line,) for line in fewer), *both)


def _narrow(model: InfoReport, how: str) -> str:
    return f"narrow {how} --requantize" if model.quantization else f"narrow {how}"


def _count(model: InfoReport, over: float) -> int | None:
    """How many experts of each layer take `over` bytes, None where too few would be left."""
    each = sum(model.expert_bytes)
    count = _rounded(model, int(-(-over // each)))
    return count if _left(model, count) else None


def _rounded(model: InfoReport, count: int) -> int:
    """The same number from each group of a grouped router."""
    return -(-count // model.groups) * model.groups


def _left(model: InfoReport, count: int) -> bool:
    """Whether a token can still be routed."""
    return model.experts_kept - count >= max(model.top_k, model.groups)
