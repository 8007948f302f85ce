"""Loss against size as a figure: a point per measured variant, the one kept, the limit."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ET

import pytest

from mlxfun.session.measuring.variants import Target, Variant

pytest.importorskip("matplotlib")

from mlxfun.session.measuring.loss_figure import KEPT, loss_plot, loss_svg

VARIANTS = (
    Variant("narrow --fraction 0.5", 4_000_000, 0.9, 1.1, 1.0),
    Variant("prune --n-prune 4 then bits --to-bytes 5MB", 5_000_000, 0.4, 1.1, 1.0),
    Variant("broken", 0, None, None, 1.0, "no"),
    Variant("odd", 4_500_000, math.nan, 1.0, 1.0),
)


def test_each_measured_variant_is_a_point_named_by_its_techniques() -> None:
    (axes,) = loss_plot(VARIANTS, Target("bytes", 6e6), 1).axes
    points = [tuple(dots.get_offsets()[0]) for dots in axes.collections]
    assert points == [(4.0, 0.9), (5.0, 0.4)]
    assert [text.get_text() for text in axes.texts] == ["narrow", "prune + bits"]
    assert [text.get_color() == KEPT for text in axes.texts] == [False, True]
    assert "kept: prune --n-prune 4 then bits" in axes.get_title()
    assert axes.get_ylim()[0] == 0


@pytest.mark.parametrize(
    ("target", "ends"),
    [(Target("bytes", 5e6), [(5.0, 0), (5.0, 1)]), (Target("KL", 0.25), [(0, 0.25), (1, 0.25)])],
)
def test_the_limit_is_a_line_where_it_belongs(target: Target, ends: list[object]) -> None:
    (axes,) = loss_plot(VARIANTS, target, None).axes
    (line,) = axes.lines
    assert [tuple(point) for point in line.get_xydata()] == ends


def test_text_is_not_obeyed_and_nothing_measured_still_draws() -> None:
    hostile = (Variant("$x^ </text><script>\x1b[2J", 10, 0.1, 1.0, 1.0),)
    first = loss_svg(hostile, Target("bytes", 1e6), 0)
    assert first == loss_svg(hostile, Target("bytes", 1e6), 0)
    texts = [node.text or "" for node in ET.fromstring(first).iter() if node.tag.endswith("text")]
    assert any("</text><script>" in text for text in texts)
    assert b"\x1b" not in first
    assert ET.fromstring(loss_svg((), Target("KL", 1.0), None)).tag.endswith("svg")
