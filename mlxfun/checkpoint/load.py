"""Loads a model through stock mlx-lm, checked before and fully evaluated after.

The order matters: what is wrong with a directory is said before gigabytes are read, the memory
estimate comes before the first tensor, and nothing lazy survives, so later work on the weights
never touches the files again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten
from mlx_lm.models.switch_layers import SwitchLinear
from mlx_lm.tokenizer_utils import TokenizerWrapper
from mlx_lm.utils import _get_classes, load_model

from mlxfun.checkpoint.architecture import require_dtypes, require_names, require_sound
from mlxfun.checkpoint.dropped import dropped_notes, packed_elsewhere, without_mtp
from mlxfun.checkpoint.headers import (
    Header,
    indexed_files,
    is_packed,
    read_headers,
    require_even,
    times_held,
)
from mlxfun.checkpoint.identity import Stamp, checkpoint_id, difference, stamps
from mlxfun.checkpoint.on_disk import (
    HALF,
    LayersOnDisk,
    Lazy,
    LeaveOnDisk,
    layer_parameters,
    set_aside,
    streamed_bytes,
    widen,
)
from mlxfun.checkpoint.sources import Source, companions, read_config, resolve, without_wildcards
from mlxfun.checkpoint.tokenizer import open_tokenizer
from mlxfun.context import SILENT, Context
from mlxfun.errors import ModelError
from mlxfun.model.anatomy.stored_names import expert_count
from mlxfun.model.device.memory import bound_cache, memory_limit, on_cpu, require
from mlxfun.model.parameters import flatten

# What stock code raises on weights or settings that do not fit the architecture.
LOAD_ERRORS = (
    ValueError, KeyError, TypeError, IndexError, AttributeError, RuntimeError, OSError, ImportError,
    ArithmeticError, AssertionError, NameError, MemoryError, StopIteration,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Loaded:
    """A resident model and where it came from.

    config: config.json as written, plus the `quantization` entry that stock loading derives for
    checkpoints packed by other tools (the resident tensors need it to load again), and without
    the multi-token-prediction layers that it drops.
    stored_dtypes: {parameter path: dtype before any cast}. estimate: resident bytes as foreseen.
    notes: sentences for the user (parts left behind, the cast, an unreachable Hub). files:
    config.json and the weights as they were, to tell whether they still are. companions: names of
    the other files of the model. chat_template: where that is from, "" for none.
    given_template: the user gave it in place of the model's. read_rate: bytes a second that the
    weights were read with. on_disk: the parameters of which the model has only placeholders.
    streamed: where a model whose decoder layers are on disk puts what does not fit in memory; its
    parameters are unread arrays there (see mlxfun.model.places.LayerStore).
    """

    model: nn.Module
    tokenizer: TokenizerWrapper
    config: dict[str, Any]
    path: Path
    model_id: str
    checkpoint_id: str
    stored_dtypes: dict[str, mx.Dtype]
    notes: tuple[str, ...]
    estimate: int
    files: tuple[Stamp, ...] = ()
    companions: tuple[str, ...] = ()
    chat_template: str = ""
    given_template: bool = False
    read_rate: float = 0.0
    on_disk: frozenset[str] = frozenset()
    streamed: LayersOnDisk | None = None

    @property
    def changed(self) -> str:
        """Which file is not the one that was loaded, as a sentence's beginning; "" for none."""
        return difference(self.path, self.files)


def load(
    source: str | Path,
    revision: str | None = None,
    ctx: Context = SILENT,
    chat_template: Path | None = None,
    identities: Path | None = None,
    held: LeaveOnDisk | LayersOnDisk | None = None,
) -> Loaded:
    """Load `source` (directory, Hub id or "demo") and evaluate what is to be in memory.

    chat_template: used instead of the model's. identities: see `checkpoint_id`. held: None for all
    of it. On the CPU 16-bit weights are cast to float32; each one's own dtype stays on record.
    Raises ModelError (missing, broken, unsupported), BudgetError (does not fit) and Cancelled.
    """
    found = resolve(source, revision, ctx)
    config, files, headers = _checked(found.path)
    identity = checkpoint_id(found.path, identities)
    if held is None:  # else that decides, when the shapes are known
        _require_memory(found.model_id, estimate_bytes(headers, config), config)
    # Before the weights: a tokenizer that is missing is told before gigabytes are read.
    tokenizer, template, remarks = open_tokenizer(found.path, chat_template)
    model, full_config = _load_lazy(found.path, config)
    stored = {path: array.dtype for path, array in flatten(model.parameters())}
    lazy = Lazy(
        model, full_config, headers, files, estimate_bytes(headers, config), needs_float32(model)
    )
    read = _read(lazy, found, held, ctx)
    dropped = _dropped(headers, model)
    streamed = held if isinstance(held, LayersOnDisk) else None
    notes = (*found.notes, *remarks, *_stale_shards(found.path), *dropped)
    notes += tuple(_cast_notes(model, stored)) if lazy.cast else ()
    notes += () if streamed is None else (ON_DISK,)
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        config=_own_config(config, full_config, dropped),
        path=found.path,
        model_id=found.model_id,
        checkpoint_id=identity,
        stored_dtypes=stored,
        notes=notes,
        estimate=read.bytes,
        chat_template=template,
        given_template=chat_template is not None,
        read_rate=read.rate,
        on_disk=read.on_disk,
        streamed=streamed,
        files=files,
        companions=tuple(str(f.relative_to(found.path)) for f in companions(found.path).files),
    )


