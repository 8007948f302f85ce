"""Every key of the screen, as data. Bindings, the key bar, F1, the palette and tests read this.

scope: where a key works: "app" anywhere but in a text field, "experts" or "history" in that panel,
"always" in text fields too.
kind: "run" queues the command line `target`; "fill" puts it on the command line to be finished;
"do" is an action of the screen itself: a verb with its arguments. `{...}` in a target is filled in
from the state, in a help text it is the name of a key (see tui.keys.key_labels).

These are the keys as they come. What a key is called on the screen is asked of the state's
`names`, since users have their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from textual.binding import Binding

PanelName = Literal["experts", "chat", "plan", "history", "log", "mixer", "serve"]

Place = Literal[PanelName, "command"]
"""Where the focus is: in a panel, or on the command line."""

Scope = Literal[PanelName, "app", "always"]
"""Where a key works, see the module's text."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key. keys: as Textual writes them; bar: its rank in the key bar, 0 for not shown.

    also_in: panels in which it works beside its scope.
    """

    id: str
    keys: str
    label: str
    kind: Literal["run", "fill", "do"]
    target: str
    help: str
    scope: Scope = "app"
    bar: int = 0
    also_in: tuple[PanelName, ...] = ()

    def works_in(self, scope: Scope | Place) -> bool:
        """Whether it belongs to `scope`."""
        return scope in self.scopes

    @property
    def scopes(self) -> tuple[Scope, ...]:
        """Everywhere it works."""
        return (self.scope, *self.also_in)


KEYS: tuple[Key, ...] = (
    # The main workflow, in its order.
    Key("collect", "c", "calibrate", "fill", "{collect}",
        "watch the experts work on a data set", bar=1),
    Key("prune", "p", "prune", "fill", "{prune}", "stage a prune: choose the experts to remove", bar=2),
    Key("preview", "v", "preview", "run", "preview",
        "measure the candidate before deciding", bar=3),
    Key("apply", "a", "apply", "run", "apply", "apply the staged plan (undo reverts it)",
        bar=4),
    Key("discard", "d", "discard", "run", "discard", "drop the staged plan", bar=5),
    Key("flip", "f,x", "flip A/B", "run", "flip",
        "switch the live model between current and candidate", bar=6),
    Key("chat", "i", "chat", "do", "converse", "talk to the live model", bar=7),
    Key("undo", "u", "undo", "run", "undo", "undo the last edit or steering, bit for bit", bar=8),
    Key("redo", "r", "redo", "run", "redo", "redo what was undone", bar=9),
    Key("save", "s", "save", "fill", "{save}", "write the model to a directory", bar=10),
    Key("evaluate", "e", "evaluate", "run", "evaluate", "measure the current model"),
    Key("info", "I", "info", "run", "info", "describe the loaded model"),
    # Moving about.
    Key("command", "colon", "command", "do", "open_command", "type any command", bar=11),
    Key("panel_experts", "1", "experts", "do", "panel experts", "go to the experts"),
    Key("panel_chat", "2", "chat", "do", "panel chat", "go to the chat"),
    Key("panel_plan", "3", "plan", "do", "panel plan", "go to the staged plan"),
    Key("panel_history", "4", "history", "do", "panel history", "go to the history of states"),
    Key("panel_log", "5", "log", "do", "panel log", "go to the reports"),
    Key("panel_command", "6", "command line", "do", "stay_in_command", "go to the command line"),
    Key("panel_mixer", "7", "mixer", "do", "panel mixer", "go to the steering mixer"),
    Key("panel_serve", "8", "serving", "do", "panel serve", "go to the server and its requests"),
    Key("zoom", "z", "zoom", "do", "zoom", "give the focused panel the whole screen, or back",
        bar=13),
    Key("layout", "Z", "layout", "do", "layout",
        "next layout: balanced, a large map, or room for chat and reports"),
    Key("narrower", "less_than_sign", "narrower", "do", "stretch_panel -2 0",
        "make the focused panel narrower; the mouse moves frames too"),
    Key("wider", "greater_than_sign", "wider", "do", "stretch_panel 2 0",
        "make the focused panel wider"),
    Key("shorter", "left_curly_bracket", "shorter", "do", "stretch_panel 0 -1",
        "make the focused panel shorter"),
    Key("taller", "right_curly_bracket", "taller", "do", "stretch_panel 0 1",
        "make the focused panel taller"),
    Key("take", "Y", "take offer", "do", "take_offer",
        "take what the banner at the top offers, such as the session that was cut short"),
    Key("decline", "X", "hide offer", "do", "decline", "hide the banner at the top"),
    Key("theme", "t", "theme", "do", "next_theme", "next theme: dark, light, high contrast"),
    # The expert under the cursor.
    Key("closer", "enter", "open", "do", "closer",
        "the layer under the cursor, one line per expert; there, the expert's dossier", "experts",
        bar=20),
    Key("dossier", "W", "dossier", "run", "dossier {expert}",
        "one expert in detail: scores, top tokens, most similar expert", "experts", bar=28),
    Key("why", "w", "why", "run", "why {expert}", "the scores by which it is pruned or kept",
        "experts", bar=20),
    Key("steer_up", "plus,equals_sign", "force on", "run", "{steer_up}",
        "force this expert on: the router always selects it", "experts", bar=21),
    Key("steer_down", "minus", "force off", "run", "{steer_down}",
        "force this expert off: the router never selects it",
        "experts", bar=22),
    Key("steer_off", "0", "unsteer", "run", "{steer_off}", "stop steering this expert",
        "experts", bar=23),
    Key("metric", "m", "metric", "do", "next_metric", "show the next metric", "experts", bar=24),
    Key("scale", "o", "scale", "do", "scale", "colour scale: automatic, linear, log or rank",
        "experts", bar=25),
    Key("span", "b", "per layer/model", "do", "toggle per_layer",
        "scale colours per layer or over the whole model", "experts", bar=26),
    Key("fit", "g", "fit/pan", "do", "toggle fit",
        "fit all experts into the width, or one column each and scroll", "experts", bar=27),
    Key("sort", "S", "sort", "do", "toggle sort",
        "order the experts of each layer by score, highest first, or by number", "experts", bar=27),
    Key("find", "slash", "find", "do", "find", "jump to an expert by its name, such as 12:40",
        "experts", bar=27),
    Key("next_flagged", "n", "next flagged", "do", "flagged 1",
        "next expert that is pruned, steered, protected or never seen; after {find}, next match",
        "experts", bar=28),
    Key("previous_flagged", "N", "previous flagged", "do", "flagged -1",
        "previous expert that is pruned, steered, protected or never seen", "experts"),
    Key("table", "y", "table", "do", "shape table", "the map as a table",
        "experts", bar=28),
    Key("up", "up,k", "up", "do", "move -1 0",
        "layer above (in a layer: expert above)", "experts"),
    Key("down", "down,j", "down", "do", "move 1 0",
        "layer below (in a layer: expert below)", "experts"),
    Key("left", "left,h", "left", "do", "move 0 -1",
        "expert to the left (in a layer: layer above)", "experts"),
    Key("right", "right,l", "right", "do", "move 0 1",
        "expert to the right (in a layer: layer below)", "experts"),
    Key("row_start", "home", "first", "do", "edge -1", "first expert", "experts"),
    Key("row_end", "end", "last", "do", "edge 1", "last expert", "experts"),
    Key("page_up", "pageup", "page up", "do", "move -8 0", "eight up", "experts"),
    Key("page_down", "pagedown", "page down", "do", "move 8 0", "eight down",
        "experts"),
    # Inside a forward.
    Key("lens", "V", "lens", "fill", "{lens}",
        "what each layer would say after a text: a map of layers and tokens", bar=18),
    # The conversation.
    Key("both", "A", "A/B", "do", "both", "ask current and candidate the same question, side by side, or stop that",
        bar=17),
    Key("talk", "comma", "chat settings", "do", "talk",
        "system prompt, temperature, length, seed and thinking of the chat", "app"),
    Key("token_left", "left,h", "token", "do", "token -1",
        "previous token: its experts light up in the map", "chat", bar=20),
    Key("token_right", "right,l", "token", "do", "token 1",
        "next token: its experts light up in the map", "chat", bar=21),
    Key("token_side", "o", "other side", "do", "token_side",
        "the same token of the other answer, where current and candidate were asked", "chat", bar=22),
    Key("again", "g", "ask again", "do", "again", "answer the question again", "chat", bar=22),
    Key("revise", "enter", "edit", "do", "revise",
        "edit the question and continue from there", "chat", bar=23),
    Key("copy", "y", "copy", "do", "copy", "copy the answer", "chat", bar=24),
    Key("new_chat", "N", "new chat", "run", "chat --new", "start a new conversation", "chat", bar=25),
    Key("brush", "B", "tint tokens", "do", "brush",
        "highlight the tokens routed to the expert under the cursor, or stop that", "experts", bar=33),
    Key("stats_diff", "D", "compare", "fill", "stats diff a.npz b.npz",
        "compare two statistics files in the map", "experts", bar=34),
    # The steering mixer.
    Key("mix", "M", "to mixer", "do", "mix add", "add this expert to the steering mixer",
        "experts", bar=24),
    Key("mix_toggle", "space", "mute", "do", "mix toggle", "mute or unmute the channel",
        "mixer", bar=20),
    Key("mix_up", "plus,equals_sign,right,l", "more", "do", "mix fade 1",
        "move the fader up: the expert is selected more often", "mixer", bar=21),
    Key("mix_down", "minus,left,h", "less", "do", "mix fade -1",
        "move the fader down: the expert is selected less often", "mixer", bar=22),
    Key("mix_turn", "enter", "mode", "do", "mix turn",
        "force on, force off or bias; for a scan report, its other mode", "mixer", bar=23),
    Key("mix_remove", "backspace,delete", "remove", "do", "mix remove",
        "remove the channel from the mixer", "mixer", bar=24),
    # The reports.
    Key("read", "enter", "read", "do", "read_report", "show this report on the whole screen", "log",
        bar=20),
    Key("search_log", "slash", "search", "do", "search_log", "search all reports", "log", bar=21),
    Key("edit_report", "o", "open in editor", "do", "edit_report",
        "open this report in $EDITOR, or else in $PAGER", "log", bar=22),
    Key("next_match", "n", "next match", "do", "match 1", "next place with the searched words",
        "log", bar=23),
    Key("previous_match", "N", "previous match", "do", "match -1",
        "previous place with the searched words", "log"),
    Key("report_up", "up,k", "report above", "do", "report -1", "go to the report above", "log"),
    Key("report_down", "down,j", "report below", "do", "report 1", "go to the report below", "log"),
    # The server.
    Key("spotlight", "enter", "its experts", "do", "spotlight",
        "show the experts of this request alone in the map, or those of all", "serve", bar=20),
    Key("serve_pause", "space", "pause", "run", "{serve}",
        "let new requests wait, or answer them again", "serve", bar=21),
    Key("serve_drain", "D", "drain", "run", "serve drain",
        "refuse new requests, complete the others", "serve", bar=22),
    Key("serve_stop", "K", "stop", "fill", "serve stop",
        "complete the answers and close the server", "serve", bar=23),
    # Selecting experts to prune.
    Key("pick", "space", "select", "do", "pick toggle",
        "add this expert, or the range, to the experts to prune, or remove it from them", "experts",
        bar=19),
    Key("pick_more", "right_square_bracket", "more", "do", "pick dial 1",
        "prune one more expert in every layer, lowest scores first", "experts", bar=29,
        also_in=("plan",)),
    Key("pick_fewer", "left_square_bracket", "fewer", "do", "pick dial -1",
        "prune one fewer in every layer, highest scores are kept", "experts", bar=30,
        also_in=("plan",)),
    Key("pick_even", "E", "even out", "do", "pick even",
        "prune as many in every layer as in the one that loses most, by score", "experts",
        bar=31, also_in=("plan",)),
    Key("pick_below", "T", "threshold", "do", "pick threshold",
        "prune every expert whose share is at most that of the one under the cursor", "experts", bar=32),
    Key("range_column", "C", "column", "do", "pick column",
        "mark this expert number in all layers; {pick} adds it", "experts"),
    Key("range_row", "R", "row", "do", "pick row", "mark this layer; {pick} adds it", "experts"),
    Key("range_up", "shift+up,K", "mark up", "do", "stretch -1 0", "mark a range", "experts"),
    Key("range_down", "shift+down,J", "mark down", "do", "stretch 1 0", "mark a range", "experts"),
    Key("range_left", "shift+left,H", "mark left", "do", "stretch 0 -1", "mark a range",
        "experts"),
    Key("range_right", "shift+right,L", "mark right", "do", "stretch 0 1", "mark a range",
        "experts"),
    Key("dial_more", "plus,equals_sign", "more", "do", "pick dial 1",
        "prune one more expert in every layer, lowest scores first", "plan", bar=20),
    Key("dial_fewer", "minus", "fewer", "do", "pick dial -1",
        "prune one fewer in every layer, highest scores are kept", "plan", bar=21),
    Key("plan_save", "S", "save list", "fill", "plan save plan.json",
        "write the kept experts to a file that prune --expert-list reads", "plan", bar=22),
    Key("goto", "enter", "go there", "run", "goto {node}",
        "make the selected state the current model", "history", bar=20),
    Key("mark", "space", "mark", "do", "mark", "mark this state, to compare others with it",
        "history", bar=21),
    Key("compare", "equals_sign", "compare", "run", "compare {marked} {node}",
        "compare this state with the marked or current one: perplexity, KL, size, experts",
        "history", bar=22),
    Key("name", "N", "name", "fill", "name {node} ", "give this state a name", "history", bar=23),
    Key("compact", "K", "compact", "run", "compact", "free the memory of pruned experts",
        "history", bar=24),
    Key("help_here", "question_mark", "help", "do", "help",
        "explain the focused panel and its keys"),
    Key("ask_quit", "q", "quit", "do", "ask_leave", "ask whether to leave, naming what is unsaved"),
    # Everywhere, text fields included.
    Key("help", "f1", "help", "do", "help", "explain the focused panel and its keys", "always",
        bar=12),
    Key("to_map", "f2", "map", "do", "panel experts",
        "go to the experts, from a text field too; an answer continues", "always", bar=15),
    Key("to_mixer", "f7", "mixer", "do", "panel mixer",
        "go to the steering mixer, from a text field too; an answer continues", "always"),
    Key("form", "f4", "form", "do", "form",
        "fill in the typed command as a form; with nothing typed, choose one", "always", bar=15),
    Key("search_lines", "ctrl+r", "search lines", "do", "search_lines",
        "search earlier command lines", "always"),
    Key("new_line", "ctrl+j", "new line", "do", "new_line", "start a new line in the chat field",
        "always"),
    Key("palette", "ctrl+p", "palette", "do", "palette", "search every command and key",
        "always", bar=14),
    Key("escape", "escape", "stop", "do", "escape",
        "leave a field; stop the answer; twice: cancel the running job", "always", bar=15),
    Key("interrupt", "ctrl+c", "cancel", "do", "interrupt",
        "cancel the running job; in a text field ctrl+c copies what is selected there", "always"),
    Key("quit", "ctrl+q", "quit", "do", "leave", "leave the shell", "always", bar=16),
)  # fmt: skip

BY_ID = {key.id: key for key in KEYS}
# Commands of two words.
FAMILIES = ("plan", "stats")


def bindings(scope: Scope) -> Iterator[Binding]:
    """The Textual bindings of one scope; each leads to the screen's one key action.

    They have priority, which makes Textual run them before it looks at the next key: the letters
    behind a `:` must find the focus in the command line. The screen passes keys on to a text
    field that has the focus.
    """
    for key in KEYS:
        if key.works_in(scope):
            yield Binding(
                key.keys,
                f"screen.key('{key.id}')",
                key.label,
                id=key.id,
                priority=key.id != "interrupt",  # a field may copy first
            )


def keys_for(scope: Scope | Place) -> list[Key]:
    """The keys that work while the panel `scope` has the focus: its own first. On the command line
    letters are letters."""
    wanted: tuple[Scope, ...] = ("always",) if scope == "command" else (scope, "app", "always")
    return [key for want in wanted for key in KEYS if key.works_in(want)]


def command_of(key: Key) -> str | None:
    """The command that `key` runs or offers, None for an action of the screen itself."""
    if key.id == "chat":
        return "chat"
    if key.kind == "do":
        return None
    words = key.target.split()
    if words[0] in FAMILIES:
        return " ".join(words[:2])
    return words[0].strip("{}").split("_")[0]


def command_words(key: Key) -> str:
    """What can be typed instead of pressing `key`: its whole line if that is constant."""
    return key.target if key.kind == "run" and "{" not in key.target else command_of(key) or ""
