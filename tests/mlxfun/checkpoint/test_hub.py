"""The Hub, with its client mocked: progress, cancel, offline and plain errors."""

from __future__ import annotations

import concurrent.futures
from pathlib import Path
from typing import Any

import huggingface_hub.errors as hub_errors
import pytest

from mlxfun.checkpoint import hub, load
from mlxfun.context import Context
from mlxfun.data import demo
from mlxfun.errors import Cancelled, ModelError


class Watch(Context):
    def __init__(self) -> None:
        self.seen: list[tuple[str, int, int | None, str]] = []
        self.stop_after: int | None = None

    def progress(self, label: str, done: int, total: int | None = None, unit: str = "") -> None:
        self.seen.append((label, done, total, unit))

    def check(self) -> None:
        if self.stop_after is not None and len(self.seen) >= self.stop_after:
            raise Cancelled("cancelled")


def http_error(kind: type[Exception], **fields: Any) -> Exception:
    error = kind.__new__(kind)
    error.args = ("500 Server Error",)
    return error


def pretend(monkeypatch: pytest.MonkeyPatch, download: Any) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []

    def snapshot_download(repo: str, **options: Any) -> str:
        calls.append({"repo": repo, **options})
        return str(download(**options))

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return calls


def downloading(tqdm_class: Any, **_: Any) -> Path:
    """Drive the bars as the client does: two byte bars, a file counter, worker threads."""
    network = tqdm_class(desc="Downloading bytes", total=0, initial=0, unit="B", unit_scale=True)
    disk = tqdm_class(desc="Reconstructing (incomplete total...)", total=0, unit="B")
    disk.total += 300

    def one(_: int) -> None:
        network.update(90)
        disk.update(100)
        disk.set_postfix_str(str(disk.format_dict.get("rate")), refresh=False)

    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(one, i) for i in range(3)]
        with tqdm_class(futures, desc="Fetching 3 files", total=3) as files:
            for future in files:
                future.result()
    network.close()
    disk.set_description("Reconstruction complete")
    disk.refresh()
    return demo.model_path()


def test_a_hub_model_loads_with_progress_revision_and_the_usual_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = pretend(monkeypatch, downloading)
    watch = Watch()
    loaded = load.load("some/moe", "v2", watch)
    assert loaded.model_id == "some/moe"
    assert not any("Hub" in note for note in loaded.notes)
    downloads = sorted(p for p in watch.seen if p[0] != "load")
    assert downloads == [("download some/moe", n, 300, "B") for n in (100, 200, 300)]
    (call,) = calls
    assert (call["repo"], call["revision"]) == ("some/moe", "v2")
    assert {"model*.safetensors", "*.json", "LICENSE*", "README.md", "*.jinja"} <= set(
        call["allow_patterns"]
    )


def test_a_cancel_stops_the_download_at_the_next_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, downloading)
    watch = Watch()
    watch.stop_after = 1
    with pytest.raises(Cancelled):
        hub.fetch("some/moe", None, watch)
    assert len(watch.seen) <= 3


def test_a_cancel_swallowed_by_the_client_still_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch()
    watch.stop_after = 0

    def swallow(**_: Any) -> Path:
        raise RuntimeError("callback failed")

    pretend(monkeypatch, swallow)
    with pytest.raises(Cancelled):
        hub.fetch("some/moe", None, watch)


def test_the_cached_copy_is_used_and_said_when_the_hub_is_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Without a network the client returns the cached snapshot without making any progress bar.
    pretend(monkeypatch, lambda **_: demo.model_path())
    path, notes = hub.fetch("some/moe")
    assert path == demo.model_path()
    assert notes == ("some/moe: the Hub cannot be reached, opened the copy in the local cache",)


def test_a_connection_error_falls_back_to_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    def proxy_fails(local_files_only: bool, **_: Any) -> Path:
        if not local_files_only:
            raise ConnectionError("proxy refused")
        return demo.model_path()

    calls = pretend(monkeypatch, proxy_fails)
    path, notes = hub.fetch("some/moe", "v2")
    assert (path, len(notes)) == (demo.model_path(), 1)
    assert [(c["local_files_only"], c["revision"]) for c in calls] == [(False, "v2"), (True, "v2")]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            http_error(hub_errors.GatedRepoError),
            r"some/moe is gated: ask.*huggingface\.co/some/moe",
        ),
        (
            http_error(hub_errors.RepositoryNotFoundError),
            "no Hub model 'some/moe'; check the spell",
        ),
        (http_error(hub_errors.RevisionNotFoundError), "some/moe has no revision 'v9'"),
        (hub_errors.LocalEntryNotFoundError("x"), "is not in the local cache and the Hub cannot"),
        (
            hub_errors.IncompleteSnapshotError("x", snapshot_path="y"),
            "only partly in the local cache",
        ),
        (http_error(hub_errors.HfHubHTTPError), "could not be fetched: 500 Server Error"),
        (hub_errors.HFValidationError("x"), "neither a local directory nor a valid Hub id"),
        (RuntimeError("CAS service unavailable\nlong trace"), "could not be fetched: CAS service"),
        (OSError(28, "No space left on device"), "could not be fetched: .*No space left"),
    ],
)
def test_each_failure_is_explained(
    monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(**_: Any) -> Path:
        raise error

    pretend(monkeypatch, fail)
    with pytest.raises(ModelError, match=message) as caught:
        hub.fetch("some/moe", "v9")
    assert "\n" not in str(caught.value)


def test_only_owner_slash_name_is_taken_for_a_hub_id(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "inner").mkdir()
    monkeypatch.chdir(tmp_path / "inner")
    pretend(monkeypatch, lambda **_: pytest.fail("asked the Hub"))
    for source in ("gpt2", "./a/b", "../b", "/a/b", "a/b/c", "a b/c", "a/"):
        with pytest.raises(ModelError, match="no such model directory"):
            load.load(source)
