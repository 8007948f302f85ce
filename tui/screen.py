"""The main screen: lays out the panels, passes each the state, forwards their messages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import ClassVar, get_args

from rich.console import RenderableType
from textual import events, on
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import Container, Vertical
from textual.screen import Screen
from textual.widgets import Input, TextArea

from mlxfun.report import Report
from tui import hints
from tui.keys.keymap import BY_ID, PanelName, Place, bindings
from tui.layout import RIGHT, Arrangement, Geometry, Mode, arrange, geometry, moved, stretched
from tui.messages import EdgeMoved, PanelChosen, Resized
from tui.state.app_state import AppState
from tui.state.sizes import Sizes
from tui.widgets.banner import Banner
from tui.widgets.command_line import CommandLine, Completer
from tui.widgets.conversation.chat import ChatPanel
from tui.widgets.conversation.transcript import Transcript
from tui.widgets.experts.experts import ExpertsPanel
from tui.widgets.experts.mixer import MixerPanel
from tui.widgets.history import HistoryPanel
from tui.widgets.keybar import KeyBar
from tui.widgets.log import LogPanel
from tui.widgets.panel import Panel
from tui.widgets.plan import PlanPanel
from tui.widgets.serve import ServePanel
from tui.widgets.status import StatusLine
from tui.widgets.tabs import TabStrip

CHROME = 4
"""Lines of the command line, the status line and the key bar."""


class MainScreen(Screen[None]):
    """All panels, the command line, the status line and the key bar.

    complete: the completions of a command line. past: earlier command lines. renderer: draws a
    report. use: carries out a key of the keymap, by its id.
    """

    BINDINGS: ClassVar[list[BindingType]] = [*bindings("app"), *bindings("always")]
    AUTO_FOCUS = None
    # The modes are classes of the screen itself, which scoped rules cannot name.
    SCOPED_CSS = False

    DEFAULT_CSS = """
    MainScreen { background: $background; }
    #body { height: 1fr; layout: horizontal; }
    #left, #right { height: 1fr; width: 1fr; }
    .-split #body, .-single #body { layout: vertical; }
    .-split #left, .-single #left { width: 1fr; }
    .-split #right, .-single #right { width: 1fr; }
    .-strip-only #right { height: 1fr; }
    .-strip-only #left { height: 1; }
    .-single TabStrip { dock: top; }
    """

    def __init__(
        self,
        complete: Completer,
        past: Sequence[str],
        renderer: Callable[[Report], RenderableType],
        use: Callable[[str], None],
    ) -> None:
        super().__init__()
        self._use = use
        self._complete, self._past, self._renderer = complete, past, renderer
        self._state = AppState()
        self._arrangement: Arrangement | None = None
        self._given: tuple[Arrangement, Geometry] | None = None

    def compose(self) -> ComposeResult:
        yield Banner()
        with Container(id="body"):
            with Vertical(id="left"):
                yield ExpertsPanel()
                yield TabStrip()
                yield ChatPanel()
            with Vertical(id="right"):
                yield PlanPanel()
                yield MixerPanel()
                yield ServePanel()
                yield HistoryPanel()
                yield LogPanel(self._renderer)
        yield CommandLine(self._complete, self._past)
        yield StatusLine()
        yield KeyBar()

    # Showing ----------------------------------------------------------------------------------
    def show(self, state: AppState, now: float) -> None:
        """Bring every widget up to `state` at clock `now`."""
        self._state = state
        with self.app.batch_update():
            self._arrange()
            self.query_one(Banner).show(state)
            self.query_one(ExpertsPanel).show(state)
            self.query_one(ChatPanel).show(state)
            self.query_one(PlanPanel).show(state)
            self.query_one(MixerPanel).show(state)
            self.query_one(ServePanel).show(state)
            self.query_one(HistoryPanel).show(state)
            self.query_one(LogPanel).show(state)
            self._share_out()
            self.query_one(CommandLine).show(state, hints.next_step(state))
            self.query_one(StatusLine).show(state, now)
            self._show_keys()
        if self.focused is None and state.view.model is not None:
            self.focus_panel(state.panel)

    def _arrange(self) -> None:
        state, size = self._state, self.app.size
        plan = arrange(size.width, size.height, state)
        if plan != self._arrangement:
            self._arrangement = plan
            for mode in get_args(Mode):
                self.set_class(mode == plan.mode, f"-{mode}")
            for panel in self.query(Panel):
                panel.display = panel.panel in plan.visible
            right = any(name not in ("experts", "chat") for name in plan.visible)
            left = any(name in ("experts", "chat") for name in plan.visible)
            self.query_one("#right").display = right
            self.query_one("#left").display = left or bool(plan.tabs)
            self.set_class(not left, "-strip-only")
            self._rescue_focus(plan)
        strip = self.query_one(TabStrip)
        strip.display = bool(plan.tabs)
        strip.show(plan, self._marked(), state.names)

    def _share_out(self) -> None:
        """Give every panel its place; what its contents need is known once it has been shown."""
        plan, size = self._arrangement, self.app.size
        if plan is None:
            return
        rows = size.height - CHROME - (self._state.offer is not None) - bool(plan.tabs)
        panels = self._panels
        shown = (p for p in panels if p.panel in RIGHT and p.panel in plan.visible)
        wanted = {p.panel: p.wanted() for p in shown}
        known = {name: lines for name, lines in wanted.items() if lines is not None}
        now = geometry(plan, self._state, (size.width, rows), known)
        if (plan, now) == self._given:
            return
        self._given = (plan, now)
        wide, split = plan.mode == "wide", plan.mode == "split"
        heights = dict(now.right)
        if wide:
            heights |= {"experts": now.upper, "chat": rows - now.upper}
        elif split:
            heights["experts"] = now.upper
        for panel in panels:
            panel.styles.height = heights.get(panel.panel, "1fr")
        left = self.query_one("#left")
        left.styles.width = now.left if wide else "1fr"
        if split and "chat" not in plan.visible:
            left.styles.height = now.upper + 1  # the map and the strip
        else:
            left.styles.height = 1 if self.has_class("-strip-only") else "1fr"
        # In another width the contents need other heights.
        self.call_after_refresh(self._share_out)

    @cached_property
    def _panels(self) -> list[Panel]:
        """The panels, which are there as long as the screen is."""
        return list(self.query(Panel))

    @on(EdgeMoved)
    def _edge_moved(self, event: EdgeMoved) -> None:
        event.stop()
        if self._given is not None:
            x, y = event.to[0], event.to[1] - (self._state.offer is not None)
            sizes = moved(self._state.sizes, self._given[1], event.panel, event.edge, (x, y))
            self.post_message(Resized(sizes, keep=event.done))

    def stretched(self, wider: int, taller: int) -> Sizes:
        """The sizes with the focused panel so many columns wider and lines taller."""
        name = self.focused_panel
        if self._given is None or name == "command":
            return self._state.sizes
        return stretched(self._state.sizes, self._given[1], name, wider, taller)

    def _rescue_focus(self, plan: Arrangement) -> None:
        """Move the focus to a visible panel if its own is hidden."""
        gone = self.focused_panel not in (*plan.visible, "command")
        if self.focused is not None and gone and not self.in_field:
            self.focus_panel(plan.visible[-1])

    def _marked(self) -> frozenset[str]:
        marked = set(self._state.unseen) - {"plan"}  # marked below if there is a plan
        if self._state.view.plan is not None:
            marked.add("plan")
        if any(channel.on for channel in self._state.mixer):
            marked.add("mixer")
        if self._state.turns and not self._state.turns[-1].done:
            marked.add("chat")
        return frozenset(marked)

    # Focus ------------------------------------------------------------------------------------
    @property
    def focused_panel(self) -> Place:
        """The name of the panel that has the focus, "command" for the command line."""
        node = self.focused
        for ancestor in node.ancestors_with_self if node is not None else ():
            if isinstance(ancestor, Panel):
                return ancestor.panel
            if isinstance(ancestor, CommandLine):
                return "command"
        return self._state.panel

    def _show_keys(self) -> None:
        self.query_one(KeyBar).show(self._state, self.focused_panel, typing=self.in_field)

    @property
    def selected_node(self) -> int | None:
        """The state under the cursor of the history panel."""
        return self.query_one(HistoryPanel).selected

    @property
    def selected_request(self) -> int | None:
        """The request under the cursor of the server's panel."""
        return self.query_one(ServePanel).selected

    @property
    def mixer(self) -> MixerPanel:
        """The steering mixer."""
        return self.query_one(MixerPanel)

    @property
    def command(self) -> CommandLine:
        """The command line."""
        return self.query_one(CommandLine)

    def panel_named(self, name: Place) -> Panel | None:
        """The panel called `name`."""
        return next((panel for panel in self.query(Panel) if panel.panel == name), None)

    def focus_panel(self, name: PanelName) -> None:
        """Give a panel, which must be on screen, the focus."""
        panel = self.panel_named(name)
        if panel is not None:
            # At once: letters may be on their way.
            self.set_focus(panel.entrance())

    @property
    def in_field(self) -> bool:
        """Whether a text field has the focus."""
        return isinstance(self.focused, Input | TextArea)

    def leave_field(self) -> None:
        """Move the focus from a text field to a panel."""
        if self.focused_panel == "chat":
            transcript = self.query_one(Transcript)
            if transcript.display:
                transcript.focus()
            else:
                self.focus_panel("experts")
        else:
            self.focus_panel("experts" if self._state.panel == "chat" else self._state.panel)

    def on_descendant_focus(self, event: events.DescendantFocus) -> None:
        for ancestor in event.widget.ancestors_with_self:
            if isinstance(ancestor, Panel):
                self.post_message(PanelChosen(ancestor.panel, move=False))
                return
        self._show_keys()

    def on_resize(self, _: events.Resize) -> None:
        self._arrange()
        self._share_out()
        self._show_keys()

    # Keys -------------------------------------------------------------------------------------
    def action_key(self, key: str) -> None:
        """Carry out a key of the keymap."""
        # Not a message: the next key would overtake it.
        self._use(key)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Disable single-letter keys while a text field has the focus."""
        if action == "key" and self.in_field:
            return BY_ID[str(parameters[0])].scope == "always"
        return super().check_action(action, parameters)
