"""Results as figures: PNG and PDF by Matplotlib, SVG without."""

from __future__ import annotations

import io
import sys

import numpy as np
import pytest

from mlxfun.errors import StateError
from mlxfun.tracing.patching.plot import BLUE, RED, Axis, Plot


def plot() -> Plot:
    scores = np.array([[1.0, np.nan], [-1.0, 0.0], [0.5, 0.0]])
    return Plot(
        scores, Axis("layer", ["0", "1", "2"]), Axis("position", ["0 a$", "1 \x1b"]), "lens $x"
    )


def test_a_result_is_a_figure_with_its_largest_scores_in_full_colour() -> None:
    image = pytest.importorskip("matplotlib.image")
    pixels = image.imread(io.BytesIO(plot().figure(".png")), format="png")
    colours = {
        tuple(c)
        for c in np.unique((pixels[..., :3] * 255).round().astype(int).reshape(-1, 3), axis=0)
    }
    assert {RED, BLUE} <= colours
    assert plot().figure(".pdf")[:5] == b"%PDF-"


def test_without_the_library_a_figure_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(StateError, match="pip install 'mlxfun\\[plots\\]'"):
        plot().figure(".png")
    assert plot().svg().startswith("<svg")
