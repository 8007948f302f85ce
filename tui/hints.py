"""Which keys apply now, why others do not, and the next step: pure functions of the state."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from rich.cells import cell_len

from commands.conditions import comparable, edited, steering_in_force
from mlxfun.steering.reports import SteerReport
from mlxfun.steering.wish import cells_of
from mlxfun.text import counted
from tui.input import chat_actions, expert_selection
from tui.keys.keymap import BY_ID, Key, Place, command_of, keys_for
from tui.state import serving
from tui.state.app_state import AppState
from tui.state.chat_turns import quoted
from tui.state.steering import full_line, step_name
from tui.text import shortened

UNDO_ROOM = 18
"""Columns of the key bar for what undo would take back."""
TOLERABLE_RATIO = 1.25
"""Perplexity over the checkpoint's above which the next step is to discard, not to apply."""
# What to do next, by the id of the key for it.
STEPS = {
    "collect": "Press {collect} to calibrate: watch which experts work.",
    "prune": "Press {prune} to stage a prune, or select experts with {pick}. Staging changes no "
    "weights, and applying can be undone.",
    "pick_even": "The layers lose different numbers of experts: {pick_even} evens them out by "
    "score, {pick} continues the selection.",
    "preview": "A plan is staged: {preview} measures it, {chat} chats with the candidate, {flip} "
    "switches between current and candidate.",
    "discard": "The loss is large: {discard} discards, {prune} stages a smaller prune, {apply} "
    "applies anyway.",
    "apply": "Measured. Press {apply} to apply, {discard} to discard, {flip} to switch between "
    "current and candidate.",
    "save": "Applied. {undo} undoes, {save} saves the model, {chat} chats with it.",
    "stale": "The statistics were measured on other weights: {collect} calibrates again.",
    "chat": "A dense model: {chat} chats with it, {evaluate} evaluates it, and abliterate edits it.",
}
SteerWay = Literal["up", "down", "off"]
MEASURING = ("preview", "evaluate")
DENSE = "the model has no experts"
DENSE_DISCARD = "The loss is large: {discard} discards, {apply} applies anyway."
STALE = "the statistics were measured on other weights: {collect} calibrates again"


def dense(state: AppState) -> bool:
    """Whether the model has no experts."""
    return state.view.model is not None and state.view.model.moe_layers == 0


def layer_at(state: AppState, position: int) -> int:
    """The decoder layer of MoE layer number `position`."""
    heat = state.view.heat
    return heat.layers[position] if heat and position < len(heat.layers) else position


def steer_line(steering: SteerReport | None, layer: int, expert: int, way: SteerWay) -> str:
    """The command line that steers one expert "up", "down" or "off" and keeps all other steering.

    It always names the whole steering, so that what a key does never depends on the past. Scan
    reports are named as reports, except one that steers an expert that is turned off: a report
    cannot leave one out.
    """
    now, cell = steering or SteerReport({}, {}), (layer, expert)
    maps = tuple(use for use in now.maps if way != "off" or cell not in use.names)
    without = {cell, *(c for use in maps for c in use.cells)}
    up, down = (cells_of(sets) - without for sets in (now.activated, now.deactivated))
    if way != "off":
        (up if way == "up" else down).add(cell)
    # The expert's own level gives way to the key.
    levels = {
        (ly, e): x for ly, some in now.levels.items() for e, x in some.items() if (ly, e) != cell
    }
    return full_line(now, up, down, levels, maps)


def command_line(state: AppState, key: Key, node: int | None = None) -> str:
    """The command line of `key` in this state. node: the one selected in the history panel."""
    view = state.view
    kept = view.model.experts_kept if view.model else 16
    position, expert = state.cursor
    layer = layer_at(state, position)
    values = {
        "collect": state.last_line("collect") or "collect --dataset demo:mixed",
        "prune": state.last_line("prune") or f"prune --n-prune {max(1, kept // 4)}",
        "save": state.last_line("save") or "save out",
        "lens": state.last_line("lens") or _lens_line(state),
        "expert": f"{layer}:{expert}",
        "steer_up": steer_line(view.steering, layer, expert, "up"),
        "steer_down": steer_line(view.steering, layer, expert, "down"),
        "steer_off": steer_line(view.steering, layer, expert, "off"),
        "node": str(node if node is not None else ""),
        "marked": str(compared_with(state, node)),
        "serve": serving.line_of(state),
    }
    if key.id in MEASURING and dense(state):
        return _measuring_line(state, key.target)
    return key.target.format(**values)


def _lens_line(state: AppState) -> str:
    """The lens of the newest question, which is to be edited."""
    return f"lens --chat {quoted(state.turns[-1].prompt)}" if state.turns else "lens "


def _measuring_line(state: AppState, name: str) -> str:
    """The line that measures a dense model, which has no held-out calibration samples.

    On the data set of the last measurement, or on the bundled one.
    """
    for last in (state.last_line(name), *map(state.last_line, MEASURING)):
        if last is not None and "--dataset" in last:
            return f"{name} {last.partition(' ')[2]}"
    return f"{name} --dataset demo:eval"