ON_DISK = (
    "decoder layers stay on disk and are read as they run: every pass reads the model once, an "
    "answer once for each token"
)


def _dropped(headers: list[Header], model: nn.Module) -> tuple[str, ...]:
    """See mlxfun.checkpoint.dropped."""
    sizes = {path: array.size for path, array in flatten(model.parameters())}
    return dropped_notes(headers, sizes, _decoder_layers(sizes))


def _cast_notes(model: nn.Module, stored: dict[str, mx.Dtype]) -> tuple[str, ...]:
    """That 16-bit weights are held in 32, and why; nothing if there are none."""
    if not any(dtype in HALF for dtype in stored.values()):
        return ()
    why = "the only type that MLX's CPU backend routes through experts"
    if not any(isinstance(m, SwitchLinear) for _, m in model.named_modules()):
        why = "in which MLX's CPU backend computes fastest"
    return (f"16-bit weights are held as float32, {why}; saving restores each one's own type",)


def estimate_bytes(headers: list[Header], config: dict[str, Any]) -> int:
    """Resident bytes of a checkpoint, judged from its headers alone."""
    packed, cpu = is_packed(config), on_cpu()
    return sum(
        info.nbytes * times_held(info.dtype, packed, cpu)
        for header in headers
        for info in header.tensors.values()
    )


def _require_supported(config: dict[str, Any], path: Path) -> None:
    require_names(config, path / "config.json")
    try:
        _get_classes(config)
    except LOAD_ERRORS as error:  # AttributeError: the name is that of a module which is no model
        raise ModelError(
            f"{path}: mlx-lm has no architecture for model_type {config['model_type'][:200]!r}; "
            "a newer mlx-lm may"
        ) from error
    except SystemExit as error:  # olmo's module ends the program where it misses a package
        raise ModelError(
            f"{path}: mlx-lm's architecture {config['model_type'][:200]!r} needs a package that is "
            "not installed; `python -c 'import mlx_lm.models."
            f"{config['model_type'][:200]}'` says which"
        ) from error


def _require_sound(config: dict[str, Any], headers: list[Header], path: Path) -> None:
    require_even(headers)
    tensors = sum(len(header.tensors) for header in headers)
    require_sound(config, path / "config.json", tensors)


def _require_memory(model_id: str, estimate: int, config: dict[str, Any]) -> None:
    limit = memory_limit()
    alone = limit is not None and estimate <= limit
    advice = (
        "free the loaded model first with load --drop"
        if alone
        else "read it layer by layer with load --resident none, or choose a smaller or a quantised "
        "version"
    )
    if expert_count(config):
        advice = f"hold only some of its experts with load --resident auto, or {advice}"
    require(estimate, f"loading {model_id}", advice)


