"""Every key of the keymap, pressed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from commands.registry import Row
from mlxfun.serving.snapshot import RequestLine, ServingReport
from mlxfun.steering.reports import SteerReport
from tests.fake_engine import FakeEngine
from tests.tui.driving import CALIBRATED, STAGED, Shell, drive, ready
from tui.input import expert_selection
from tui.keys.keymap import BY_ID, KEYS, Key
from tui.screen import MainScreen
from tui.state.app_state import ChatOptions, Offer
from tui.state.mixer_channels import Channel
from tui.state.sizes import BALANCED
from tui.widgets.conversation.chat import ChatPanel
from tui.widgets.conversation.chat_input import ChatInput
from tui.widgets.conversation.chat_settings import ChatSettings
from tui.widgets.dialogs.find import FindScreen
from tui.widgets.dialogs.help import HelpScreen
from tui.widgets.dialogs.leaving import LeaveScreen
from tui.widgets.dialogs.line_search import LineSearch
from tui.widgets.dialogs.pick import PickScreen
from tui.widgets.dialogs.report_screen import ReportScreen
from tui.widgets.log import Reports


class Willing(FakeEngine):
    """An engine on which every command always applies, with a server that answers a request."""

    def __init__(self) -> None:
        super().__init__()
        request = RequestLine(7, "openai", "base", False, False, 400, 300, 37, 12.3, 3.0)
        self.served = ServingReport("127.0.0.1:8080", "open", (request,))

    def rows(self) -> tuple[Row, ...]:
        return tuple(replace(row, enabled=True, reason="") for row in super().rows())


RUN_LINES = {
    "preview": "preview",
    "apply": "apply",
    "discard": "discard",
    "flip": "flip",
    "undo": "undo",
    "redo": "redo",
    "evaluate": "evaluate",
    "info": "info",
    "why": "why 0:0",
    "steer_up": "steer --clear --activate 0:0",
    "steer_down": "steer --clear --deactivate 0:0",
    "steer_off": "steer --clear",
    "goto": "goto 0",
    "dossier": "dossier 0:0",
    "new_chat": "chat --new",
    "compare": "compare 1 0",
    "compact": "compact",
    "serve_pause": "serve pause",
    "serve_drain": "serve drain",
}
FILL_LINES = {
    "collect": "collect --dataset demo:mixed",
    "prune": "prune --n-prune 4",
    "save": "save out",
    "plan_save": "plan save plan.json",
    "stats_diff": "stats diff a.npz b.npz",
    "name": "name 0 ",
    "lens": "lens ",
    "serve_stop": "serve stop",
}


async def home(shell: Shell, key: Key) -> None:
    """The focus where `key` works."""
    place = key.scope.split(",")[0]
    shell.app.main.focus_panel("experts" if place in ("app", "always") else place)
    await shell.settle()
    if place == "chat":
        shell.app.main.leave_field()
    await shell.settle()


def test_every_key_of_a_command_queues_its_line() -> None:
    @ready(*STAGED, "apply", "undo", "chat hello")
    async def test(shell: Shell) -> None:
        for key in KEYS:
            for name in key.keys.split(",") if key.kind == "run" else ():
                await home(shell, key)
                before = len(shell.engine.lines)
                await shell.press(name)
                assert shell.engine.lines[before:] == [RUN_LINES[key.id]], f"{key.id}: {name}"

    drive(test, engine=Willing())


def test_every_key_that_prefills_offers_its_line_and_runs_nothing() -> None:
    @ready(*CALIBRATED)
    async def test(shell: Shell) -> None:
        before = list(shell.engine.lines)
        for key in KEYS:
            if key.kind == "fill":
                await home(shell, key)
                await shell.press(key.keys)
                assert shell.app.main.command.input.has_focus
                assert shell.app.main.command.input.value == FILL_LINES[key.id]
        assert shell.engine.lines == before

    drive(test, engine=Willing())


def shown(shell: Shell, name: str) -> bool:
    panel = shell.app.main.panel_named(name)
    return panel is not None and panel.display and shell.app.main.focused_panel == name


def going(shell: Shell) -> list[int]:
    """How many experts each layer would lose."""
    mask = expert_selection.pruned_mask(shell.app.state)
    return [] if mask is None else mask.sum(axis=1).tolist()


def mixed(shell: Shell) -> list[str]:
    return [
        f"{'on' if c.on else 'off'} {c.way} {c.layer}:{c.expert} {c.level:g}"
        for c in shell.app.state.mixer
    ]


def at_most_as_busy(shell: Shell, layer: int, expert: int) -> list[int]:
    """How many of each layer have no more of its work than this expert."""
    scores = shell.app.state.view.heat.metrics["reap_sum"].tolist()
    limit = scores[layer][expert] / sum(scores[layer])
    return [sum(x / sum(row) <= limit for x in row) for row in scores]


DO_EFFECTS: dict[str, Callable[[Shell], bool]] = {
    "chat": lambda s: s.app.main.focused_panel == "chat" and s.app.main.in_field,
    "command": lambda s: s.app.main.command.input.has_focus,
    "panel_command": lambda s: s.app.main.command.input.has_focus,
    "panel_experts": lambda s: shown(s, "experts"),
    "panel_chat": lambda s: shown(s, "chat"),
    "panel_plan": lambda s: shown(s, "plan"),
    "panel_history": lambda s: shown(s, "history"),
    "panel_log": lambda s: shown(s, "log"),
    "zoom": lambda s: s.app.state.zoomed,
    "layout": lambda s: s.app.state.sizes.preset == "map",
    "wider": lambda s: s.app.state.sizes.left > 0.6,
    "narrower": lambda s: s.app.state.sizes.left < 0.6,
    "taller": lambda s: (s.app.state.sizes.upper or 0) > 0.6,
    "shorter": lambda s: 0 < (s.app.state.sizes.upper or 0) < 0.6,
    "read": lambda s: isinstance(s.app.screen, ReportScreen),
    "search_log": lambda s: isinstance(s.app.screen, FindScreen),
    "edit_report": lambda s: "cannot be handed over" in s.echo,
    "next_match": lambda s: "nothing is searched yet" in s.echo,
    "previous_match": lambda s: "nothing is searched yet" in s.echo,
    "report_up": lambda s: s.app.main.query_one(Reports).at < len(s.app.state.log) - 1,
    "report_down": lambda s: s.app.main.query_one(Reports).at >= len(s.app.state.log) - 2,
    "find": lambda s: isinstance(s.app.screen, FindScreen),
    "next_flagged": lambda s: s.app.state.cursor == (0, 3),
    "previous_flagged": lambda s: s.app.state.cursor == (0, 3),
    "help_here": lambda s: isinstance(s.app.screen, HelpScreen),
    "ask_quit": lambda s: isinstance(s.app.screen, LeaveScreen),
    "search_lines": lambda s: isinstance(s.app.screen, LineSearch),
    "form": lambda s: isinstance(s.app.screen, PickScreen),
    "new_line": lambda s: s.app.main.query_one(ChatInput).value == "\n",
    "take": lambda s: s.engine.lines[-1] == "resume",
    "decline": lambda s: not s.app.state.offers,
    "theme": lambda s: s.app.theme == "mlxfun-light",
    "metric": lambda s: s.app.state.heat.metric == "answer",
    "scale": lambda s: s.app.state.heat.scale == "linear",
    "span": lambda s: not s.app.state.heat.per_layer,
    "fit": lambda s: not s.app.state.heat.fit,
    "closer": lambda s: s.app.state.heat.shape == "layer",
    "table": lambda s: s.app.state.heat.shape == "table",
    "up": lambda s: s.app.state.cursor == (1, 5),
    "down": lambda s: s.app.state.cursor == (3, 5),
    "left": lambda s: s.app.state.cursor == (2, 4),
    "right": lambda s: s.app.state.cursor == (2, 6),
    "row_start": lambda s: s.app.state.cursor == (2, 0),
    "row_end": lambda s: s.app.state.cursor == (2, 15),
    "page_up": lambda s: s.app.state.cursor == (0, 5),
    "page_down": lambda s: s.app.state.cursor == (5, 5),
    "pick": lambda s: going(s) == [0, 0, 1, 0, 0, 0],
    "pick_more": lambda s: going(s) == [1] * 6,
    "pick_fewer": lambda s: going(s) == [0] * 6 and s.app.state.draft is not None,
    "pick_even": lambda s: going(s) == [0] * 6 and s.app.state.draft is not None,
    "pick_below": lambda s: going(s) == at_most_as_busy(s, 2, 5),
    "dial_more": lambda s: going(s) == [1] * 6,
    "dial_fewer": lambda s: going(s) == [0] * 6 and s.app.state.draft is not None,
    "range_column": lambda s: (s.app.state.anchor, s.app.state.cursor) == ((0, 5), (5, 5)),
    "range_row": lambda s: (s.app.state.anchor, s.app.state.cursor) == ((2, 0), (2, 15)),
    "range_up": lambda s: (s.app.state.anchor, s.app.state.cursor) == ((2, 5), (1, 5)),
    "range_down": lambda s: (s.app.state.anchor, s.app.state.cursor) == ((2, 5), (3, 5)),
    "range_left": lambda s: (s.app.state.anchor, s.app.state.cursor) == ((2, 5), (2, 4)),
    "range_right": lambda s: (s.app.state.anchor, s.app.state.cursor) == ((2, 5), (2, 6)),
    "mix": lambda s: shown(s, "mixer") and mixed(s) == ["on level 2:5 0.5"],
    "mix_toggle": lambda s: mixed(s) == ["off level 2:5 0.5"],
    "mix_up": lambda s: mixed(s) == ["on level 2:5 1"],
    "mix_down": lambda s: mixed(s) == ["off level 2:5 0"],
    "mix_turn": lambda s: mixed(s) == ["on in 2:5 0"],
    "mix_remove": lambda s: mixed(s) == [],
    "panel_mixer": lambda s: shown(s, "mixer"),
    "panel_serve": lambda s: shown(s, "serve"),
    "spotlight": lambda s: s.app.state.spotlight == 7,
    "sort": lambda s: s.app.state.heat.sort,
    "to_map": lambda s: shown(s, "experts"),
    "to_mixer": lambda s: shown(s, "mixer"),
    "mark": lambda s: s.app.state.marked == 0,
    "both": lambda s: s.app.state.talk.both and s.app.main.in_field,
    "talk": lambda s: isinstance(s.app.screen, ChatSettings),
    "token_left": lambda s: s.app.state.token == (s.app.state.turns[-1].job, 6),
    "token_right": lambda s: s.app.state.token == (s.app.state.turns[-1].job, 0),
    "token_side": lambda s: "there is no other side" in s.echo,
    "again": lambda s: s.engine.lines[-1] == "chat --back 1",
    "revise": lambda s: getattr(s.app.focused, "value", "") == "hello",
    "copy": lambda s: s.app.clipboard == "An expert is a small network.",
    "brush": lambda s: s.app.state.brush,
    "help": lambda s: isinstance(s.app.screen, HelpScreen),
    "palette": lambda s: not isinstance(s.app.screen, MainScreen | HelpScreen),
    "escape": lambda s: s.app.state.job is not None and "esc again" in s.echo,
    "interrupt": lambda s: s.engine.cancelled == 1,
    "quit": lambda s: s.app.return_code == 0 and not s.app.is_running,
}


def test_every_key_of_the_screen_itself_does_what_it_says() -> None:
    @ready(*CALIBRATED, "chat hello")
    async def test(shell: Shell) -> None:
        app = shell.app
        for key in KEYS:
            if key.kind != "do" or key.id == "quit":
                continue
            for name in key.keys.split(","):
                shell.engine.finish()
                await shell.settle()
                while not isinstance(app.screen, MainScreen):
                    await shell.press("escape")
                app.main.query_one(ChatPanel).fill("")
                app.theme = "mlxfun-dark"
                app.state = replace(
                    app.state,
                    cursor=(2, 5),
                    anchor=None,
                    draft=None,
                    token=None,
                    talk=ChatOptions(),
                    mixer=(Channel(True, "level", 2, 5, 0.5),) if key.works_in("mixer") else (),
                    zoomed=False,
                    sizes=BALANCED,
                    spotlight=None,
                    offers=(Offer("a session was cut short", "resume"),),
                    heat=replace(app.state.heat, metric="reap_sum", scale="auto", per_layer=True,
                                 fit=True, shape="map", sort=False),
                )  # fmt: skip
                app._show()
                if key.id == "both":
                    steering = SteerReport({0: (1,)}, {})
                    app.state = replace(app.state, view=replace(app.state.view, steering=steering))
                if key.id in ("escape", "interrupt"):
                    shell.engine.run("evaluate")
                    shell.engine.step()
                await home(shell, key)
                if key.id == "new_line":
                    app.main.focus_panel("chat")
                await shell.press(name)
                assert DO_EFFECTS[key.id](shell), f"{key.id}: {name}"

    drive(test, engine=Willing())


def test_the_key_that_leaves_leaves() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        await shell.pilot.press("ctrl+q")

    shell = drive(test)
    assert shell.app.return_code == 0


def test_no_key_of_the_keymap_is_untested() -> None:
    assert set(RUN_LINES) | set(FILL_LINES) | set(DO_EFFECTS) == set(BY_ID)


def test_a_key_that_does_not_apply_says_why_and_runs_nothing() -> None:
    @ready()
    async def test(shell: Shell) -> None:
        before = list(shell.engine.lines)
        await shell.press("a")
        assert shell.engine.lines == before
        assert shell.echo == "! apply: nothing is staged: prune --n-prune 4"

    drive(test)


def test_in_a_text_field_keys_are_letters() -> None:
    @ready(*STAGED)
    async def test(shell: Shell) -> None:
        before = list(shell.engine.lines)
        await shell.press("i", "a", "d", "u", "1", "z", "colon", "plus")
        assert shell.app.main.focused_panel == "chat"
        assert getattr(shell.app.focused, "value", "") == "adu1z:+"
        assert shell.engine.lines == before

    drive(test)
