"""Quantises a model while it is saved, with mlx-lm's own `quantize_model`.

The quantised tensors are lazy expressions over the tensors to be saved. Each is handed out once
and then forgotten, so writing needs the memory of a few of them; a second pass (the gate) builds
the expressions again, and quantisation is deterministic.
"""

from __future__ import annotations

import contextlib
import copy
import io
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import _decode_tagged_floats, _get_classes, quantize_model

from mlxfun.checkpoint.bits_plan import BitsPlan, Layout
from mlxfun.checkpoint.gate import Weights
from mlxfun.checkpoint.load import short
from mlxfun.checkpoint.options import MODES, Mode
from mlxfun.errors import SaveError, UsageError
from mlxfun.model.parameters import flatten

BITS = (2, 3, 4, 5, 6, 8)
GROUP_SIZES = (32, 64, 128)
_SETTINGS = ("quantization", "quantization_config")


class Requantised:
    """Weights of `weights`, quantised to `bits` in groups of `group_size`; in a mode other than
    affine, as that mode packs them; or as a plan of bits says, module by module.

    config: the configuration that goes with them.

    Raises UsageError for sizes MLX does not have, SaveError for a model that is quantised already
    or has no layer whose width is a multiple of the group size.
    """

    def __init__(
        self,
        weights: Weights,
        config: dict[str, Any],
        bits: int,
        group_size: int,
        mode: Mode = "affine",
        plan: BitsPlan | None = None,
    ) -> None:
        bits, group_size = MODES.get(mode, (bits, group_size))
        if mode not in MODES and bits not in BITS:
            raise UsageError(f"--quantize {bits}: choose one of {', '.join(map(str, BITS))} bits")
        if mode not in MODES and group_size not in GROUP_SIZES:
            sizes = ", ".join(map(str, GROUP_SIZES))
            raise UsageError(f"group size {group_size}: choose one of {sizes}")
        if (present := describe_quantization(config)) is not None:
            raise SaveError(
                f"the model is quantised already ({present}); --quantize needs a model with "
                "floating-point weights"
            )
        if plan is not None:
            _require_sound(plan, weights)
        self._source, self._plan = weights, plan
        self._plain_config = config
        self._bits, self._group_size, self._mode = bits, group_size, mode
        try:
            model, self.config = self.build()
        except ValueError as error:
            raise SaveError(f"mlx-lm cannot quantise this model: {short(error)}") from error
        self._pending = dict(flatten(model.parameters()))
        self._sizes = {name: array.nbytes for name, array in self._pending.items()}
        self._dtypes = {name: array.dtype for name, array in self._pending.items()}
        self._shapes = {name: tuple(array.shape) for name, array in self._pending.items()}
        if not any(name.endswith(".scales") for name in self._sizes):
            raise SaveError(
                f"nothing in this model can be quantised in groups of {group_size}: no layer's "
                "width is a multiple of it"
            )

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names of the quantised model."""
        return tuple(self._sizes)

    def dtype(self, name: str) -> mx.Dtype:
        """Its dtype, as of lazy arrays."""
        return self._dtypes[name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Its shape."""
        return self._shapes[name]

    def nbytes(self, name: str) -> int:
        """Bytes of one tensor; lazy arrays know their size."""
        return self._sizes[name]

    def tensor(self, name: str) -> mx.array:
        """The tensor, lazily; the expressions are built anew for a second pass."""
        if name not in self._pending:
            self._pending = dict(flatten(self.build()[0].parameters()))
        return self._pending.pop(name)

    def _predicate(self, path: str, _: nn.Module) -> Layout | bool:
        plan = self._plan
        bits = None if plan is None else plan.bits.get(path)
        if plan is None or bits is None:
            return False
        group = plan.groups.get(path, plan.group_size)
        return {"group_size": group, "bits": bits, "mode": "affine"}

    def build(self) -> tuple[nn.Module, dict[str, Any]]:
        """The quantised model, lazy, and its config."""
        # Some floats are tagged in config.json, which stock loading undoes as well.
        config = _decode_tagged_floats(copy.deepcopy(self._plain_config))
        model_class, args_class = _get_classes(config)
        model = model_class(args_class.from_dict(config))
        model.eval()
        names = self._source.names
        model.load_weights([(name, self._source.tensor(name)) for name in names], strict=True)
        # quantize_model prints a line; it only builds expressions, so this lasts milliseconds.
        with contextlib.redirect_stdout(io.StringIO()):
            quantised, config = quantize_model(
                model,
                config,
                self._group_size,
                self._bits,
                self._mode,
                quant_predicate=None if self._plan is None else self._predicate,
            )
        settings = {key: config[key] for key in _SETTINGS if key in config}
        return quantised, copy.deepcopy(self._plain_config) | settings


def _require_sound(plan: BitsPlan, weights: Weights) -> None:
    """Raise UsageError for a plan of other modules or of widths that MLX does not have."""
    names = set(weights.names)
    for path, bits in plan.bits.items():
        if f"{path}.weight" not in names:
            raise UsageError(
                f"the plan of bits names {path}, which this model has not; it was made for another, "
                "write one with bits --to-bytes SIZE"
            )
        if bits not in BITS:
            raise UsageError(
                f"the plan of bits gives {path} {bits} bits: choose among {', '.join(map(str, BITS))}"
            )


def packed_so(config: dict[str, Any], mode: Mode) -> bool:
    """Whether the model is packed in `mode`, one of `MODES`, as it is."""
    settings = config.get("quantization")
    return mode in MODES and isinstance(settings, dict) and settings.get("mode") == mode


def describe_quantization(config: dict[str, Any]) -> str | None:
    """ "4-bit affine, groups of 64" for a quantised model's config, None for a plain one."""
    settings = config.get("quantization")
    if not isinstance(settings, dict):
        return None
    mode = settings.get("mode", "affine")
    listed = {each.get("bits") for each in settings.values() if isinstance(each, dict)}
    numbers = sorted(bits for bits in listed if isinstance(bits, int))
    # A plan of bits lists every module; architectures list exceptions alone.
    if len(numbers) > 1 and settings.get("bits") in numbers:
        least, most, group = numbers[0], numbers[-1], settings.get("group_size")
        return f"{least} to {most} bits by module, {mode}, groups of {group}"
    return f"{settings.get('bits')}-bit {mode}, groups of {settings.get('group_size')}"
