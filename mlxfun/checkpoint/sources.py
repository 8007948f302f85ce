"""Resolves what the user typed to a model directory, or says why it is none."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlxfun.context import Context
from mlxfun.data import demo
from mlxfun.errors import ModelError
from mlxfun.files import read_file

DEMO = "demo"
_ADAPTER_FILES = ("adapter_config.json", "adapters.safetensors", "adapter_model.safetensors")


# Weights in any format, what is written anew, and settings of another quantiser.
_NOT_COPIED = re.compile(
    r"\..*|config\.json|hf_quant_config\.json|.*\.index\.json|"
    r".*\.(safetensors|bin|pth|pt|gguf|onnx|h5|msgpack|npz|ckpt|incomplete)"
)
_COPIED_DIRECTORIES = ("additional_chat_templates",)


@dataclass(frozen=True, slots=True)
class Companions:
    """What goes along when a model is saved: tokenizer, templates, licence, processor.

    left_out: names of links to files that do not belong to the model.
    """

    files: tuple[Path, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Source:
    """A resolved model. model_id: Hub id, "demo" or directory name; notes: remarks on the way."""

    path: Path
    model_id: str
    notes: tuple[str, ...] = ()


def resolve(source: str | Path, revision: str | None, ctx: Context) -> Source:
    """The local directory behind `source`: a directory, "demo", or a Hub id (fetched if need be).

    A directory wins over a Hub id of the same spelling; a directory called demo is "./demo".

    Raises ModelError for whatever is none of these, and as `hub.fetch` does.
    """
    text = str(source)
    if source == DEMO:
        return Source(demo.model_path(), DEMO)
    # Not as methods of Path, which raise for names that no file system, or user, has.
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):
        if revision is not None:
            raise ModelError(f"--revision {revision} needs a Hub id, and {text} is a directory")
        return Source(path, path.resolve().name)
    if os.path.exists(path):
        raise ModelError(f"{text} is a file; name the directory that holds config.json")
    # The Hub's client costs half a second to import, so only a plausible id pays for it.
    if isinstance(source, str) and text.count("/") == 1:
        from mlxfun.checkpoint import hub

        if hub.is_hub_id(text):
            fetched, notes = hub.fetch(text, revision, ctx)
            return Source(fetched, text, notes)
    raise ModelError(
        f"no such model directory: {text}; name a directory, a Hub id OWNER/NAME, or 'demo'"
    )


def read_config(path: Path) -> dict[str, Any]:
    """config.json of a model directory, exactly as written.

    Raises ModelError for a directory that is not a model, is a LoRA adapter, or needs its own code.
    """
    file = path / "config.json"
    _require_ordinary(path)
    if not file.exists():
        adapter = next((name for name in _ADAPTER_FILES if (path / name).exists()), None)
        if adapter is not None:
            raise ModelError(
                f"{path} is a LoRA adapter ({adapter}), not a model; merge it into its base "
                "model with `mlx_lm.fuse` and load the result"
            )
        raise ModelError(f"{path} is not a model directory: it has no config.json")
    try:
        config = json.loads(read_file(file))
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise ModelError(
            f"{file}:{error.lineno}:{error.colno} is not valid JSON ({error.msg}); "
            "restore the file from the model's source"
        ) from error
    except (ValueError, RecursionError) as error:  # no UTF-8, or a number of thousands of digits
        raise ModelError(f"{file} is not a JSON text; restore it from its source") from error
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise ModelError(f"{file} names no model_type, so it does not describe a language model")
    if config.get("model_file") is not None:
        raise ModelError(
            f"{path} wants to run its own code ({config['model_file']}), which mlxfun never does; "
            "use a model whose architecture mlx-lm knows"
        )
    return config


def _require_ordinary(path: Path) -> None:
    """Raise ModelError for a pipe or a device in a model directory: its readers would wait for it."""
    for file in sorted(path.iterdir()):
        if file.exists() and not file.is_file() and not file.is_dir():
            raise ModelError(
                f"{file} is a pipe or a device, which no model has; take it out of the directory"
            )


def companions(source: Path) -> Companions:
    """The files of a model directory that are not weights, index or config, in a stable order.

    A link is followed where it stays in the directory, in the Hub's cache that the directory is
    part of, or in the directory where the model's configuration and weights really are: a model
    from somewhere else must not bring a person's other files into what they publish.
    """
    own = _own_places(source)
    files, left_out = [], []
    for path in _beside_weights(source):
        real = Path(os.path.realpath(path))
        if any(real.is_relative_to(place) for place in own):
            files.append(path)
        else:
            left_out.append(str(path.relative_to(source)))
    return Companions(tuple(files), tuple(left_out))


def _beside_weights(source: Path) -> Iterator[Path]:
    for path in sorted(source.iterdir()):
        if path.is_file() and not _NOT_COPIED.fullmatch(path.name):
            yield path
    for name in _COPIED_DIRECTORIES:
        yield from (path for path in sorted((source / name).rglob("*")) if path.is_file())


def _own_places(source: Path) -> list[Path]:
    real = Path(os.path.realpath(source))
    places = [real]
    if real.parent.name == "snapshots":
        places.append(real.parent.parent / "blobs")
    files = [source / "config.json", *source.glob("model*.safetensors")]
    behind = {Path(os.path.realpath(file)).parent for file in files}
    if len(behind) == 1:
        places += behind
    return places
