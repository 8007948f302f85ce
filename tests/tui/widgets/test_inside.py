"""The windows of lens, attention and patching: cells, cursor, what the keys do, and how they look."""

from __future__ import annotations

import asyncio

import pytest
from textual.app import App

from mlxfun.tracing.reports import (
    AttentionReport,
    AttributionReport,
    HeadMapsReport,
    LensReport,
    PatchReport,
)
from tui.widgets.inside.grid import grid_of
from tui.widgets.inside.map_screen import MapScreen, drawn, pictures, style_of, window
from tui.widgets.inside.shares import shares_page

TOKENS = ("The", " cat", " [red]")
LENS = LensReport(
    (0, 1), (0, 1, 2), TOKENS,
    (((" a",), (" b",), ("\n",)), ((" dog",), (" sat",), (" on",))),
    (((0.1,), (0.2,), (0.3,)), ((0.4,), (0.9,), (0.6,))),
    1, "layer 1 says ' on'", (" on",), (((7,), (3,), (9,)), ((2,), (4,), (1,))),
    (((0.0,), (0.0,), (0.0,)), ((0.1,), (0.1,), (0.6,))),
    (((1,), (2,), (3,)), ((4,), (5,), (6,))), "The cat [red]",
)  # fmt: skip
ATTENTION = AttentionReport(
    3, 1, 4, TOKENS, ((1.0, 0.0, 0.0), (0.25, 0.75, 0.0), (0.5, 0.004, 0.496)),
    ((0,), (1, 0), (0, 2)), "The cat [red]",
)  # fmt: skip
PATCH = PatchReport(
    "activation patching", "expert", "kl", "expert", (0, 1), ("0", "1"), ((0.5, -0.25), (None, 0.0)),
    1.0, 0.0, "", "", (), "most at layer 0",
)  # fmt: skip


class Host(App[None]):
    """An application that shows one window and keeps what it gives."""

    def __init__(self, screen: MapScreen) -> None:
        super().__init__()
        self.window, self.given = screen, ["open"]

    def on_mount(self) -> None:
        self.push_screen(self.window, lambda line: self.given.append(line or ""))


def played(report, *keys: str, size: tuple[int, int] = (80, 20)) -> tuple[Host, str]:
    grid = grid_of(report)
    assert grid is not None
    host = Host(MapScreen(grid))

    async def run() -> str:
        async with host.run_test(size=size) as pilot:
            await pilot.pause()
            await pilot.press(*keys)
            await pilot.pause()
            strips = host.screen._compositor.render_strips()
            return "\n".join("".join(s.text for s in strip) for strip in strips)

    return host, asyncio.run(run())


def test_the_lens_begins_at_the_last_token_of_the_last_layer_and_says_what_is_there() -> None:
    host, seen = played(LENS)
    assert host.window.cursor == (0, 2)
    assert "layer 1, after 2 ·[red]: ·on 60%; ·on is number 1" in " ".join(seen.split())
    assert "·cat" in seen
    assert "·sat" in seen


def test_the_cursor_moves_over_the_cells_and_no_further() -> None:
    host, seen = played(LENS, "left", "down", "down", "j")
    assert host.window.cursor == (1, 1)
    assert "layer 0, after 1 ·cat: ·b 20%; ·on is number 3" in " ".join(seen.split())
    host, _ = played(LENS, "home", "pageup", "h")
    assert host.window.cursor == (0, 0)


def test_enter_on_a_word_asks_which_parts_wrote_it() -> None:
    host, _ = played(LENS, "left", "enter")
    assert host.given == ["open", "attribute --position 1 --answer '#5' 'The cat [red]'"]
    host, _ = played(LENS, "escape")
    assert host.given == ["open", ""]


def test_attention_shows_weights_and_turns_to_other_heads_and_layers() -> None:
    host, seen = played(ATTENTION)
    assert "attends to 0 The with 50.0%; most to 0 The 50%, 2 ·[red] 50%" in " ".join(seen.split())
    for key, line in (("plus", "attention --layer 3 --head 2 'The cat [red]'"),
                      ("minus", "attention --layer 3 --head 0 'The cat [red]'"),
                      ("less_than_sign", "attention --layer 2 --head 1 'The cat [red]'")):  # fmt: skip
        host, _ = played(ATTENTION, key)
        assert host.given == ["open", line]
    first = AttentionReport(
        0, 0, 1, *(getattr(ATTENTION, n) for n in ("tokens", "weights", "looks"))
    )
    host, _ = played(first, "minus", "plus", "less_than_sign")
    assert host.given == ["open"]


