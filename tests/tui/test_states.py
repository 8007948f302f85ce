"""The history panel's meter and marks, and the plan panel's guardrails."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlxfun.editing.reports import HistoryNode, HistoryReport
from mlxfun.events import JobEnded
from tests.fake_selection import MIB
from tests.tui.driving import STAGED, Shell, drive, ready
from tests.tui.test_hints import state_after
from tui import hints
from tui.keys.keymap import BY_ID
from tui.widgets.history import meter, node_line
from tui.widgets.plan import guardrails, memory

NODE = HistoryNode(1, 0, "prune --n-prune 4", "e5f60718aa", 0, {}, "small [b]one[/b]")


@pytest.mark.parametrize(
    ("held", "budget", "drawn"),
    [
        (0, 512 * MIB, "──────────────── undo holds 0 B of 512.0 MiB (0%)"),
        (256 * MIB, 512 * MIB, "━━━━━━━━──────── undo holds 256.0 MiB of 512.0 MiB (50%)"),
        (600 * MIB, 512 * MIB, "━━━━━━━━━━━━━━━━ undo holds 600.0 MiB of 512.0 MiB (117%)"),
        (24_576, None, "undo holds 24.0 KiB, no limit"),
    ],
)
def test_the_meter_shows_what_the_undo_budget_holds(held: int, budget, drawn: str) -> None:
    assert meter(HistoryReport((), 0, held, budget), 80).plain == drawn


def test_a_named_state_shows_its_name_as_it_is() -> None:
    said = node_line("", NODE, current=True, marked=True).plain
    assert said == "● ◆ 1 small [b]one[/b]  prune --n-prune 4  e5f60718"


def test_the_state_to_compare_with_is_the_marked_one_then_the_models() -> None:
    state = state_after("load demo", *STAGED, "apply", "undo")
    assert hints.compared_with(state, 1) == 0
    assert hints.compared_with(state, 0) == 1
    assert hints.compared_with(replace(state, marked=1), 0) == 1
    assert hints.compared_with(replace(state, marked=1), 1) == 0
    assert hints.why_not(state_after("load demo"), BY_ID["compare"]) == "there is one state only"


def test_a_mark_leaves_the_cursor_where_it_is() -> None:
    @ready(*STAGED, "apply")
    async def test(shell: Shell) -> None:
        await shell.press("4", "home", "space")
        assert shell.app.state.marked == 0
        assert shell.app.main.selected_node == 0
        await shell.press("j", "equals_sign")
        assert shell.engine.lines[-1] == "compare 0 1"
        await shell.press("N")
        assert shell.app.main.command.input.value == "name 1 "

    drive(test)


def test_guardrails_say_whether_apply_would_let_the_plan_pass() -> None:
    state = state_after("load demo", *STAGED, "preview")
    limits = (("max-kl", 0.01), ("max-perplexity-ratio", 1.1))
    assert guardrails(limits, state.view.scores).plain.splitlines() == [
        "✗ KL 0.0312 above 0.01: apply refuses",
        "✓ perplexity ratio 1.036 within 1.1",
    ]
    assert guardrails(limits[:1], None).plain == "guardrail KL ≤ 0.01: apply measures first"


def test_guardrails_come_from_the_settings() -> None:
    from commands.table.shell import SettingsReport
    from tui.state.reducer import reduce

    report = SettingsReport({"seed": 0, "max-kl": 0.2, "max-perplexity-ratio": None})
    assert report.summary() == "seed 0, max-kl 0.2, max-perplexity-ratio off"
    state = reduce(state_after("load demo"), JobEnded(9, "set", report, None, 0.0, ""), 1.0)
    assert state.limits == (("max-kl", 0.2),)


def test_the_plan_tells_memory_and_uneven_layers() -> None:
    state = state_after("load demo", *STAGED)
    assert memory(state.view).plain == (
        "memory 14.0 MiB of 8.0 GiB, 24.0 KiB of it for the plan; peak while staging 20.0 MiB"
    )
    plan = state.view.plan
    assert plan is not None
    assert plan.left == "12"
    assert replace(plan, kept={**plan.kept, 0: (1, 2, 3)}).left == "3 to 12"
