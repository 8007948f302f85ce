"""What is odd and yet valid is taken, and said to be odd; what is no ordinary file is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlxfun.model.identity import state_id
from tests.hostile.kinds import KINDS
from tests.hostile.spoiled import Place, require_refused
from tests.hostile.warm import Warm, tree

SPECIAL = ("missing", "pipe", "directory", "dangling", "endless", "long name")
QUICK = ("replay", "kept session", "statistics", "configuration", "text")
READERS = (
    *QUICK, "recipe", "lines of data", "expert list", "expert table", "scan report", "steering",
    "given template",
)  # fmt: skip


@pytest.mark.parametrize("special", SPECIAL)
def test_what_is_no_ordinary_file_is_refused_by_every_reader(place: Place, special: str) -> None:
    warm, _ = place
    for name in READERS if special in ("pipe", "endless") else QUICK:
        kind = KINDS[name]
        path = warm.directory / f"special-{kind.file}"
        if special == "pipe":
            os.mkfifo(path)
        elif special == "directory":
            path.mkdir()
        elif special == "dangling":
            path.symlink_to("nowhere")
        elif special == "endless":
            path.symlink_to("/dev/zero")
        elif special == "long name":
            path = warm.directory / f"{'n' * 300}-{kind.file}"
        before = tree(warm.directory)
        words = [word.replace(kind.file, path.name) for word in kind.command()]
        require_refused(warm.run(*words), f"{name}, {special}")
        assert tree(warm.directory) == before
        if os.path.isdir(path):  # not path.is_dir(), which raises for such a name
            path.rmdir()
        elif os.path.lexists(path):
            path.unlink()


def put(name: str, **changes: object) -> Callable[[Path], None]:
    """Change entries of the JSON file."""

    def change(here: Path) -> None:
        document = json.loads((here / name).read_text())
        (here / name).write_text(json.dumps(document | changes))

    return change


def text(name: str, content: str | bytes) -> Callable[[Path], None]:
    raw = content if isinstance(content, bytes) else content.encode()

    def write(here: Path) -> None:
        (here / name).write_bytes(raw)

    return write


def without_template(here: Path) -> None:
    put("model/tokenizer_config.json", chat_template=None)(here)
    (here / "model/chat_template.jinja").unlink()


def of_mlx_fun(here: Path) -> None:
    document = json.loads((here / "report.json").read_text())
    del document["layer_indices"], document["significance"]
    scores = [[1.9] + [0.0] * 15] * 6
    document |= {"threshold_percentile": 90, "composite_score": scores}
    (here / "report.json").write_text(json.dumps(document))


def statistics(**changes: object) -> Callable[[Path], None]:
    def change(here: Path) -> None:
        with np.load(here / "good.npz") as archive:
            found = {name: archive[name] for name in archive.files} | changes
        np.savez(here / "odd.npz", **{k: v for k, v in found.items() if v is not None})  # type: ignore[arg-type]

    return change


OLD = "248aa7811d9b0fae8175677fe6046da4"
"""What earlier versions called the demo model."""
DATA = '{"text": "a few words of text"}\n'
COLLECT = "collect --dataset odd.jsonl --max-samples 9 --max-tokens 4"
ODD: dict[str, tuple[Callable[[Path], None], tuple[str, ...], str]] = {
    "blank lines, null and empty texts": (
        text("odd.jsonl", f'{DATA}\nnull\n{{"text": ""}}\n{{"text": null}}\n{DATA * 2}'),
        ("load ./model", COLLECT), "7 lines read, 2 used, 4 blank"),
    "texts that are too long": (
        text("odd.jsonl", '{"text": "' + "many words " * 99 + '"}\n' + DATA * 2),
        ("load ./model", COLLECT), "2 cut"),
    "a byte order mark and line ends of Windows": (
        text("odd.jsonl", b"\xef\xbb\xbf" + (DATA * 3).replace("\n", "\r\n").encode()),
        ("load ./model", COLLECT), "3 lines read, 2 used"),
    "deep text": (
        text("odd.jsonl", json.dumps({"text": "[" * 50_000}) + "\n" + DATA * 2),
        ("load ./model", COLLECT), "3 lines read"),
    "statistics that name no model": (
        statistics(model=np.str_(""), state=np.str_("")), ("load ./model", "stats load odd.npz"),
        "does not say"),
    "statistics of an earlier version": (
        statistics(model=np.str_(OLD), state=np.str_(state_id(OLD, {}))),
        ("load ./model", "stats load odd.npz"), "with the identity of an earlier version"),
    "a list made on another model": (
        put("list.json", model="0" * 32, model_name="other"),
        ("load ./model", "stats load good.npz", "prune --expert-list list.json"),
        "was made on the model other"),
    "a report of mlx_fun with scores above 1": (
        of_mlx_fun,
        ("load ./model", "steer --domain-map report.json"), "they are divided by that"),
    "a shard that the index does not know": (
        text("model/model-extra.safetensors", (2).to_bytes(8, "little") + b"{}"),
        ("load ./model",), "not in the index"),
    "no chat template at all": (
        without_template,
        ("load ./model",), "has no chat template"),
    "a session of Windows": (
        text("odd.mlxfun", b"\xef\xbb\xbfset metric freq\r\n\r\n# a remark\r\nset seed 3\r\n"),
        ("replay odd.mlxfun",), "2 commands"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_what_is_odd_is_taken_and_said(place: Place, name: str) -> None:
    warm, _ = place
    make, lines, said = ODD[name]
    kept = {p: p.read_bytes() for p in warm.directory.rglob("*") if p.is_file()}
    try:
        make(warm.directory)
        ended = warm.lines(*lines)
        assert said in " ".join((ended.out + ended.err).split()), ended.out + ended.err
    finally:
        for path in warm.directory.rglob("*"):
            if path.is_file() and path not in kept:
                path.unlink()
        for path, content in kept.items():
            if not path.exists() or path.read_bytes() != content:
                path.write_bytes(content)


def test_a_spoiled_cache_of_identities_is_made_anew(warm: Warm, place: Place) -> None:
    cache = warm.home / "mlxfun" / "identities.json"
    first = warm.lines("load ./model").out
    for content in (b"", b"[" * 20000, b'{"checkpoints": 5}', b"\xff"):
        cache.write_bytes(content)
        assert warm.lines("load ./model").out == first
        assert json.loads(cache.read_text())["checkpoints"]