HEADS = HeadMapsReport(
    2, TOKENS, tuple((0.1 * n, 0.2, 0.3, 2.5) for n in range(7)),
    tuple(((1.0, 0.0, 0.0), (0.5, 0.5, 0.0), (0.0, 0.1 * n, 1 - 0.1 * n)) for n in range(7)),
    "The cat [red]", True,
)  # fmt: skip


def test_all_heads_of_a_layer_are_small_maps_that_open() -> None:
    host, seen = played(HEADS)
    assert all(f"head {n}" in seen for n in range(7))
    assert "head 0: 0% on the first token, 20% on the one before" in " ".join(seen.split())
    host, seen = played(HEADS, "down", "right", "right", "right")
    assert host.window.cursor == (1, 3)  # behind the last head there is nothing to explain or open
    host, _ = played(HEADS, "down", "right", "right", "right", "enter", "left", "left", "enter")
    assert host.given == ["open", "attention --layer 2 --head 6 --chat 'The cat [red]'"]
    host, _ = played(HEADS, "greater_than_sign")
    assert host.given == ["open", "attention --layer 3 --all-heads --chat 'The cat [red]'"]
    host, _ = played(ATTENTION, "enter")
    assert host.given == ["open", "attention --layer 3 --all-heads 'The cat [red]'"]


def test_a_small_map_is_brighter_where_more_weight_lies() -> None:
    grid = grid_of(HEADS)
    assert grid is not None
    text = pictures(grid, (0, 0), (70, 20))
    colours = [span.style for span in text.spans if text.plain[span.start] == "▀"][:3]
    assert colours[0].color != colours[1].color  # 1.0 beside 0.0
    assert colours[1].color == colours[2].color  # both 0


def test_patching_shows_shares_and_what_is_missing() -> None:
    grid = grid_of(PATCH)
    assert grid is not None
    assert [grid.cell(1, c).text for c in (0, 1)] == ["+50", "-25"]
    assert grid.cell(1, 1).negative
    assert grid.cell(0, 0).missing
    assert grid.explain(1, 0) == (
        "layer 0, expert '0': +50.0% of the way from the corrupted to the clean run"
    )
    assert grid.enter(1, 0) == "why 0:0"
    assert grid_of(AttributionReport("a", "", 1.0, 0.0, (), "")) is None


@pytest.mark.parametrize("size", [(40, 12), (60, 18), (80, 24), (200, 50)])
def test_a_large_map_is_shown_around_the_cursor_in_any_terminal(size: tuple[int, int]) -> None:
    tokens = tuple(f" t{i}" for i in range(120))
    words = tuple(tuple((f"w{n}.{i}",) for i in range(120)) for n in range(40))
    chances = tuple(tuple((0.5,) for _ in range(120)) for _ in range(40))
    ids = tuple(tuple((i,) for i in range(120)) for _ in range(40))
    report = LensReport(
        tuple(range(40)), tuple(range(120)), tokens, words, chances, 3, "said", ids=ids
    )
    host, seen = played(report, *["left"] * 3, *["down"] * 5, size=size)
    assert host.window.cursor == (5, 116)
    assert "w34.116" in seen


def test_what_is_strong_is_bright_and_without_colour_bold() -> None:
    grid = grid_of(ATTENTION)
    assert grid is not None
    strong, weak, unseen = (style_of(grid.cell(*at), False) for at in ((0, 0), (2, 1), (0, 2)))
    assert strong.bold
    assert strong.bgcolor != weak.bgcolor
    assert weak.dim
    assert unseen.dim
    assert unseen.bgcolor is None
    assert style_of(grid.cell(0, 0), True).reverse


def test_markup_in_tokens_is_text() -> None:
    text = drawn(grid_of(LENS), (0, 0), (60, 5)).plain
    assert "·[red]" in text
    assert window(3, 10, 0) == range(3, 4)


def test_the_page_of_an_attribution_has_a_bar_for_each_part(capsys) -> None:
    from rich.console import Console

    report = AttributionReport(
        " sat", "", 1.5, 0.0, (("layer 3 expert 7", 2.0), ("embed", -0.5)), "said"
    )
    Console(width=80).print(shares_page(report))
    out = capsys.readouterr().out
    assert "who wrote ' sat'" in out
    assert "layer 3 expert 7  +2.00" in out
    assert "-0.50" in out
