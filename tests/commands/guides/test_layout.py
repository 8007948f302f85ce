"""Markdown as plain text: wrapped to a width, nothing lost but signs and pictures."""

from __future__ import annotations

import re

import pytest

from commands.guides.index import GUIDES, source
from commands.guides.layout import plain


def test_headings_stand_left_of_what_they_head() -> None:
    assert plain("# Pruning\n\nRemoves experts.\n\n## How\n\nFast.", 40) == (
        "Pruning\n\n  Removes experts.\n\nHow\n\n  Fast."
    )


def test_paragraphs_are_wrapped_and_lines_joined() -> None:
    assert plain("one two three\nfour five six", 16) == "  one two three\n  four five six"
    assert plain("one two\nthree four", 40) == "  one two three four"


def test_items_hang_below_their_first_word() -> None:
    assert plain("- one two three\n- four", 12) == "  - one two\n    three\n  - four"
    assert plain("1. one two three", 12) == "  1. one two\n     three"


def test_options_are_not_broken_at_their_dashes() -> None:
    assert plain("use `--refit-experts` here", 18) == "  use\n  `--refit-experts`\n  here"


def test_code_is_kept_and_indented_most() -> None:
    assert plain("```mlxfun\nprune  --n-prune 4\n\nundo\n```", 40) == (
        "      prune  --n-prune 4\n\n      undo"
    )


def test_code_that_is_too_wide_is_broken_between_options() -> None:
    assert plain("```mlxfun\nprune --n-prune 4 --metric reap --sequential\n```", 34) == (
        "      prune --n-prune 4\n          --metric reap\n          --sequential"
    )


def test_links_keep_their_words_and_foreign_ones_their_address() -> None:
    assert plain("see [`help pruning`](pruning.md)", 15) == "  see\n  `help pruning`"
    assert plain("[MLX](https://mlx)", 40) == "  MLX (https://mlx)"


def test_pictures_and_comments_are_left_out() -> None:
    assert plain("a\n\n![picture](x.svg)\n\n<!-- note -->\nb", 40) == "  a\n\n  b"


TABLE = "| name | what it is |\n|---|---|\n| a \\| b | first |\n| c | second |"


def test_a_table_that_fits_has_columns() -> None:
    assert plain(TABLE, 40) == "  name   what it is\n  a | b  first\n  c      second"


def test_a_table_breaks_its_headings_first() -> None:
    assert plain(TABLE, 16) == "  name   what it\n         is\n  a | b  first\n  c      second"


def test_a_table_that_does_not_fit_has_a_paragraph_for_each_row() -> None:
    table = "| what | ratio | note |\n|---|---|---|\n| one long name | 1.0 | a long remark on it |"
    assert plain(table, 24) == (
        "  what\n\n  one long name\n      ratio: 1.0\n      note: a long\n      remark on it"
    )
    table = "| what | ratio |\n|---|---|\n| one long name | a long remark on it |"
    assert plain(table, 24) == (
        "  what\n      ratio\n\n  one long name\n      a long remark on\n      it"
    )


@pytest.mark.parametrize("width", [48, 65, 78, 200])
@pytest.mark.parametrize("name", GUIDES)
def test_every_guide_keeps_its_words_at_any_width(name: str, width: int) -> None:
    text = plain(source(name), width)
    longest = max(len(word) for word in source(name).split()) + 14
    assert max(map(len, text.splitlines())) <= max(width, longest)
    words = re.findall(
        r"[A-Za-z0-9]{3,}", re.sub(r"<!--.*?-->|\]\([^)]*\)|!\[[^]]*", "", source(name))
    )
    kinds = {"mlxfun", "toml", "python", "fragment", "network"}  # what a fence is opened with
    shown = set(re.findall(r"[A-Za-z0-9]{3,}", text))
    assert set(words) - kinds - shown == set()
