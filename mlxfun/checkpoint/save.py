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
from typing import Any, Protocol

from mlxfun.checkpoint.card import Card, base_card_name
from mlxfun.checkpoint.gate import LogitsFn, Source, Weights, check, forward
from mlxfun.checkpoint.headers import weight_files
from mlxfun.checkpoint.load import short
from mlxfun.checkpoint.options import SaveOptions
from mlxfun.checkpoint.replacing import atomic, replaceable
from mlxfun.checkpoint.replacing.shards import identity_of, write_shards
from mlxfun.checkpoint.replacing.unfinished import Ledger, recorded
from mlxfun.checkpoint.reports import SaveReport
from mlxfun.checkpoint.requantize import Requantised, describe_quantization, packed_so
from mlxfun.checkpoint.sources import Companions, companions, has_wildcards
from mlxfun.context import SILENT, Context
from mlxfun.errors import BudgetError, SaveError, UsageError
from mlxfun.text import readable_bytes

_TOKENIZER = re.compile(
    r"tokenizer.*|.*token.*\.json|vocab\..*|merges\.txt|.*\.(model|tiktoken|jinja)"
)
# Files of which a saved tokenizer has the content elsewhere, and the card that is written anew.
_REPLACED = ("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt")
# Room for headers, metadata and the file system's own bookkeeping.
_DISK_MARGIN = 16 << 20


class SavedTokenizer(Protocol):
    """A tokenizer in memory that can be written, as transformers does."""

    def save_pretrained(self, directory: str) -> Any: ...


