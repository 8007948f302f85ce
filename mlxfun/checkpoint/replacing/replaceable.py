"""What `save --force` may overwrite: a directory with a model and files that come with models.

A directory is replaced whole. Whatever in it is not recognised as part of a checkpoint may be
somebody's only copy, so it is named and the save refused. What belongs to git stays: a clone goes
on being one.
"""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from mlxfun.checkpoint.replacing import atomic
from mlxfun.errors import SaveError

_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pth|pt|gguf|onnx|onnx_data|h5|msgpack|ckpt)|weights.*\.npz",
    re.IGNORECASE,
)
_COMPANIONS = re.compile(
    r".*config\.json|tokenizer.*|(special_tokens_map|added_tokens|special_tokens)\.json|"
    r"vocab\.(json|txt|bpe)|merges\.txt|.*\.(model|tiktoken|jinja)|chat_template.*\.json|"
    r"(params|tekken|model_index|dtypes|configuration|trainer_state|quant_log)\.json|"
    r".*\.index\.json|.*_metadata\.json|(all|eval|train)_results\.json|"
    r"(modeling|configuration|tokenization|processing|image_processing|video_processing|"
    r"feature_extraction|preprocessing)_.*\.py|__init__\.py|SYSTEM_PROMPT\.txt|requirements\.txt|"
    r"(README|LICENSE|LICENCE|NOTICE|COPYING|CITATION|CHANGELOG|MODEL_?CARD|SECURITY|.*POLICY)"
    r"([._-].*)?|.*\.(png|jpe?g|gif|webp|svg|pdf|mp4)|"
    r"\.(gitattributes|gitignore|gitmodules|DS_Store|mdl|msc|mv)",
    re.IGNORECASE,
)
_DIRECTORIES = (
    "additional_chat_templates", "assets", "figures", "figs", "images", "img", "original", "metal",
    "onnx",
)  # fmt: skip
# Made anew when they are missed.
_CACHES = (".cache/huggingface", "__pycache__")
_GIT = (".git", ".gitattributes", ".gitignore", ".gitmodules")


def require(target: Path, shown: Path, rewritten: Mapping[str, Path]) -> None:
    """Raise SaveError unless `target`, a directory, can be replaced without losing anything else.

    shown: the directory as the user named it. rewritten: {relative name: file} of what the save
    writes again; such a file is no loss where it is the same.
    """
    if not _is_model(target):
        # --force replaces a whole directory: it must not cost anybody their home.
        raise SaveError(
            f"{shown} is not empty and holds no model, so --force does not replace it; "
            "choose another place"
        )
    foreign = sorted(_foreign(target, "", rewritten))
    if foreign:
        more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
        raise SaveError(
            f"{shown} holds {', '.join(foreign[:5])}{more} beside the model, which --force would "
            "delete; move it away, or choose another place"
        )


def _is_model(directory: Path) -> bool:
    """Whether a config.json names an architecture and weights lie beside it."""
    try:
        config = json.loads((directory / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    named = isinstance(config, dict) and isinstance(config.get("model_type"), str)
    return named and any(_WEIGHTS.fullmatch(f.name) and f.is_file() for f in directory.iterdir())


def _foreign(directory: Path, inside: str, rewritten: Mapping[str, Path]) -> Iterator[str]:
    """Names, relative to the model, of what a checkpoint does not have."""
    for path in directory.iterdir():
        name = f"{inside}{path.name}"
        if not path.is_dir():
            known = _WEIGHTS.fullmatch(path.name) or _COMPANIONS.fullmatch(path.name)
            if not known and not _same(path, rewritten.get(name)):
                yield name
        elif path.is_symlink():
            yield name
        elif name in _CACHES or (not inside and name in _GIT):
            continue
        elif not inside and name in (*_DIRECTORIES, ".cache"):
            yield from _foreign(path, f"{name}/", rewritten)
        else:
            yield name


def _same(path: Path, other: Path | None) -> bool:
    return other is not None and path.is_file() and filecmp.cmp(path, other, shallow=False)


def keep_git(target: Path, temporary: Path) -> None:
    """Take what belongs to git in `target` along into the directory that replaces it.

    Files are linked rather than copied, since the objects of a model's repository are as large as
    the model; `target` stays whole until it is replaced. Raises OSError.
    """
    for name in _GIT:
        old, new = target / name, temporary / name
        if old.is_dir() and not old.is_symlink():
            shutil.copytree(old, new, symlinks=True, copy_function=_link)
            atomic.sync_tree(new)
        elif old.is_file():
            shutil.copy2(old, new)


def _link(source: str, destination: str) -> None:
    try:
        os.link(source, destination)
    except OSError:  # a file system without links
        shutil.copy2(source, destination)
