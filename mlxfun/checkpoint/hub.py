"""Downloads a model from the Hugging Face Hub, with progress, cancel, resume and plain errors.

Files land in the Hub's own cache: what was fetched before an interruption is not fetched again,
and a model already there opens without a network.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.errors as hub_errors
from huggingface_hub import snapshot_download

from mlxfun.context import SILENT, Context
from mlxfun.errors import ModelError

# What stock mlx-lm fetches, and the files that a saved model should carry on.
PATTERNS = (
    "*.json", "model*.safetensors", "*.py", "tokenizer.model", "*.tiktoken", "tiktoken.model",
    "*.txt", "*.jsonl", "*.jinja", "LICENSE*", "NOTICE*", "README.md", "*.model",
)  # fmt: skip

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# Absent from some releases of the Hub's client; OSError is caught beside it anyway.
HTTP_ERROR: type[Exception] = getattr(hub_errors, "HTTPError", OSError)


def is_hub_id(source: str) -> bool:
    """Whether `source` is written like OWNER/NAME."""
    return _HUB_ID.fullmatch(source) is not None


def fetch(
    repo: str, revision: str | None = None, ctx: Context = SILENT
) -> tuple[Path, tuple[str, ...]]:
    """The local directory of Hub model `repo`, fetched if need be, and remarks for the user.

    Raises ModelError (gated, missing, wrong revision, no network) and Cancelled.
    """
    bars = _bar_class(repo, ctx)
    try:
        path = _download(repo, revision, bars)
    except (HTTP_ERROR, OSError) as error:
        ctx.check()
        if isinstance(error, hub_errors.HfHubHTTPError | hub_errors.LocalEntryNotFoundError):
            raise ModelError(explain(repo, revision, error)) from error
        path = _cached(repo, revision, error)
        return path, (f"{repo}: the Hub cannot be reached, opened the copy in the local cache",)
    except (hub_errors.HFValidationError, RuntimeError) as error:
        ctx.check()
        raise ModelError(explain(repo, revision, error)) from error
    # A cancel that came while a native download thread swallowed our exception still counts.
    ctx.check()
    if bars.started:
        return path, ()
    return path, (f"{repo}: the Hub cannot be reached, opened the copy in the local cache",)


def _download(repo: str, revision: str | None, bars: Any, local_only: bool = False) -> Path:
    return Path(
        snapshot_download(
            repo,
            revision=revision,
            allow_patterns=list(PATTERNS),
            tqdm_class=bars,
            local_files_only=local_only,
        )
    )


def _cached(repo: str, revision: str | None, cause: Exception) -> Path:
    try:
        return _download(repo, revision, None, local_only=True)
    except OSError as error:
        raise ModelError(explain(repo, revision, cause)) from error


def explain(repo: str, revision: str | None, error: Exception) -> str:
    """One sentence for the user; the order follows the exceptions' inheritance."""
    page = f"https://huggingface.co/{repo}"
    if isinstance(error, hub_errors.GatedRepoError):
        return f"{repo} is gated: ask for access at {page}, then log in with `hf auth login`"
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}; see the branches and tags at {page}"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return (
            f"there is no local directory and no Hub model {repo!r}; check the spelling, or log "
            "in with `hf auth login` if it is private"
        )
    if isinstance(error, hub_errors.IncompleteSnapshotError):
        return f"{repo} is only partly in the local cache and the Hub cannot be reached; try again"
    if isinstance(error, hub_errors.LocalEntryNotFoundError):
        return (
            f"{repo} is not in the local cache and the Hub cannot be reached; check the network "
            "connection and try again, or name a local directory"
        )
    if isinstance(error, hub_errors.HFValidationError):
        return f"{repo!r} is neither a local directory nor a valid Hub id"
    first = (str(error) or repr(error)).splitlines()[0]
    return f"{repo} could not be fetched: {first}"


class _Bar:
    """tqdm's surface, as far as snapshot_download uses it; it does so from several threads.

    Byte bars feed the context's progress; every update may raise Cancelled. `started` tells
    whether any bar was made, which happens only after the Hub has answered.
    """

    started = False
    label: str
    ctx: Context
    lock: threading.Lock

    def __init__(self, iterable: Iterable[Any] | None = None, **options: Any) -> None:
        type(self).started = True
        self.iterable = iterable
        self.total: float | None = options.get("total")
        self.n: float = options.get("initial") or 0
        # Of the two byte bars the one about the network has no true total.
        desc = options.get("desc") or ""
        self.shown = options.get("unit") == "B" and not desc.startswith("Downloading bytes")
        self.format_dict: dict[str, Any] = {"rate": None}

    def update(self, n: float | None = 1) -> None:
        self.ctx.check()
        with self.lock:
            self.n += n or 0
            done, total = int(self.n), int(self.total) if self.total else None
        if self.shown:
            self.ctx.progress(self.label, done, total, "B")

    def __iter__(self) -> Iterator[Any]:
        for item in self.iterable or ():
            yield item
            self.update(1)

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None: ...

    def refresh(self, *_: Any, **__: Any) -> None: ...

    def set_description(self, *_: Any, **__: Any) -> None: ...

    def set_description_str(self, *_: Any, **__: Any) -> None: ...

    def set_postfix_str(self, *_: Any, **__: Any) -> None: ...

    def reset(self, total: float | None = None) -> None:
        self.n, self.total = 0, total


def _bar_class(repo: str, ctx: Context) -> type[_Bar]:
    """A bar class of its own for one download: snapshot_download instantiates it itself."""
    bound = {"label": f"download {repo}", "ctx": ctx, "lock": threading.Lock()}
    return type("Bar", (_Bar,), bound)
