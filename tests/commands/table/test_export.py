"""Files made of what is seen: pictures, tables, the session, the conversation."""

from __future__ import annotations

import csv
import json
import struct
import zlib
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from commands.output import heatmap_files
from mlxfun.errors import StateError, UsageError
from mlxfun.session.reports import HeatView
from tests.commands.conftest import Bench

SVG = "{http://www.w3.org/2000/svg}"


def heat() -> HeatView:
    """Two layers of three experts: 3:2 to be pruned, 5:0 pruned, 3:1 always selected."""
    no = np.zeros((2, 3), bool)
    alive, condemned, activated = ~no, no.copy(), no.copy()
    alive[1, 0], condemned[0, 2], activated[0, 1] = False, True, True
    score = np.array([[4.0, 2.0, 0.0], [9.0, 0.5, 1.0]])
    return HeatView(
        (3, 5),
        3,
        {"freq": score, "reap_sum": score * 2},
        alive,
        condemned,
        activated,
        no,
        no,
        7,
        90,
    )


def test_the_svg_names_every_expert_and_marks_what_is_special() -> None:
    root = ElementTree.fromstring(
        heatmap_files.svg(heatmap_files.picture(heat(), "freq", "a <b> & c"))
    )
    titles = [node.text for node in root.iter(f"{SVG}title")]
    assert titles == [
        "L3:E0 freq 4", "L3:E1 freq 2 (always selected)", "L3:E2 freq 0 (to be pruned)",
        "L5:E0 freq 9 (pruned)", "L5:E1 freq 0.5", "L5:E2 freq 1",
    ]  # fmt: skip
    assert len(list(root.iter(f"{SVG}path"))) == 1
    assert "a <b> & c" in [node.text for node in root.iter(f"{SVG}text")]


def test_each_layer_is_scaled_by_the_largest_of_its_live_experts() -> None:
    drawn = heatmap_files.picture(heat(), "freq", "")
    assert drawn.values.tolist() == [[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]]


def test_the_png_holds_the_colour_of_every_cell() -> None:
    data = heatmap_files.png(heatmap_files.picture(heat(), "freq", ""))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert (width, height) == (3 * heatmap_files.CELL, 2 * heatmap_files.CELL)
    start = data.index(b"IDAT") + 4
    (length,) = struct.unpack(">I", data[start - 8 : start - 4])
    raw = np.frombuffer(zlib.decompress(data[start : start + length]), np.uint8)
    pixels = raw.reshape(height, 1 + 3 * width)[:, 1:].reshape(height, width, 3)
    middle = heatmap_files.CELL // 2 - 3
    assert tuple(pixels[middle, middle + 1]) == heatmap_files.colour(1.0)
    assert tuple(pixels[heatmap_files.CELL + middle, middle + 1]) == heatmap_files.GONE


def test_the_table_holds_all_metrics_exactly() -> None:
    rows = list(
        csv.DictReader(heatmap_files.table(heatmap_files.picture(heat(), "freq", "")).splitlines())
    )
    assert len(rows) == 6
    assert rows[2] == {
        "layer": "3", "expert": "2", "freq": "0.0", "reap_sum": "0.0", "pruned": "0",
        "to be pruned": "1", "always selected": "0", "never selected": "0", "protected": "0",
    }  # fmt: skip
    assert float(rows[4]["reap_sum"]) == 1.0


def test_markdown_strikes_out_what_goes() -> None:
    lines = heatmap_files.markdown(heatmap_files.picture(heat(), "freq", "t")).splitlines()
    assert lines[-2:] == ["| 3 | 4 | 2 | ~~0~~ |", "| 5 | pruned | 0.5 | 1 |"]


def test_nothing_measured_is_nothing_to_draw() -> None:
    with pytest.raises(StateError, match="run collect first"):
        heatmap_files.picture(None, "freq", "")
    with pytest.raises(UsageError, match="there are freq, reap_sum"):
        heatmap_files.picture(heat(), "reap", "")


def test_files_are_written_once_and_by_the_kind_their_name_says(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    bench.do(
        "collect --dataset demo:mixed --max-samples 2", "chat hello | there", "prune --n-prune 2"
    )
    bench.do("export report deep/session.md", "export chat chat.json", "export chat chat.md")
    text = (tmp_path / "deep" / "session.md").read_text()
    assert "## Staged, not applied" in text
    assert "\ncollect --dataset demo:mixed --max-samples 2\n" in text
    assert json.loads((tmp_path / "chat.json").read_text())[0]["prompt"] == "hello | there"
    assert "**You**\n\nhello | there" in (tmp_path / "chat.md").read_text()
    error = bench.run("export chat chat.md").error
    assert error == "chat.md exists: choose another name, or add --force"
    bench.do("export chat chat.md --force")
    error = bench.run("export chat chat.doc").error
    assert error is not None
    assert error.endswith("'chat.doc' must end in .md or .json")
