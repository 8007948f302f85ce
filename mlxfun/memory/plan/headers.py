"""Names and sizes of a checkpoint's tensors: of a directory, or of a Hub model by range requests.

Of a model on the Hub only the headers of its files and config.json are fetched, a few hundred
kilobytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import huggingface_hub.errors as hub_errors

from mlxfun.checkpoint.headers import read_headers
from mlxfun.checkpoint.hub import HTTP_ERROR, explain, is_hub_id
from mlxfun.checkpoint.sources import read_config
from mlxfun.data import demo
from mlxfun.errors import ModelError

CONFIG_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor on disk. dtype: as safetensors files name it."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True)
class Outline:
    """A checkpoint without its weights. directory: where it is, None for one on the Hub."""

    model: str
    entries: tuple[Entry, ...]
    config: Mapping[str, Any]
    directory: Path | None


def outline(source: str | Path, revision: str | None = None) -> Outline:
    """The outline of a directory, of "demo", or of a Hub id, of which nothing is downloaded but
    headers. Raises ModelError."""
    path = demo.model_path() if source == "demo" else Path(source).expanduser()
    if path.is_dir():
        entries = tuple(
            Entry(name, info.dtype, info.shape, info.nbytes)
            for header in read_headers(path)
            for name, info in header.tensors.items()
        )
        return Outline(str(source), entries, read_config(path), path)
    if isinstance(source, Path) or not is_hub_id(source):
        raise ModelError(
            f"{source} is no directory, and no model of the Hub is named so: give a path, or "
            "OWNER/NAME"
        )
    return _on_hub(source, revision)


def _on_hub(repo: str, revision: str | None) -> Outline:
    try:
        found = huggingface_hub.get_safetensors_metadata(repo, revision=revision)
        file = huggingface_hub.hf_hub_download(repo, "config.json", revision=revision)
        text = Path(file).read_bytes()[:CONFIG_BYTES]
        config = json.loads(text)
    except (hub_errors.NotASafetensorsRepoError, ValueError) as error:
        raise ModelError(
            f"{repo} has no safetensors files that could be looked at ({_short(error)}); take a "
            "version of the model that has"
        ) from error
    except (HTTP_ERROR, hub_errors.HFValidationError, OSError) as error:
        raise ModelError(explain(repo, revision, error)) from error
    if not isinstance(config, dict):
        raise ModelError(f"{repo}: config.json holds no JSON object, so it is no model")
    entries = tuple(
        Entry(name, str(info.dtype), tuple(info.shape), info.data_offsets[1] - info.data_offsets[0])
        for part in found.files_metadata.values()
        for name, info in part.tensors.items()
    )
    return Outline(repo, entries, config, None)


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