@dataclass(frozen=True, slots=True)
class Export:
    """A model ready to be written.

    weights: its tensors, pruned experts gone. config: the dictionary for config.json. source: the
    directory it was loaded from. metadata: {file name: JSON-able}. recipe: command lines that made
    it. scores: {measure: value} for the card. experts: per layer, as saved. logits: int32 [1, T]
    tokens -> logits of the resident model, for the gate. changed: that the source is not what was
    loaded any more, as a sentence's beginning, "" if it is; then nothing is taken from it, the
    tokenizer comes from memory, and companions names the files that the source had. chat_template:
    one that the user gave in place of the model's, which is saved with it. identity: of the weights
    and of the files they are read from, "" for unknown: what a killed save has finished is not taken
    over then.
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
    changed: str = ""
    tokenizer: SavedTokenizer | None = None
    companions: tuple[str, ...] = ()
    chat_template: str | None = None
    identity: str = ""


WILDCARDS = (
    "mlx_lm.load finds no weights by this whole path, since a directory of it has [, * or ? in its "
    "name: load it by a relative path, or move it"
)
AS_IT_IS = "the model is packed in this mode already: what was not edited is saved as it is"


def write(export: Export, options: SaveOptions, ctx: Context = SILENT) -> SaveReport:
    """Write, check and publish a model; see the module docstring.

    Raises SaveError (a refused place, a failed write or gate), BudgetError (disk space),
    UsageError (quantisation that does not exist) and Cancelled. In each case the destination is
    as it was before.
    """
    if options.max_shard_bytes < 1:
        raise UsageError(f"shards of {options.max_shard_bytes} bytes hold nothing")
    target, seen = checked_target(export.source, options)
    weights, config, logits = _as_asked(export, options)
    total = sum(weights.nbytes(name) for name in weights.names)
    with failures(target), beside(target) as temporary:
        found = _found(export)
        needed = total + sum(file.stat().st_size for file in found.files)
        ledger = _ledger(temporary, target, weights, (export, options), needed)
        _copy(found.files, export.source, temporary)
        lost = _from_memory(temporary, found.left_out, export.tokenizer)
        if export.chat_template is not None:
            (temporary / "chat_template.jinja").write_text(export.chat_template, encoding="utf-8")
        write_shards(temporary, weights, options.max_shard_bytes, ledger, ctx)
        _write_json(temporary / "config.json", _cleaned(config, weights.names))
        for name, content in export.metadata.items():
            _require_finite(name, content)
            _write_json(temporary / name, content)
        base = temporary / base_card_name([file.name for file in found.files])
        _write_card(temporary, target.name, export, config, (total, base))
        atomic.sync_tree(temporary)
        gate = check(temporary, weights, Source(export.source, export.changed), logits, ctx)
        ctx.check()
        ledger.close()
        files = tuple(sorted(str(f.relative_to(temporary)) for f in _all_files(temporary)))
        size = sum((temporary / name).stat().st_size for name in files)
        replaceable.keep_git(target, temporary)
        atomic.commit(temporary, target, seen)
    return SaveReport(
        path=str(target),
        bytes=size,
        files=files,
        experts=export.experts,
        quantization=describe_quantization(config),
        gate=gate,
        notices=(
            *_notices(export, found.left_out, lost),
            *_remarks(export, options, target),
            *_went_on(ledger.taken, total),
        ),
    )


def _as_asked(
    export: Export, options: SaveOptions
) -> tuple[Weights, dict[str, Any], LogitsFn | None]:
    """What is written and compared: the weights as they are, or packed."""
    weights, config, logits = export.weights, export.config, export.logits
    plan = options.bits
    if plan is None and (options.quantize is None or packed_so(config, options.mode)):
        return weights, config, logits
    if plan is not None:
        packed = Requantised(weights, config, plan.usual, plan.group_size, plan=plan)
    else:
        bits = options.quantize or 0
        packed = Requantised(weights, config, bits, options.group_size, options.mode)
    return packed, packed.config, None if logits is None else _requantised_logits(packed)


def _made_of(export: Export, options: SaveOptions) -> str:
    """What decides about the bytes of the weights, "" where that is not known."""
    if not export.identity or export.changed:
        return ""
    packing = (options.quantize, options.mode, options.group_size, options.bits)
    return f"{export.identity} {packing}"


def _ledger(
    temporary: Path,
    target: Path,
    weights: Weights,
    asked: tuple[Export, SaveOptions],
    needed: int,
) -> Ledger:
    """The finished files of weights, with those that a killed save has left. Raises BudgetError if
    the rest of `needed` bytes is not free, before anything of those is touched."""
    identity = identity_of(weights, asked[1].max_shard_bytes, _made_of(*asked))
    ledger = Ledger(temporary, identity)
    require_space(target, needed - ledger.there(target))
    ledger.take_over(target)
    return ledger


def _went_on(taken: int, total: int) -> list[str]:
    """That a killed save was continued."""
    if not taken:
        return []
    return [
        f"{readable_bytes(taken)} of {readable_bytes(total)} were taken over from a save like this "
        "one that was broken off, and compared like the rest"
    ]


@contextlib.contextmanager
def failures(target: Path) -> Iterator[None]:
    """Raise SaveError for whatever the file system refuses inside the block."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        raise SaveError(f"{target} could not be written: {short(error)}") from error


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A temporary sibling of `target`, gone afterwards together with parents made for it."""
    made = [parent for parent in target.parents if not parent.exists()]
    temporary = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        going_on = set(atomic.abandoned_saves(target))
        atomic.sweep(target.parent, lambda path: path in going_on and recorded(path))
        temporary = atomic.temporary_sibling(target)
        yield temporary
    finally:
        # After a commit nothing is left under the temporary name, and the parents are not empty.
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)
        for parent in made:
            with contextlib.suppress(OSError):
                parent.rmdir()


# --- before the first byte -------------------------------------------------------------------


def checked_target(source: Path, options: SaveOptions) -> tuple[Path, atomic.Seen]:
    """The resolved destination, and what was seen there. Raises SaveError for a place that must not
    be written to."""
    try:
        return _checked_target(source, options)
    except (OSError, RuntimeError) as error:  # a name that no file system takes, a loop of links
        raise SaveError(f"{options.path} could not be written: {short(error)}") from error


def _checked_target(source: Path, options: SaveOptions) -> tuple[Path, atomic.Seen]:
    if has_wildcards(options.path):
        raise SaveError(
            f"{options.path}: mlx_lm.load finds no weights in a directory whose name holds [, * or "
            "?; choose another name"
        )
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
        return target, ()
    if not target.is_dir():
        raise SaveError(f"{options.path} is a file; name a directory")
    # Before it is judged, so that what comes into it afterwards is noticed.
    seen = atomic.look(target)
    if seen or any(target.iterdir()):
        _check_replaceable(source, target, options)
    return target, seen


def _check_replaceable(source: Path, target: Path, options: SaveOptions) -> None:
    if not options.force:
        raise SaveError(f"{options.path} is not empty; choose another place or add --force")
    here = Path.cwd()
    if target == here or target in here.parents:
        raise SaveError(
            f"{options.path} is or holds the current directory, which --force would replace; run "
            "the shell from elsewhere"
        )
    rewritten = {}
    if source.is_dir():
        rewritten = {str(file.relative_to(source)): file for file in companions(source).files}
    replaceable.require(target, options.path, rewritten)


def require_space(target: Path, needed: int) -> None:
    """Raise BudgetError unless `needed` bytes are free on the disk of `target`."""
    place = next(parent for parent in target.parents if parent.exists())
    free = shutil.disk_usage(place).free
    if needed + _DISK_MARGIN > free:
        raise BudgetError(
            f"saving to {target} needs {readable_bytes(needed + _DISK_MARGIN)} of disk space and "
            f"{readable_bytes(free)} is free; make room or choose another disk"
        )


def _requantised_logits(packed: Requantised) -> LogitsFn:
    return lambda tokens: forward(packed.build()[0], tokens)


# --- companions: tokenizer, templates, licence, processor ------------------------------------


def _found(export: Export) -> Companions:
    """What goes along with the model from its directory; nothing, if that holds another by now."""
    if export.changed:
        return Companions((), export.companions)
    return companions(export.source)


def _from_memory(
    directory: Path, left: Sequence[str], tokenizer: SavedTokenizer | None
) -> tuple[str, ...]:
    """Write the tokenizer where its files could not be copied; the names of those that are lost."""
    if tokenizer is not None and any(_TOKENIZER.fullmatch(name) for name in left):
        aside = directory / "tokenizer-from-memory"
        tokenizer.save_pretrained(str(aside))
        for file in aside.iterdir():
            if not (directory / file.name).exists():
                file.rename(directory / file.name)
        shutil.rmtree(aside)
    return tuple(name for name in left if not (directory / name).exists())


def _notices(export: Export, left: Sequence[str], lost: Sequence[str]) -> tuple[str, ...]:
    said = []
    if export.changed:
        said.append(
            f"{export.changed} since the model was loaded from it: weights, configuration and "
            "tokenizer are saved as they are in memory"
        )
    elif left:
        said.append(
            f"not copied, since they are links that lead out of the model's directory: "
            f"{', '.join(left)}"
        )
    missing = [name for name in lost if name not in _REPLACED]
    if export.changed and missing:
        said.append(f"not saved, since they are in no other place: {', '.join(missing)}")
    return tuple(said)


def _remarks(export: Export, options: SaveOptions, target: Path) -> list[str]:
    """What users should know of how and where it was saved."""
    as_it_is = options.quantize is not None and packed_so(export.config, options.mode)
    return ([AS_IT_IS] if as_it_is else []) + ([WILDCARDS] if has_wildcards(target) else [])


def _copy(files: Sequence[Path], source: Path, destination: Path) -> None:
    card = base_card_name([file.name for file in files if file.parent == source])
    for file in files:
        relative = file.relative_to(source)
        # Our own card takes the name README.md.
        name = Path(card) if str(relative) == "README.md" else relative
        (destination / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, destination / name)


# --- contents --------------------------------------------------------------------------------


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
    directory: Path, name: str, export: Export, config: dict[str, Any], made: tuple[int, Path]
) -> None:
    """made: bytes of all weights, and where the card of the source was put."""
    total, base = made
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
