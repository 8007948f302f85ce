"""Files made of what is seen: pictures, tables, the session, the conversation."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from commands.output import heatmap_files
from commands.output.figure import PALETTES, FigureOptions, figure, scaled
from commands.output.heatmap_files import colour
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


FIGURES = {"print": "#ffffff", "light": "#ffffff", "screen": "#0d1017"}


@pytest.mark.parametrize("palette", PALETTES)
def test_a_figure_has_title_axes_colour_bar_and_a_legend_of_what_is_there(palette: str) -> None:
    pytest.importorskip("matplotlib")
    drawn = heatmap_files.picture(heat(), "freq", "Experts of a <b> & $c_")
    options = FigureOptions(palette=palette, width=120, height=80)  # type: ignore[arg-type]
    made = figure(drawn, ".svg", options)
    root = ElementTree.fromstring(made)
    words = {node.text for node in root.iter(f"{SVG}text")}
    assert {"Experts of a <b> & $c_", "decoder layer", "expert   (7 samples, 90 tokens)"} <= words
    assert {"3", "5", "freq / largest of its layer"} <= words
    # 3:2 was never seen and is to be pruned, 5:0 is pruned, 3:1 forced on; nothing else is there.
    assert {"never seen", "pruned", "to be pruned", "forced on"} <= words
    assert not {"forced off", "protected"} & words
    width = str(root.get("width")).removesuffix("pt")
    assert float(width) == pytest.approx(120 / 25.4 * 72, abs=0.01)
    assert FIGURES[palette] in made.decode()
    assert made == figure(drawn, ".svg", options)


def test_a_figure_has_the_size_and_the_colours_that_were_asked_for() -> None:
    image = pytest.importorskip("matplotlib.image")
    drawn = heatmap_files.picture(heat(), "freq", "t")
    made = figure(drawn, ".png", FigureOptions(width=100, height=50, dpi=254))
    pixels = image.imread(io.BytesIO(made), format="png")
    assert pixels.shape[:2] == (500, 1000)
    colours = {tuple(np.round(row[:3] * 255).astype(int)) for line in pixels for row in line}
    assert colour(1.0) in colours  # 3:0, the largest of its layer
    assert figure(drawn, ".pdf", FigureOptions())[:5] == b"%PDF-"


def test_scales_of_figures() -> None:
    drawn = heatmap_files.picture(heat(), "reap_sum", "")
    nothing = [np.nan]
    np.testing.assert_allclose(scaled(drawn, "linear"), [[1, 0.5, *nothing], [*nothing, 0.5, 1]])
    np.testing.assert_allclose(
        scaled(drawn, "log"),
        [[1, 1 + np.log10(0.5) / 3, *nothing], [*nothing, 1 + np.log10(0.5) / 3, 1]],
    )
    np.testing.assert_allclose(scaled(drawn, "rank"), [[1, 0.5, *nothing], [*nothing, 0, 1]])


def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stub's session measures nothing: its map is ours."""
    drawn = heatmap_files.picture(heat(), "freq", "t")
    monkeypatch.setattr(heatmap_files, "picture", lambda *_: drawn)


def test_without_the_library_one_sentence_says_what_to_install(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    measured(monkeypatch)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("commands.table.export.find_spec", lambda name: None)
    bench.do("collect --dataset demo:mixed --max-samples 2", "export heatmap plain.svg")
    assert (tmp_path / "plain.svg").read_text().startswith("<svg")
    for line in ("export heatmap h.png", "export heatmap h.svg --palette screen"):
        error = bench.run(line).error
        assert error is not None
        assert error.startswith("figures need one package more: pip install 'mlxfun[plots]'")
    assert not (tmp_path / "h.png").exists()


def test_options_of_figures_are_refused_for_tables_and_sizes_checked(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured(monkeypatch)
    bench.do("collect --dataset demo:mixed --max-samples 2")
    assert bench.run("export heatmap h.csv --dpi 100").error == (
        "--dpi is of a figure, and .csv is a table"
    )
    error = bench.run("export heatmap h.png --size 5x5").error
    assert error is not None
    assert "give millimetres from 20 to 2000, WIDTH or WIDTHxHEIGHT, such as 180x90" in error


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
