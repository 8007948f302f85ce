"""The screen with a dense model: no heatmap, no keys for experts, everything else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from commands.conditions import with_experts
from mlxfun.events import Event
from mlxfun.report import Report
from tests.fake_engine import FakeEngine
from tests.tui.driving import Shell, drive, ready
from tui import hints
from tui.keys.keymap import BY_ID
from tui.state.app_state import AppState


class DenseEngine(FakeEngine):
    """Loads a model without experts."""

    def _do_load(self, job: int, args: list[str]) -> Iterator[Event | Report]:
        for event in super()._do_load(job, args):
            view = self._view
            if view.model is not None and view.heat is not None:
                dense = replace(
                    view.model, model_type="llama", moe_layers=0, experts=0, experts_kept=0
                )
                self._view = replace(view, model=dense, heat=None)
            yield event


def dense_state(*lines: str) -> AppState:
    engine = DenseEngine()
    engine.play("load demo", *lines)
    return AppState(view=engine.view(), rows=engine.rows(), lines=lines)


@pytest.mark.parametrize("size", [(80, 24), (160, 45)])
def test_every_panel_of_a_dense_model_says_what_there_is(size: tuple[int, int]) -> None:
    @ready()
    async def test(shell: Shell) -> None:
        assert "llama is a dense model: it has no experts to show" in shell.screen
        await shell.press("2")
        assert "experts at work" not in shell.screen
        assert "Press i and ask something." in shell.screen
        await shell.press("escape", "3")
        assert "Type abliterate to stage the removal of a refusal direction." in shell.screen
        await shell.press("7")
        assert "The model has no experts to steer." in shell.screen
        await shell.press("1", "right", "down", "space", "t", "m", "greater_than_sign", "enter")
        assert "llama is a dense model: it has no experts to show" in shell.screen
        assert shell.app.state.draft is None
        assert shell.engine.lines == ["load demo"]

    drive(test, size=size, engine=DenseEngine())


def test_after_a_dense_model_the_map_of_the_next_one_is_drawn() -> None:
    class Either(DenseEngine):
        def _do_load(self, job: int, args: list[str]) -> Iterator[Event | Report]:
            kind = DenseEngine if len(self.lines) < 2 else FakeEngine
            yield from kind._do_load(self, job, args)

    @ready()
    async def test(shell: Shell) -> None:
        assert "dense model" in shell.screen
        await shell.play("load other")
        assert "dense model" not in shell.screen
        await shell.press("7")
        assert "No expert is steered." in shell.screen

    drive(test, engine=Either())


@pytest.mark.parametrize("key", ["pick", "pick_more", "table", "sort", "mix"])
def test_keys_of_the_map_say_that_there_are_no_experts(key: str) -> None:
    assert hints.why_not(dense_state(), BY_ID[key]) == "the model has no experts"


def test_the_next_step_is_to_chat_or_measure_or_abliterate() -> None:
    state = dense_state()
    assert hints.next_key(state) == "chat"
    assert hints.next_step(state) == (
        "A dense model: i chats with it, e evaluates it, and abliterate edits it."
    )
    first = hints.for_bar(state, "experts", 80)[0]
    assert (first.key, first.applies, first.leads) == ("chat", True, True)


def test_measuring_keys_name_a_data_set_since_nothing_was_held_out() -> None:
    state = dense_state()
    assert hints.command_line(state, BY_ID["preview"]) == "preview --dataset demo:eval"
    state = replace(state, lines=("evaluate --dataset my.jsonl --max-samples 5",))
    line = "preview --dataset my.jsonl --max-samples 5"
    assert hints.command_line(state, BY_ID["preview"]) == line
    state = replace(state, lines=(line.replace("my", "own"), *state.lines))
    assert hints.command_line(state, BY_ID["preview"]) == line.replace("my", "own")


def test_the_reason_of_a_greyed_command_is_one_sentence() -> None:
    assert with_experts(dense_state().view) == "llama is a dense model: it has no experts"
    assert with_experts(FakeEngine().view()) == "no model is loaded: type load PATH, or load demo"