def compared_with(state: AppState, node: int | None) -> int:
    """The node to compare `node` with: the marked one, the current one, its parent, any other."""
    history = state.view.history
    parents = {n.id: n.parent for n in history.nodes} if history else {}
    current = history.current if history else None
    wishes = (state.marked, current, parents.get(node) if node is not None else None, *parents)
    return next((n for n in wishes if n is not None and n != node and n in parents), 0)


def why_not(state: AppState, key: Key) -> str:
    """Why `key` does nothing now, "" if it does something."""
    if key.id == "undo" and expert_selection.undoable(state):
        return ""
    if "serve" in (*key.scopes, key.target.removeprefix("panel ")) and not state.view.serving:
        return "nothing is served: start with mlxfun-shell MODEL --serve"
    reason = _compare_reason(state, key) or _edit_reason(state, key)
    name = command_of(key)
    if reason or name is None:
        return reason
    row = state.row(name)
    if row is None:
        return "" if state.rows else "still starting"
    return "" if row.enabled else (row.reason or "not possible now")


def _compare_reason(state: AppState, key: Key) -> str:
    """Why there is nothing to compare or to take, for keys that do."""
    if key.id in ("token_left", "token_right") and not chat_actions.places(state):
        return "no answer yet whose tokens are known"
    if key.id in ("take", "decline") and not state.offers:
        return "nothing is offered"
    if key.id == "take" and not state.offers[-1].line:
        return state.offers[-1].text
    if key.id == "both" and not state.talk.both:
        return comparable(state.view) or ""
    if key.id == "compare" and len(state.view.history.nodes if state.view.history else ()) < 2:
        return "there is one state only"
    if key.id == "compare" and state.view.plan is not None:
        return "a plan is staged: apply or discard it first"
    return ""


def _edit_reason(state: AppState, key: Key) -> str:
    """Why experts cannot be selected, pruned, applied or steered, for keys that do."""
    loaded = state.view.model is not None
    if key.works_in("experts") and key.kind != "run" and not loaded:
        return "no model yet"
    picks = key.target.startswith("pick ")
    if dense(state) and (picks or (key.works_in("experts") and key.kind != "run")):
        return DENSE
    if key.target.startswith("mix ") and key.id != "mix" and not state.mixer:
        return state.names.say("the mixer is empty: {mix} in the map adds an expert")
    if picks:
        return expert_selection.why_not(state)
    if key.id == "apply" and uneven(state):
        return f"{uneven(state)}: {state.names.say('press {pick_even} to even them out by score')}"
    measured = state.view.heat is not None and bool(state.view.heat.metrics)
    if key.id == "prune" and measured and stale(state):
        return state.names.say(STALE)
    if key.id in ("prune", "why") and loaded and not measured and not dense(state):
        return state.names.say(expert_selection.UNMEASURED)
    return ""


def stale(state: AppState) -> bool:
    """Whether the statistics in hand were measured on other weights than the current ones."""
    return state.view.heat is not None and state.view.heat.stale


def unsaved(state: AppState) -> tuple[str, ...]:
    """What would be lost by leaving now, a sentence each; () if nothing."""
    view, lost = state.view, []
    if view.plan is not None:
        lost.append(f"A plan is staged and not applied: {view.plan.summary()}")
    if edited(view) and view.state not in state.saved:
        lost.append("The edits of the current model are not saved.")
    lost += _unsaved_branches(state)
    if steering_in_force(view):
        lost.append(
            "Steering is in force; a saved model does not have it (bake makes it permanent)."
        )
    if state.unkept and view.heat is not None and view.heat.samples:
        samples = counted(view.heat.samples, "sample", "samples")
        lost.append(f"The routing statistics ({samples}) are in no file: stats save FILE.npz")
    if lost and state.recording:
        lost.append(f"The session is recorded to {state.recording}, which can be replayed.")
    return tuple(lost)


def _unsaved_branches(state: AppState) -> list[str]:
    """The ends of branches of the history that the model is not on and that were never saved."""
    history = state.view.history
    if history is None:
        return []
    nodes = {node.id: node for node in history.nodes}
    here: set[int] = set()
    at: int | None = history.current
    while at is not None and at in nodes:
        here.add(at)
        at = nodes[at].parent
    parents = {node.parent for node in history.nodes}
    known = state.saved | {history.nodes[0].state, state.view.state}
    ends = [n for n in history.nodes if n.id not in parents | here and n.state not in known]
    return [f"State {n.id} of the history is not saved: {n.label or n.command}" for n in ends]


def uneven(state: AppState) -> str:
    """Which layers of a manual selection lose more than others, "" if it can be applied."""
    plan = state.view.plan
    by_hand = state.draft is not None or (plan is not None and plan.strategy == "hand")
    return expert_selection.unevenness(state) if by_hand else ""


