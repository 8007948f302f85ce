"""The heatmap widget, line by line."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from textual.filter import ANSIToTruecolor

from mlxfun.events import RoutingFrame
from tests.fake_engine import FakeEngine
from tests.tui.driving import CALIBRATED, STAGED, Shell, drive, ready
from tui.widgets.experts.heatmap import Heatmap


def lines(shell: Shell) -> list[str]:
    """The text of every line of the heatmap, right-stripped."""
    heatmap = shell.app.main.query_one(Heatmap)
    return [heatmap.render_line(y).text.rstrip() for y in range(heatmap.size.height)]


def colours(shell: Shell, y: int) -> list[str]:
    """The distinct backgrounds of a line, in order of appearance."""
    strip = shell.app.main.query_one(Heatmap).render_line(y)
    out: list[str] = []
    for segment in strip:
        if segment.style and segment.style.bgcolor and segment.style.bgcolor.name not in out:
            out.append(segment.style.bgcolor.name)
    return out


def test_experts_are_numbered_across_and_layers_down() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        assert lines(shell)[0] == (
            " E  0   1  2   3   4  5   6  7   8   9  10  11 12  13 14  15  balance   pruned"
        )
        # A layer may have two lines; its number stands on one.
        labels = [line[:3].strip() for line in lines(shell)[1:]]
        assert [label for label in labels if label] == ["0▸", "1", "2", "3", "4", "5"]

    drive(test, size=(80, 24))


def test_never_seen_and_condemned_experts_show_without_colour() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        first = lines(shell)[1]
        assert first[3:62] == "[  ]" + " " * 8 + "·" + " " * 12 + "╱" * 15 + " " * 19
        assert first[62:].split() == ["80%", "4/16"]
        assert colours(shell, 1)[0] == "#0d1017"

    drive(test, size=(80, 24))


def test_pruned_experts_are_crossed_out_after_apply_and_back_after_undo() -> None:
    @ready(*STAGED, "apply")
    async def test(shell: Shell) -> None:
        assert lines(shell)[1].count("×") == 4
        await shell.press("u")
        shell.engine.finish()
        await shell.settle()
        assert lines(shell)[1].count("×") == 0

    drive(test, size=(80, 24))


def test_the_cursor_moves_on_the_map_and_the_words_follow() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.press("j", "j", "l", "right", "down")
        assert shell.app.state.cursor == (3, 2)
        assert "3▸" in lines(shell)[4]
        assert str(shell.app.main.query_one("#words").visual).startswith("L3:E2 · reap_sum")
        await shell.press(*["up"] * 9, *["h"] * 9)
        assert shell.app.state.cursor == (0, 0)

    drive(test, size=(80, 24))


def test_a_click_puts_the_cursor() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        await shell.pilot.click(Heatmap, offset=(3 + 27, 1 + 2))
        await shell.settle()
        assert shell.app.state.cursor == (2, 7)

    drive(test, size=(80, 24))


def test_frames_are_drawn_while_a_calibration_runs() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        shell.engine.run("collect --dataset demo:mixed")
        shell.engine.step(2)
        await shell.settle()
        title = str(shell.app.main.query_one("#experts").border_title)
        assert "LIVE · reap_sum" in title
        assert "8 samples" in title
        assert len(colours(shell, 1)) > 5

    drive(test, size=(80, 24))


def test_tokens_light_their_experts_while_an_answer_comes() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        lit = "#ffe040"
        assert lit not in colours(shell, 1)
        shell.engine.run("chat hello")
        shell.engine.step(3)
        await shell.settle()
        assert lit in colours(shell, 1)
        shell.engine.finish()
        await shell.settle()
        assert lit not in colours(shell, 1)

    drive(test, size=(80, 24))


def test_chatting_before_any_calibration_shows_who_served_the_answer() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        shell.engine.run("chat hello")
        shell.engine.finish()
        await shell.settle()
        assert "answer" in str(shell.app.main.query_one("#experts").border_title)

    drive(test, size=(80, 24))


def test_panning_shows_one_column_an_expert_and_follows_the_cursor() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        heatmap = shell.app.main.query_one(Heatmap)
        assert heatmap.max_scroll_x == 0
        await shell.press("g")
        assert heatmap.virtual_size.width == 4 + 256
        await shell.press("end", *["down"] * 39)
        assert heatmap.scroll_offset.x == heatmap.max_scroll_x > 0
        assert heatmap.scroll_offset.y == heatmap.max_scroll_y > 0
        assert [line for line in lines(shell) if line][-1].startswith(" 39▸")

    drive(test, size=(80, 24), engine=FakeEngine(40, 256))


def test_only_lines_that_changed_are_painted_again() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        heatmap = shell.app.main.query_one(Heatmap)
        refreshed: list[tuple[int, int]] = []
        plain = heatmap.refresh_lines

        def spy(y_start: int, line_count: int = 1) -> None:
            refreshed.append((y_start, line_count))
            plain(y_start, line_count)

        heatmap.refresh_lines = spy  # type: ignore[method-assign]
        shell.app._show()
        assert refreshed == []
        heat = shell.app.state.view.heat
        assert heat is not None
        freq = heat.metrics["freq"].astype(np.int64)
        scores = heat.metrics["reap_sum"].copy()
        scores[4, 0] = scores[4].max() * 0.9
        frame = RoutingFrame(9, freq, scores, 32, 3840)
        shell.app._change(replace(shell.app.state, frame=frame))
        assert heatmap._grid is not None
        first, end = heatmap._grid.lines_of(4)
        assert refreshed == [(1 + first, end - first)]

    drive(test, size=(80, 24))


def test_the_filter_that_looks_at_every_cell_is_left_out() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        heatmap = shell.app.main.query_one(Heatmap)
        everywhere = shell.app.get_line_filters()
        assert not any(isinstance(f, ANSIToTruecolor) for f in heatmap.get_line_filters())
        assert len(heatmap.get_line_filters()) == len(
            [f for f in everywhere if not isinstance(f, ANSIToTruecolor)]
        )

    drive(test, size=(80, 24))


@pytest.mark.parametrize("size", [(160, 45), (80, 24), (60, 18), (30, 10), (12, 5), (2, 2)])
def test_every_segment_has_a_style_so_that_no_filter_stumbles(size: tuple[int, int]) -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        heatmap = shell.app.main.query_one(Heatmap)
        for y in range(heatmap.size.height):
            strip = heatmap.render_line(y)
            assert all(segment.style is not None for segment in strip)
            assert strip.cell_length == heatmap.size.width

    drive(test, size=size)


def test_the_theme_changes_the_colours_of_the_map() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        before = colours(shell, 1)
        await shell.press("t")
        assert shell.app.theme == "mlxfun-light"
        assert not set(before) & set(colours(shell, 1))

    drive(test, size=(80, 24))


def test_the_table_takes_the_place_of_the_map_and_keeps_the_keys() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        await shell.press("y")
        assert not shell.app.main.query_one(Heatmap).display
        assert shell.app.main.focused_panel == "experts"
        await shell.press("y")
        assert shell.app.main.query_one(Heatmap).display
        assert shell.app.main.query_one(Heatmap).has_focus

    drive(test, size=(80, 24))


def test_the_legend_keeps_the_words_of_all_marks_where_it_is_narrow() -> None:
    @ready(*STAGED, "steer --activate 1:2 --deactivate 2:9")
    async def test(shell: Shell) -> None:
        line = next(line for line in shell.screen.splitlines() if "to prune" in line)
        assert "▲ force on ▼ force off" in line
        assert "high (linear)" not in line

    drive(test, size=(114, 40))