def _load_lazy(path: Path, config: dict[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    try:
        with without_wildcards(path) as plain:
            return load_model(plain, lazy=True, strict=True)
    except LOAD_ERRORS as error:
        why = (
            "weights and config.json do not fit each other, or the architecture needs a newer "
            "mlx-lm"
        )
        if packed := packed_elsewhere(path, config):
            raise ModelError(f"{path}: {packed} (it says {short(error)})") from error
        raise ModelError(f"{path} does not load with mlx-lm: {short(error)}; {why}") from error


def short(error: BaseException) -> str:
    """An upstream error in one line, cut to a readable length."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:240]}{'...' if len(text) > 240 else ''}"


def needs_float32(model: nn.Module) -> bool:
    """Whether this model's experts cannot run in 16 bits here; packed ones can."""
    if not on_cpu():
        return False
    modules = [module for _, module in model.named_modules()]
    if any(isinstance(m, SwitchLinear) and m.weight.dtype in HALF for m in modules):
        return True
    return not any("scales" in module for module in modules)


def _checked(path: Path) -> tuple[dict[str, Any], tuple[Stamp, ...], list[Header]]:
    """config.json, the stamps and the headers of a directory that can be loaded."""
    config = read_config(path)
    _require_supported(config, path)
    files = stamps(path)
    headers = read_headers(path)
    _require_sound(config, headers, path)
    return config, files, headers


@dataclass(frozen=True, slots=True)
class _Read:
    """bytes: in memory while the model runs. rate: bytes a second. on_disk: see Loaded."""

    bytes: int
    rate: float = 0.0
    on_disk: frozenset[str] = frozenset()


def _read(
    lazy: Lazy, found: Source, held: LeaveOnDisk | LayersOnDisk | None, ctx: Context
) -> _Read:
    """Read what is to be in memory, which must fit."""
    if isinstance(held, LayersOnDisk):
        unread = layer_parameters(lazy)
        read = _Read(streamed_bytes(lazy, unread))
        _require_memory(found.model_id, read.bytes, lazy.config)
        widen(lazy, unread)
        _evaluate(lazy, unread, ctx)
    else:
        on_disk = frozenset[str]() if held is None else held(lazy)
        if held is not None and not on_disk:
            _require_memory(found.model_id, lazy.estimate, lazy.config)
        set_aside(lazy, on_disk)
        read = _Read(lazy.estimate, _evaluate(lazy, on_disk, ctx), on_disk)
    require_dtypes(lazy.model, lazy.config)
    if changed := difference(found.path, lazy.files):
        raise ModelError(f"{changed} while the model was being loaded; load it again")
    return read


def _evaluate(lazy: Lazy, unread: frozenset[str], ctx: Context) -> float:
    """Evaluate parameter by parameter, so that a cast never holds two copies of the model; bytes a
    second, as held. unread: those that are left as they are."""
    began = perf_counter()
    model, cast = lazy.model, lazy.cast
    arrays = {path: a for path, a in flatten(model.parameters()) if path not in unread}
    names = [(path, array.nbytes) for path, array in arrays.items()]
    total = sum(count for _, count in names)
    done = held = 0
    for path, count in names:
        ctx.check()
        array = arrays.pop(path)
        if cast and array.dtype in HALF:
            array = array.astype(mx.float32)
            model.update(tree_unflatten([(path, array)]))
        try:
            mx.eval(array)
        except (RuntimeError, ValueError) as error:
            raise ModelError(f"{path} cannot be read: {short(error)}") from error
        done, held = done + count, held + array.nbytes
        ctx.progress("load", done, total, "B")
    mx.eval(list(_private_arrays(model)))
    bound_cache()
    return held / max(perf_counter() - began, 1e-9)


def _private_arrays(model: nn.Module) -> Iterator[mx.array]:
    """Arrays that parameters() hides (RoPE frequencies and other underscore attributes).

    MLX streams belong to threads: an array left lazy here would fail when another thread, or a
    later snapshot, first needs it.
    """
    for _, module in model.named_modules():
        hidden = [value for key, value in module.items() if key.startswith("_")]
        for _, value in flatten([hidden, list(vars(module).values())]):
            if isinstance(value, mx.array):
                yield value


def _decoder_layers(paths: dict[str, int]) -> int:
    """One more than the highest layer number among the parameter paths."""
    numbers = [int(piece) for path in paths for piece in path.split(".")[:5] if piece.isdigit()]
    return max(numbers, default=-1) + 1


def _stale_shards(path: Path) -> list[str]:
    named = indexed_files(path)
    extra = sorted({f.name for f in path.glob("model*.safetensors")} - named) if named else []
    if not extra:
        return []
    return [f"{', '.join(extra)} not in the index of {path}, but stock loading reads it too"]


def _own_config(
    raw: dict[str, Any], full: dict[str, Any], dropped: tuple[str, ...]
) -> dict[str, Any]:
    mtp = any("multi-token-prediction" in note for note in dropped)
    config = without_mtp(raw) if mtp else dict(raw)
    if "quantization" in full and "quantization" not in raw:
        config["quantization"] = full["quantization"]
        config["quantization_config"] = full["quantization"]
    return config
