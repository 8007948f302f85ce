"""Models on this machine: those loaded of late, and those in the Hub's cache, with what fits how."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
from huggingface_hub.errors import CacheNotFound

from mlxfun.context import SILENT, Context
from mlxfun.errors import MlxfunError
from mlxfun.files import DOCUMENT_BYTES, read_file, writing
from mlxfun.memory.plan.fit import Machine, fit
from mlxfun.memory.plan.headers import outline
from mlxfun.memory.plan.parts import parts_of
from mlxfun.memory.plan.report import LocalModel, ModelsReport, Origin
from mlxfun.model.device.memory import memory_limit, on_cpu

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo

MOST_RECENT = 20
MOST_LISTED = 200
"""Headers of so many models are read, a few milliseconds each."""


def read_recent(file: Path) -> tuple[str, ...]:
    """What was loaded of late, the newest first; nothing where the file is no list of that."""
    with suppress(OSError, ValueError, MlxfunError):
        found = json.loads(read_file(file, DOCUMENT_BYTES))
        if isinstance(found, list):
            return tuple(one for one in found if isinstance(one, str))[:MOST_RECENT]
    return ()


def note_recent(file: Path, source: str) -> None:
    """Put `source` first in the list. A list that cannot be written is done without."""
    others = [one for one in read_recent(file) if one != source]
    with suppress(OSError, MlxfunError), writing(file) as out:
        out.write(json.dumps([source, *others][:MOST_RECENT], indent=1).encode())


def local_models(recent: Sequence[str], ctx: Context = SILENT) -> ModelsReport:
    """The models that can be loaded without a download, from the headers of their files alone."""
    memory = memory_limit()
    found: dict[str, tuple[Origin, Path | str]] = {"demo": ("included", "demo")}
    for source in recent:
        if Path(source).is_dir():
            found.setdefault(source, ("recent", Path(source)))
    for repo, directory in _cached():
        origin: Origin = "recent" if repo in recent else "Hub cache"
        found.setdefault(repo, (origin, directory))
    listed = list(found.items())[:MOST_LISTED]
    rows = []
    for number, (source, (origin, place)) in enumerate(listed):
        ctx.check()
        ctx.progress("reading headers", number + 1, len(listed), "models")
        rows.append(_described(source, origin, place, memory))
    return ModelsReport(tuple(rows), memory)


def _cached() -> Iterator[tuple[str, Path]]:
    """(Hub id, directory of its newest snapshot) of every whole model in the Hub's cache."""
    try:
        repos = huggingface_hub.scan_cache_dir().repos
    except (CacheNotFound, OSError, ValueError):
        return
    for repo in sorted(repos, key=lambda one: -(one.last_accessed or 0)):
        directory = _snapshot(repo) if repo.repo_type == "model" else None
        if directory is not None:
            yield repo.repo_id, directory


def _snapshot(repo: CachedRepoInfo) -> Path | None:
    for revision in sorted(repo.revisions, key=lambda one: -(one.last_modified or 0)):
        path = Path(revision.snapshot_path)
        if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
            return path
    return None


def _described(source: str, origin: Origin, place: Path | str, memory: int | None) -> LocalModel:
    try:
        parts = parts_of(outline(place), widened=on_cpu())
        if memory is None:
            return LocalModel(source, origin, parts.whole, None, "")
        report = fit(source, parts, Machine(memory))
    except MlxfunError as error:
        return LocalModel(source, origin, 0, None, " ".join(str(error).split())[:120])
    return LocalModel(source, origin, report.whole, report.fit, "")