def next_key(state: AppState) -> str:
    """The id of the key for the next step, "" while a job runs or without a model."""
    view = state.view
    if state.job is not None or view.model is None:
        return ""
    if not dense(state) and (view.heat is None or not view.heat.metrics):
        return "collect"
    if view.plan is not None or state.draft is not None:
        if uneven(state):
            return "pick_even"
        if view.scores is None:
            return "preview" if state.draft is None else ""
        return "apply" if view.scores.ratio <= TOLERABLE_RATIO else "discard"
    if edited(state.view) and state.view.state not in state.saved:
        return "save"
    if stale(state):
        return "collect"
    return "chat" if dense(state) else "prune"


def next_step(state: AppState) -> str:
    """One sentence that says what to do next."""
    if state.job is not None and state.view.model is None:
        label = state.job.progress.label if state.job.progress else "starting"
        return f"{state.job.line}: {label} ..."
    if state.view.model is None:
        return state.names.say(
            "No model yet: press {command} and type  load demo, or  load  for a list"
        )
    leading = next_key(state)
    if leading == "discard" and dense(state):
        return state.names.say(DENSE_DISCARD)
    if leading == "collect" and stale(state):
        leading = "stale"
    return state.names.say(STEPS.get(leading, ""))


@dataclass(frozen=True, slots=True)
class Hint:
    """One key in the bar. key: its id, "" for one of a text field; leads: it is the next step."""

    sign: str
    label: str
    key: str
    applies: bool = True
    leads: bool = False

    @property
    def width(self) -> int:
        """Columns that it takes."""
        return cell_len(self.sign) + len(self.label) + 3


# What a text field does with keys that are no letters. Where letters are typed, none is a command.
FIELDS = {
    "command": (Hint("enter", "run", "", leads=True), Hint("tab", "complete", ""),
                Hint("↑", "earlier", "")),
    "chat": (Hint("enter", "send", "", leads=True),),
}  # fmt: skip


def for_bar(state: AppState, panel: Place, room: int, *, typing: bool = False) -> list[Hint]:
    """Keys for a bar of `room` columns while `panel` has the focus. typing: in its text field.

    What applies now comes first, in the order of the main job; greyed ones fill what is left.
    """
    leading = next_key(state)
    ending = ("help",) if typing else ("command", "help")
    always = [_hint(state, BY_ID[id], leading) for id in ending]
    rest = _typing_hints(state, panel) if typing else _panel_hints(state, panel, leading)
    out: list[Hint] = []
    room -= sum(hint.width for hint in always)
    for hint in rest:
        if hint.width <= room:
            room -= hint.width
            out.append(hint)
    return out + always


def _typing_hints(state: AppState, panel: Place) -> list[Hint]:
    """The field's own keys, then those that work in fields too."""
    form = ("form",) if panel == "command" else ()
    wanted = ("escape", *form, "palette", "to_map", "to_mixer", "quit")
    more = [_hint(state, BY_ID[id], "") for id in wanted if state.names.all(id)]
    if state.job is None:
        more[0] = replace(more[0], label="leave")
    return [*FIELDS[panel], *more]


def _panel_hints(state: AppState, panel: Place, leading: str) -> list[Hint]:
    """The next step first, then what applies now, then what does not."""
    kept = ("help", "command")
    shown = [key for key in keys_for(panel) if key.bar and state.names.all(key.id)]
    order = {name: place for place, name in enumerate(_main_keys(state))}
    inside = panel == "experts" and state.heat.shape == "layer"
    if inside:
        # The way on and the way back come first.
        order |= {"closer": -2, "escape": -1}

    def rank(key: Key) -> tuple[bool, bool, float]:
        own = (2.5 if panel in ("chat", "mixer") else 4.5) + key.bar / 100
        place = order.get(key.id, own if key.works_in(panel) else 20 + key.bar)
        return key.id != leading or inside, bool(why_not(state, key)), place

    out = [_hint(state, key, leading) for key in sorted(shown, key=rank) if key.id not in kept]
    words = {"closer": "dossier", "escape": "back"} if inside and state.job is None else {}
    return [replace(hint, label=words.get(hint.key, hint.label)) for hint in out]


def _hint(state: AppState, key: Key, leading: str) -> Hint:
    applies = not why_not(state, key)
    label = key.label
    if key.id == "undo" and applies:
        label = f"undo {shortened(undoes(state), UNDO_ROOM)}"
    return Hint(state.names[key.id], label, key.id, applies, key.id == leading)


def undoes(state: AppState) -> str:
    """What undo would take back: the selection's last change, or the command of the last step."""
    if expert_selection.undoable(state):
        return "selection"
    history = state.view.history
    node = next((n for n in history.nodes if n.id == history.current), None) if history else None
    return step_name(node.command) if node is not None and node.parent is not None else ""


def _main_keys(state: AppState) -> tuple[str, ...]:
    """The keys of the main workflow, in the order that fits the state."""
    view = state.view
    if state.job is not None:
        return ("escape", "to_map", "chat", "flip", "apply", "discard")
    if view.plan is not None:
        return ("preview", "apply", "discard", "flip", "chat", "undo", "prune", "collect", "save")
    if dense(state):
        return ("chat", "evaluate", "undo", "redo", "save")
    if view.heat is None or not view.heat.metrics:
        return ("collect", "chat", "evaluate", "save")
    return ("prune", "undo", "redo", "chat", "save", "collect", "evaluate")
