"""Writes a model that stock `mlx_lm.load` opens: complete and verified, or not at all.

Everything that can be refused is refused before the first byte. The model is written to a hidden
sibling directory, flushed, put through the gate there, and only then given its name.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlxfun.checkpoint import atomic, replaceable
from mlxfun.checkpoint.card import BASE_CARD, Card
from mlxfun.checkpoint.gate import LogitsFn, Weights, check, forward
from mlxfun.checkpoint.headers import INDEX, weight_files
from mlxfun.checkpoint.load import short
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.checkpoint.plain_path import has_wildcards
from mlxfun.checkpoint.reports import SaveReport
from mlxfun.checkpoint.requantize import Requantised, describe_quantization
from mlxfun.context import SILENT, Context
from mlxfun.errors import BudgetError, SaveError, UsageError
from mlxfun.text import readable_bytes

# Weights in any format, what is written anew, and settings of another quantiser.
_NOT_COPIED = re.compile(
    r"\..*|config\.json|hf_quant_config\.json|.*\.index\.json|"
    r".*\.(safetensors|bin|pth|pt|gguf|onnx|h5|msgpack|npz|ckpt|incomplete)"
)
_COPIED_DIRECTORIES = ("additional_chat_templates",)
# Room for headers, metadata and the file system's own bookkeeping.
_DISK_MARGIN = 16 << 20


@dataclass(frozen=True, slots=True)
class Export:
    """A model ready to be written.

    weights: its tensors, pruned experts gone. config: the dictionary for config.json. source: the
    directory it was loaded from. metadata: {file name: JSON-able}. recipe: command lines that made
    it. scores: {measure: value} for the card. experts: per layer, as saved. logits: int32 [1, T]
    tokens -> logits of the resident model, for the gate.
    """

    weights: Weights
    config: dict[str, Any]
    source: Path
    model_id: str
    checkpoint_id: str
    experts: int
    metadata: dict[str, Any] = field(default_factory=dict)
    recipe: Sequence[str] = ()
    scores: dict[str, float] = field(default_factory=dict)
    logits: LogitsFn | None = None


def write(export: Export, options: SaveOptions, ctx: Context = SILENT) -> SaveReport:
    """Write, check and publish a model; see the module docstring.

    Raises SaveError (a refused place, a failed write or gate), BudgetError (disk space),
    UsageError (quantisation that does not exist) and Cancelled. In each case the destination is
    as it was before.
    """
    if has_wildcards(options.path):
        raise SaveError(
            f"{options.path}: mlx_lm.load finds no weights in a directory whose name holds [, * or "
            "?; choose another name"
        )
    if options.max_shard_bytes < 1:
        raise UsageError(f"shards of {options.max_shard_bytes} bytes hold nothing")
    try:
        target = _checked_target(export.source, options)
    except (OSError, RuntimeError) as error:  # a name that no file system takes, a loop of links
        raise SaveError(f"{options.path} could not be written: {short(error)}") from error
    weights, config, logits = export.weights, export.config, export.logits
    if options.quantize is not None:
        packed = Requantised(weights, config, options.quantize, options.group_size)
        weights, config = packed, packed.config
        logits = None if logits is None else _requantised_logits(packed)
    total = sum(weights.nbytes(name) for name in weights.names)
    with _beside(target) as temporary:
        companions = list(_companions(export.source))
        _require_space(target, total + sum(file.stat().st_size for file in companions))
        _copy(companions, export.source, temporary)
        _write_weights(temporary, weights, options.max_shard_bytes, ctx)
        _write_json(temporary / "config.json", _cleaned(config, weights.names))
        for name, content in export.metadata.items():
            _require_finite(name, content)
            _write_json(temporary / name, content)
        _write_card(temporary, target.name, export, config, total)
        atomic.sync_tree(temporary)
        gate = check(temporary, weights, export.source, logits, ctx)
        ctx.check()
        files = tuple(sorted(str(f.relative_to(temporary)) for f in _all_files(temporary)))
        size = sum((temporary / name).stat().st_size for name in files)
        replaceable.keep_git(target, temporary)
        atomic.commit(temporary, target)
    return SaveReport(
        path=str(target),
        bytes=size,
        files=files,
        experts=export.experts,
        quantization=describe_quantization(config),
        gate=gate,
    )


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Path]:
    """A temporary sibling of `target`, gone afterwards together with parents made for it.

    Raises SaveError for whatever the file system refuses inside the block.
    """
    made = [parent for parent in target.parents if not parent.exists()]
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        atomic.sweep(target.parent)
        temporary = atomic.temporary_sibling(target)
        yield temporary
    except (OSError, RuntimeError) as error:
        raise SaveError(f"{target} could not be written: {short(error)}") from error
    finally:
        # After a commit nothing is left under the temporary name, and the parents are not empty.
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


# --- before the first byte -------------------------------------------------------------------


def _checked_target(source: Path, options: SaveOptions) -> Path:
    """The resolved destination. Raises SaveError for a place that must not be written to."""
    target = options.path.expanduser().resolve()
    origin = source.resolve()
    if target == origin or target in origin.parents or origin in target.parents:
        relation = (
            "is" if target == origin else "lies inside" if origin in target.parents else ("holds")
        )
        raise SaveError(
            f"{options.path} {relation} the directory the model was loaded from ({origin}); "
            "choose another place"
        )
    if any(target in file.resolve().parents for file in weight_files(source)):
        raise SaveError(f"{options.path} holds the files that {source} links to; choose another")
    if not target.exists():
        return target
    if not target.is_dir():
        raise SaveError(f"{options.path} is a file; name a directory")
    if any(target.iterdir()):
        _check_replaceable(source, target, options)
    return target


def _check_replaceable(source: Path, target: Path, options: SaveOptions) -> None:
    if not options.force:
        raise SaveError(f"{options.path} is not empty; choose another place or add --force")
    here = Path.cwd()
    if target == here or target in here.parents:
        raise SaveError(
            f"{options.path} is or holds the current directory, which --force would replace; run "
            "the shell from elsewhere"
        )
    rewritten = {str(file.relative_to(source)): file for file in _companions(source)}
    replaceable.require(target, options.path, rewritten)


def _require_space(target: Path, needed: int) -> None:
    place = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if needed + _DISK_MARGIN > free:
        raise BudgetError(
            f"saving to {target} needs {readable_bytes(needed + _DISK_MARGIN)} of disk space and "
            f"{readable_bytes(free)} is free; make room or choose another disk"
        )


def _requantised_logits(packed: Requantised) -> LogitsFn:
    return lambda tokens: forward(packed.build()[0], tokens, whole=False)


# --- companions: tokenizer, templates, licence, processor ------------------------------------


def _companions(source: Path) -> Iterator[Path]:
    """Files of the source that are not weights, index or config, in a stable order."""
    for path in sorted(source.iterdir()):
        if path.is_file() and not _NOT_COPIED.fullmatch(path.name):
            yield path
    for name in _COPIED_DIRECTORIES:
        yield from (path for path in sorted((source / name).rglob("*")) if path.is_file())


def _copy(files: list[Path], source: Path, destination: Path) -> None:
    for file in files:
        relative = file.relative_to(source)
        # Our own card takes the name README.md.
        name = Path(BASE_CARD) if str(relative) == "README.md" else relative
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, destination / name)


# --- contents --------------------------------------------------------------------------------


def plan_shards(weights: Weights, limit: int) -> list[list[str]]:
    """Names per file: in order, each file within `limit` bytes unless one tensor exceeds it."""
    shards: list[list[str]] = []
    size = 0
    for name in weights.names:
        count = weights.nbytes(name)
        if not shards or size + count > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += count
    return shards


def _write_weights(directory: Path, weights: Weights, limit: int, ctx: Context) -> None:
    shards = plan_shards(weights, limit)
    total = sum(weights.nbytes(name) for name in weights.names)
    index: dict[str, str] = {}
    done = 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        if len(shards) == 1:
            file = "model.safetensors"
        tensors = {}
        for name in names:
            ctx.check()
            tensors[name] = weights.tensor(name)
            mx.eval(tensors[name])
            done += weights.nbytes(name)
            ctx.progress("save", done, total, "B")
            index[name] = file
        mx.save_safetensors(str(directory / file), tensors, metadata={"format": "mlx"})
    document = {
        "metadata": {"total_size": total},
        "weight_map": {name: index[name] for name in sorted(index)},
    }
    _write_json(directory / INDEX, document)


def _cleaned(config: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The config without the settings of a quantisation that loading undid."""
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    packed = "quantization" in config or method == "bitnet"
    if packed or any(name.endswith(".scales") for name in names):
        return config
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _require_finite(name: str, content: Any) -> None:
    """Metadata is read by other tools, most of which know no NaN; some configs do have infinity."""
    try:
        json.dumps(content, allow_nan=False)
    except ValueError as error:
        raise SaveError(f"{name} would hold NaN or infinity; undo the edit it tells of") from error


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_card(
    directory: Path, name: str, export: Export, config: dict[str, Any], total: int
) -> None:
    base = directory / BASE_CARD
    card = Card(
        name=name,
        model_id=export.model_id,
        checkpoint_id=export.checkpoint_id,
        recipe=export.recipe,
        scores=export.scores,
        experts=export.experts,
        quantization=describe_quantization(config),
        total_bytes=total,
        base_card=base if base.exists() else None,
    )
    (directory / "README.md").write_text(card.render(), encoding="utf-8")


def _all_files(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]
