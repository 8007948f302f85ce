"""The heatmap's arithmetic: kinds, levels, places, colours, words."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest
from rich.console import Console

from commands.output.gradient import blend
from mlxfun.events import RoutingFrame
from mlxfun.session.reports import HeatView, SessionView
from tui.heat.grid import BASE, Axis, Grid, cells, changed, divided, layout, uniform
from tui.heat.margin import figures
from tui.heat.model import (
    CONDEMNED,
    CURSOR,
    DOWN,
    HEAT,
    LEVELS,
    LIT,
    PROTECTED,
    PRUNED,
    SHARE,
    UNSEEN,
    UP,
    VOID,
    Array,
    HeatModel,
    heat_model,
    levels,
    scale_for,
)
from tui.heat.paint import (
    DARK,
    LIGHT,
    Blocks,
    HalfBlocks,
    HeatColours,
    half_colour,
    luma,
    ramp_colour,
)
from tui.heat.words import explain, figure, spread, table
from tui.state.app_state import AppState, HeatOptions


def view(scores: Array, freq: Array | None = None, **flags: list[tuple[int, int]]) -> HeatView:
    """A heat view with statistics and some flagged (position, expert) pairs."""
    shape = scores.shape
    masks = {}
    for name in ("condemned", "activated", "deactivated", "protected"):
        masks[name] = np.zeros(shape, bool)
        for cell in flags.get(name, []):
            masks[name][cell] = True
    alive = np.ones(shape, bool)
    for cell in flags.get("pruned", []):
        alive[cell] = False
    metrics = {"reap_sum": scores, "freq": scores * 10 if freq is None else freq}
    layers = tuple(3 + 2 * n for n in range(shape[0]))
    return HeatView(layers, shape[1], metrics, alive, samples=2, tokens=50, **masks)


def model_of(heat: HeatView, **state: object) -> HeatModel:
    model = heat_model(replace(AppState(view=SessionView(heat=heat)), **state))
    assert model is not None
    return model


def kinds(model: HeatModel) -> list[list[int]]:
    return (model.codes // LEVELS).tolist()  # type: ignore[no-any-return]


SCORES = np.array([[1.0, 2.0, 4.0, 0.0], [8.0, 0.0, 16.0, 4.0]])


def test_every_state_of_an_expert_has_its_own_kind() -> None:
    heat = view(
        SCORES,
        condemned=[(0, 0)],
        activated=[(0, 1)],
        deactivated=[(0, 2)],
        protected=[(1, 0)],
        pruned=[(1, 2)],
    )
    assert kinds(model_of(heat)) == [
        [CONDEMNED, UP, DOWN, UNSEEN],
        [PROTECTED, UNSEEN, PRUNED, HEAT],
    ]


def test_seen_or_not_is_told_by_the_counts_and_not_by_the_metric() -> None:
    freq = np.array([[1.0, 0.0]])
    assert kinds(model_of(view(np.array([[0.0, 5.0]]), freq))) == [[HEAT, UNSEEN]]


def test_the_experts_of_the_newest_token_are_lit_whatever_else_they_are() -> None:
    model = model_of(view(SCORES, condemned=[(0, 1)]), lit=np.array([[1, -1], [3, 0]], np.int32))
    assert kinds(model) == [[HEAT, LIT, HEAT, UNSEEN], [LIT, UNSEEN, HEAT, LIT]]


def test_without_statistics_everything_is_unseen_and_no_metric_is_named() -> None:
    model = model_of(replace(view(SCORES), metrics={}))
    assert model.metric == ""
    assert kinds(model) == [[UNSEEN] * 4] * 2


def test_a_running_calibration_is_drawn_from_its_frame() -> None:
    frame = RoutingFrame(1, np.array([[0, 9]]), np.array([[0.0, 2.0]]), 5, 70)
    model = model_of(view(np.array([[1.0, 1.0]])), frame=frame)
    assert kinds(model) == [[UNSEEN, HEAT]]
    assert (model.live, model.samples, model.tokens) == (True, 5, 70)


def test_levels_run_from_nought_to_the_greatest_of_each_layer() -> None:
    values = np.array([[0.0, 5.0, 10.0], [0.0, 50.0, 100.0]])
    assert levels(values, HeatOptions()).tolist() == [[0, 12, 23], [0, 12, 23]]
    assert levels(values, HeatOptions(per_layer=False)).tolist() == [[0, 1, 2], [0, 12, 23]]


def test_the_logarithmic_scale_spans_three_decades() -> None:
    values = np.array([[0.0, 0.001, 0.01, 0.1, 1.0]])
    naive = [min(23, int(24 * np.log(1 + 999 * v) / np.log(1000))) for v in values[0]]
    assert levels(values, HeatOptions(scale="log")).tolist() == [naive]
    assert naive == [0, 2, 8, 16, 23]


def test_broken_figures_are_cold_and_not_an_accident() -> None:
    values = np.array([[np.nan, -1.0, 0.0, 2.0]])
    assert levels(values, HeatOptions()).tolist() == [[0, 0, 0, 23]]
    assert levels(np.zeros((2, 3)), HeatOptions()).tolist() == [[0] * 3] * 2


def test_pruned_experts_do_not_set_the_scale() -> None:
    heat = view(np.array([[1.0, 2.0, 1000.0]]), pruned=[(0, 2)])
    assert (model_of(heat).codes % LEVELS).tolist() == [[12, 23, 0]]


# Places ---------------------------------------------------------------------------------------
def grid_for(layers: int, experts: int, width: int, height: int, fit: bool = True) -> Grid:
    return layout(tuple(range(layers)), experts, width, height, fit)


def sizes(axis: Axis) -> set[int]:
    """The sizes of the cells of an axis, in columns or lines."""
    return {end - start for start, end in pairwise(axis.edges)}


def test_a_small_model_fills_its_window() -> None:
    grid = grid_for(6, 16, 100, 20)
    assert (grid.columns, grid.lines, grid.half) == (97, 19, False)
    assert (sizes(grid.across), sizes(grid.down)) == ({6, 7}, {3, 4})


def test_more_layers_than_lines_share_lines_by_half_blocks() -> None:
    grid = grid_for(48, 128, 140, 41)
    assert (grid.half, grid.lines, grid.columns) == (True, 40, 136)
    assert (sizes(grid.across), sizes(grid.down)) == ({1, 2}, {1, 2})
    assert not grid.across.pooled
    assert not grid.down.pooled


def test_more_experts_than_columns_and_layers_than_half_lines_share_cells_or_are_panned() -> None:
    grid = grid_for(94, 512, 200, 30)
    assert (grid.columns, grid.lines) == (196, 29)
    assert {last - first for first, last in map(grid.across.things, range(196))} == {1, 2}
    assert {last - first for first, last in map(grid.down.things, range(58))} == {0, 1}
    panned = grid_for(94, 512, 200, 30, fit=False)
    assert (panned.columns, panned.lines) == (512, 47)


@pytest.mark.parametrize("size", [(1, 1), (5, 2), (58, 6), (80, 9), (96, 20), (200, 50)])
@pytest.mark.parametrize("shape", [(1, 1), (6, 16), (7, 33), (48, 128), (94, 512)])
def test_a_fitted_map_fills_its_window_and_never_more(
    size: tuple[int, int], shape: tuple[int, int]
) -> None:
    grid = grid_for(*shape, *size)
    assert grid.columns == max(1, size[0] - grid.gutter)
    assert grid.lines <= max(1, size[1] - 1)
    # A layer has a line and a half at most that is not used: two half lines each, or all of them.
    assert grid.lines == max(1, size[1] - 1) or grid.half
    for expert in range(shape[1]):
        start, end = grid.columns_of(expert)
        first, last = grid.pool_of(0, expert)[1]
        assert start < end <= grid.columns
        assert first <= expert <= last < shape[1]
        assert grid.expert_at(start) == grid.expert_at(end - 1) == first
    for position in range(shape[0]):
        start, end = grid.lines_of(position)
        assert start < end <= grid.lines
        first, last = grid.positions_on(start)
        assert first <= position <= last


def test_cells_cover_everything_once() -> None:
    for count, units in ((512, 196), (94, 58), (16, 97), (5, 5), (7, 3)):
        axis = divided(count, units)
        held = [axis.things(cell) for cell in range(len(axis.firsts))]
        assert [t for first, last in held for t in range(first, last + 1)] == list(range(count))
        assert axis.edges[0] == 0
        assert axis.edges[-1] == units


def test_pooling_shows_the_most_important_of_the_experts_that_share_a_cell() -> None:
    codes = np.array([[3, HEAT * LEVELS + 1, LIT * LEVELS, 0, UNSEEN * LEVELS]])
    grid = Grid(2, divided(5, 2), divided(1, 1), half=False)
    assert cells(codes, grid, None).tolist() == [[HEAT * LEVELS + 1, LIT * LEVELS]]


@pytest.mark.parametrize(("going", "level"), [(1, 6), (2, 12), (3, 18), (4, 23)])
def test_a_squeezed_cell_shows_the_fraction_that_is_to_be_pruned(going: int, level: int) -> None:
    codes = np.array([[CONDEMNED * LEVELS] * going + [HEAT * LEVELS + 23] * (4 - going)])
    grid = Grid(2, divided(4, 1), divided(1, 1), half=False)
    assert cells(codes, grid, None).tolist() == [[SHARE * LEVELS + level]]
    # Experts that are pruned already do not count.
    more = np.concatenate([codes, np.full((1, 4), PRUNED * LEVELS)], axis=1)
    grid = Grid(2, divided(8, 1), divided(1, 1), half=False)
    assert cells(more, grid, None).tolist() == [[SHARE * LEVELS + level]]


def test_two_layers_in_one_line_and_an_odd_one_out() -> None:
    codes = np.arange(6).reshape(3, 2)
    grid = Grid(2, uniform(2, 1), uniform(3, 1), half=True)
    void = VOID * LEVELS
    assert cells(codes, grid, None).tolist() == [
        [0 * BASE + 2, 1 * BASE + 3],
        [4 * BASE + void, 5 * BASE + void],
    ]


def test_a_layer_of_three_half_lines_reaches_into_the_next_line() -> None:
    codes = np.array([[1], [2]])
    grid = Grid(2, uniform(1, 1), divided(2, 5), half=True)
    assert grid.down.edges == (0, 3, 5)
    void = VOID * LEVELS
    assert cells(codes, grid, None).tolist() == [
        [1 * BASE + 1], [1 * BASE + 2], [2 * BASE + void],
    ]  # fmt: skip
    assert (grid.lines_of(0), grid.lines_of(1)) == ((0, 2), (1, 3))


def test_the_cursor_of_a_half_block_map_is_in_its_own_half() -> None:
    codes = np.zeros((2, 2), np.int64)
    drawn = cells(codes, grid_for(2, 2, 6, 2), ((1, 0), (1, 0)))
    assert drawn.tolist() == [[CURSOR * LEVELS, 0]]
    assert codes.tolist() == [[0, 0], [0, 0]]


# The margin -----------------------------------------------------------------------------------
def test_the_margin_gives_balance_and_pruned_experts_of_the_layers_of_a_line() -> None:
    heat = view(np.array([[1.0, 1, 1, 1], [4, 0, 0, 0]]), condemned=[(0, 1)], pruned=[(1, 2)])
    found = figures(model_of(heat))
    assert found.text(0, 0).split() == ["100%", "1/4"]
    assert found.text(1, 1).split() == ["33%", "1/4"]
    assert found.text(0, 1).split() == ["67%", "2/8"]
    assert figures(model_of(replace(heat, metrics={}))).text(0, 0).split() == ["1/4"]


# The scale ------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("row", "scale"),
    [
        ([1.0, 2.0, 3.0, 4.0], "linear"),
        ([1.0, 2.0, 3.0, 100.0], "log"),
        ([1.0, 2.0, 3.0, 1e6], "rank"),
        ([0.0, 0.0, 0.0, 0.0], "linear"),
    ],
)
def test_the_scale_is_chosen_by_how_far_a_typical_expert_is_below_the_greatest(
    row: list[float], scale: str
) -> None:
    assert scale_for(np.array([row]), HeatOptions()) == scale
    assert scale_for(np.array([row]), HeatOptions(scale="log")) == "log"


def test_the_rank_scale_spreads_the_experts_evenly() -> None:
    values = np.array([[0.0, 1e-9, 1.0, 1e9, 5.0]])
    assert levels(values, HeatOptions(scale="rank")).tolist() == [[0, 6, 12, 23, 18]]


@pytest.mark.parametrize("inks", [DARK, LIGHT])
def test_never_seen_idle_and_background_look_different(inks: HeatColours) -> None:
    looks = {half_colour(inks, kind * LEVELS) for kind in (UNSEEN, HEAT, PRUNED)} | {inks.ground}
    assert len(looks) == 4
    for one, other in combinations(looks, 2):
        assert sum(abs(a - b) for a, b in zip(one, other, strict=True)) >= 30, (one, other)


def test_only_rows_that_differ_are_named() -> None:
    old, new = np.zeros((4, 3)), np.zeros((4, 3))
    new[2, 1] = 1
    assert changed(old, new) == [2]
    assert changed(old, old.copy()) == []
    assert changed(None, new) is None
    assert changed(np.zeros((2, 2)), new) is None


# Colours --------------------------------------------------------------------------------------
@pytest.mark.parametrize(("inks", "sign"), [(DARK, 1), (LIGHT, -1)])
def test_lightness_alone_carries_the_heat(inks: HeatColours, sign: int) -> None:
    lights = [sign * luma(ramp_colour(inks, HEAT, level)) for level in range(LEVELS)]
    assert all(a < b for a, b in pairwise(lights))
    assert lights[-1] - lights[0] > 150


def test_blending_hits_the_anchors() -> None:
    anchors = ((0, 0, 0), (100, 50, 10), (200, 200, 200))
    assert [blend(anchors, x) for x in (-1.0, 0.0, 0.5, 1.0, 2.0)] == [
        (0, 0, 0),
        (0, 0, 0),
        (100, 50, 10),
        (200, 200, 200),
        (200, 200, 200),
    ]


def test_signs_say_without_colour_what_stands_out() -> None:
    signs = Blocks(DARK, 5, marked=True)
    texts = {kind: signs[kind * LEVELS].text for kind in (HEAT, UNSEEN, PRUNED, CONDEMNED,
                                                          UP, DOWN, PROTECTED)}  # fmt: skip
    assert texts == {
        HEAT: "     ",
        UNSEEN: "  ·  ",
        PRUNED: "  ×  ",
        CONDEMNED: "╱╱╱╱╱",
        UP: "  ▲  ",
        DOWN: "  ▼  ",
        PROTECTED: "  ◆  ",
    }


def test_half_blocks_keep_two_layers_apart_and_hatch_what_goes_in_both() -> None:
    table_ = HalfBlocks(DARK, 1)
    hot, cold = HEAT * LEVELS + 23, HEAT * LEVELS
    segment = table_[hot * BASE + cold]
    assert segment.text == "▀"
    assert segment.style is not None
    assert segment.style.color is not None
    assert segment.style.color.triplet == (236, 252, 255)
    assert table_[(CONDEMNED * LEVELS) * BASE + CONDEMNED * LEVELS].text == "▚"


def test_segments_are_made_once() -> None:
    table_ = Blocks(DARK, 2, marked=False)
    assert table_[HEAT * LEVELS + 5] is table_[HEAT * LEVELS + 5]
    assert len(table_) == 1


# Words ----------------------------------------------------------------------------------------
def test_the_cell_under_the_cursor_is_explained() -> None:
    model = model_of(view(SCORES, condemned=[(0, 0)], pruned=[(1, 2)]))
    assert explain(model, (0, 0)) == (
        "L3:E0 · pruned by the staged plan · reap_sum 1, rank 3 of 4, 14.3% of its layer"
    )
    assert explain(model, (0, 3)) == "L3:E3 never seen in 50 tokens"
    assert explain(model, (1, 2)) == "L5:E2 pruned; undo brings it back"


def test_a_steered_expert_says_so_even_when_never_seen() -> None:
    model = model_of(view(SCORES, activated=[(0, 3)]))
    assert explain(model, (0, 3)) == "L3:E3 never seen in 50 tokens · forced on"


def test_before_any_measurement_the_words_say_that() -> None:
    model = model_of(replace(view(SCORES), metrics={}))
    assert explain(model, (0, 0)) == "L3:E0 not measured yet"


def test_evenness_is_one_for_equal_shares_and_small_for_a_monopoly() -> None:
    assert spread(np.array([2.0, 2.0, 2.0, 2.0])) == pytest.approx(1.0)
    assert spread(np.array([5.0, 0.0, 0.0, 0.0])) == pytest.approx(0.25)
    assert spread(np.zeros(4)) == 0.0


def test_figures_stay_short() -> None:
    assert max(len(figure(v)) for v in (0.0, 1.0, 1e-9, 123.456, 99999.5, 1e12, 3.14159)) <= 7


def test_the_table_says_what_the_picture_shows() -> None:
    console = Console(width=140, color_system=None)
    with console.capture() as capture:
        console.print(table(model_of(view(SCORES, condemned=[(0, 0), (0, 1)], activated=[(1, 3)]))))
    lines = [" ".join(line.split()) for line in capture.get().splitlines()]
    assert lines[0] == "layer kept never seen balance to prune least reap_sum most reap_sum steered"
    assert lines[1] == "3 4 1 65% 0, 1 3 (0), 0 (1), 1 (2) 2 (4), 1 (2), 0 (1) -"
    assert lines[2] == "5 4 1 65% - 1 (0), 3 (4), 0 (8) 2 (16), 0 (8), 3 (4) +3"
