"""The main job by keys alone, on the fake engine."""

from __future__ import annotations

import pytest

from tests.tui.driving import Shell, drive


@pytest.mark.parametrize("size", [(80, 24), (160, 45), (60, 18)])
def test_a_whole_session_can_be_driven_by_keys_alone(size: tuple[int, int]) -> None:
    async def session(shell: Shell) -> None:
        engine = shell.engine
        engine.finish()
        await shell.settle()
        for keys in (
            ("c", "enter"),
            ("p", "enter"),
            ("v",),
            ("i", *"hello", "enter"),
            ("escape", "x"),
            ("a",),
            ("u",),
            ("r",),
            ("s", "enter"),
        ):
            await shell.press(*keys)
            engine.finish()
            await shell.settle()

    shell = drive(session, size=size)
    assert shell.engine.lines == [
        "load demo",
        "collect --dataset demo:mixed",
        "prune --n-prune 4",
        "preview",
        "chat hello",
        "flip",
        "apply",
        "undo",
        "redo",
        "save out",
    ]
    assert shell.app.state.view.state == "e5f60718"
    assert [entry.level for entry in shell.app.state.log] == ["ok"] * 10


def test_startup_lines_wait_for_the_first_paint() -> None:
    async def look(shell: Shell) -> None:
        assert shell.engine.lines == ["load demo"]
        assert "No model yet" in str(shell.app.main.query_one("#empty").visual)

    drive(look)
