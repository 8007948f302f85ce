"""The sizes of panels: by their contents, by presets, keys and the mouse, and remembered."""

from __future__ import annotations

from pathlib import Path

from textual import events

from tests.tui.driving import CALIBRATED, STAGED, Shell, drive, ready
from tui.widgets.experts.heatmap import Heatmap


def regions(shell: Shell) -> dict[str, tuple[int, int, int, int]]:
    names = ("experts", "chat", "plan", "history", "log")
    panels = {name: shell.app.main.panel_named(name) for name in names}
    return {n: tuple(p.region) for n, p in panels.items() if p is not None and p.display}


async def drag(shell: Shell, start: tuple[int, int], end: tuple[int, int]) -> None:
    """The mouse goes down at one cell of the screen and up at another."""
    shell.app.screen._forward_event(mouse(events.MouseDown, start))
    await shell.settle()
    for at in (end, end):
        shell.app.screen._forward_event(mouse(events.MouseMove, at))
        await shell.settle()
    shell.app.screen._forward_event(mouse(events.MouseUp, end))
    await shell.settle()


def mouse(kind: type[events.MouseEvent], at: tuple[int, int]) -> events.MouseEvent:
    x, y = at
    return kind(None, x, y, 0, 1, 1, False, False, False, x, y)


def test_panels_take_what_their_contents_need_and_a_new_plan_more() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        before = regions(shell)
        assert before["plan"][3] <= 7  # nothing is staged
        assert before["history"][3] == 4
        assert before["chat"][3] == 7  # nothing has been said
        await shell.play("prune --n-prune 4")
        assert regions(shell)["plan"][3] > 2 * before["plan"][3]
        await shell.play("chat hello")
        assert regions(shell)["chat"][3] > 12
        # Whatever they need, they fill the screen.
        after = regions(shell)
        assert sum(after[name][3] for name in ("plan", "history", "log")) == 36
        assert sum(after[name][3] for name in ("experts", "chat")) == 36

    drive(test, size=(120, 40))


def test_presets_on_a_key_and_sizes_on_keys() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        first = regions(shell)
        await shell.press("Z")
        assert regions(shell)["experts"][2] > first["experts"][2]
        assert shell.echo == "· layout: large map"
        await shell.press("Z", "Z")
        assert regions(shell) == first
        await shell.press("greater_than_sign", "right_curly_bracket")
        grown = regions(shell)["experts"]
        assert (grown[2], grown[3]) == (first["experts"][2] + 2, first["experts"][3] + 1)
        await shell.press("4", "right_curly_bracket")
        assert regions(shell)["history"][3] == first["history"][3] + 1

    drive(test, size=(120, 40))


def test_frames_are_dragged_and_the_sizes_come_back_in_the_next_session(tmp_path: Path) -> None:
    @ready(*STAGED)
    async def first(shell: Shell) -> None:
        _, y, width, height = regions(shell)["experts"]
        await drag(shell, (width - 1, 5), (50, 5))
        assert regions(shell)["experts"][2] == 50
        await drag(shell, (5, y + height - 1), (5, 12))
        assert regions(shell)["experts"][3] == 12
        _, top, _, height = regions(shell)["plan"]
        await drag(shell, (70, top + height - 1), (70, 8))
        assert regions(shell)["plan"][3] == 8

    @ready(*STAGED)
    async def second(shell: Shell) -> None:
        now = regions(shell)
        assert (now["experts"][2], now["experts"][3], now["plan"][3]) == (50, 12, 8)

    drive(first, size=(120, 40), lines=tmp_path / "lines")
    drive(second, size=(120, 40), lines=tmp_path / "lines")


def test_the_strip_between_two_panels_is_dragged_where_only_two_are_shown() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        strip = shell.app.main.query_one("#tabs").region
        await drag(shell, (70, strip.y), (70, strip.y - 4))
        assert shell.app.main.query_one("#tabs").region.y == strip.y - 4
        # A drag chooses no tab.
        assert shell.app.state.panel == "experts"

    drive(test, size=(80, 24))


def test_the_map_fills_its_panel_at_every_height_it_is_given() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        heatmap = shell.app.main.query_one(Heatmap)
        for key in ("Z", "Z", "Z", *["left_curly_bracket"] * 6, "z", "z", *["less_than_sign"] * 3):
            await shell.press(key)
            assert heatmap._grid is not None
            assert heatmap._grid.lines == heatmap.size.height - 1, key
            assert not heatmap.show_horizontal_scrollbar
            assert not heatmap.show_vertical_scrollbar

    drive(test, size=(120, 40))


def test_a_broken_file_of_sizes_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "layout.json").write_text('{"left": 1e9, "rows": [1, "x"], "preset": []}')

    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        assert shell.app.state.sizes.left == 0.6

    drive(test, size=(120, 40), lines=tmp_path / "lines")
