"""The plan panel: experts pruned by the staged plan, cost, savings and measured quality."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import BindingType
from textual.containers import VerticalScroll
from textual.widget import Widget
from textual.widgets import Static

from mlxfun.editing.reports import PlanReport
from mlxfun.evaluation.reports import EvaluateReport, ProbeReport
from mlxfun.events import Side
from mlxfun.session.reports import SessionView
from mlxfun.text import counted, readable_bytes
from tui import hints
from tui.input import expert_selection
from tui.keys.key_labels import USUAL, KeyNames
from tui.keys.keymap import bindings
from tui.state.app_state import AppState
from tui.text import SHOWN_SIDES, bar, ranges
from tui.widgets.panel import Panel

UNMEASURED = "Nothing staged.\nPress {collect} to calibrate, then {prune} to stage a prune."
MEASURED = (
    "Nothing staged.\nPress {prune} to stage a prune, {pick_more} to prune one expert in each "
    "layer, or {pick} in the map to select experts. The cost is shown here before you decide."
)
DENSE = "Nothing staged.\nType abliterate to stage the removal of a refusal direction."
GOOD, WARN, BAD = Style(color="green"), Style(color="yellow"), Style(color="red")
DIM, BOLD = Style(dim=True), Style(bold=True)


def draft_body(state: AppState) -> RenderableType:
    """The panel while experts are being selected: sizes and shares, nothing measured yet."""
    from mlxfun.techniques.prune import manual_mask

    field, gone = expert_selection.field_of(state), expert_selection.pruned_mask(state)
    assert field is not None
    assert gone is not None
    text = Text("manual selection", BOLD)
    text.append(f": {expert_selection.tally(state) or 'no experts'}\n")
    model = state.view.model
    if model is not None and model.expert_bytes:
        after = model.checkpoint_bytes - manual_mask.saved(model.expert_bytes, gone)
        text.append(f"{readable_bytes(model.checkpoint_bytes)} → {readable_bytes(after)}\n", GOOD)
    text.append("staged and measured as soon as you pause", DIM)
    parts: list[RenderableType] = [text]
    broken, uneven = field.unrunnable(gone), expert_selection.unevenness(state)
    if broken:
        parts.append(Text(f"! not staged: {broken}", BAD))
    elif uneven:
        way = state.names.say("{pick_even} evens them out by score")
        parts.append(Text(f"! {uneven}: {way}", WARN))
    losses = manual_mask.lost(field, gone)
    rows = manual_mask.sets_of(field.layers, gone)
    shares = None if losses is None else dict(zip(field.layers, map(float, losses), strict=True))
    return Group(*parts, Text(), losses_table(rows, shares))


def headline(plan: PlanReport, live: Side, names: KeyNames) -> Text:
    """The plan in three lines."""
    gone = sum(len(experts) for experts in plan.pruned.values())
    saved = plan.bytes_before - plan.bytes_after
    share = saved / plan.bytes_before if plan.bytes_before else 0.0
    rule = f" by {plan.metric}" if plan.metric else ""
    goes = counted(gone, "expert pruned", "experts pruned")
    text = Text()
    if not gone and plan.strategy != "hand":
        # An edit of weights or routers prunes nothing: its summary says what changes.
        text.append(f"{plan.summary()}\n")
        text.append("live: ", DIM)
        text.append(SHOWN_SIDES[live], BOLD)
        return text.append(names.say("  ({flip} switches)"), DIM)
    if plan.strategy == "hand":
        text.append("manual selection", BOLD)
        text.append(f": {goes}\n")
    else:
        text.append(f"{plan.technique}", BOLD)
        text.append(f"{rule}, {plan.strategy}: {goes}\n")
    text.append(f"{plan.experts_before} → {plan.left} per layer, ")
    text.append(f"{readable_bytes(plan.bytes_before)} → {readable_bytes(plan.bytes_after)} ")
    text.append(f"(-{share:.0%})\n", GOOD)
    text.append("live: ", DIM)
    text.append(SHOWN_SIDES[live], BOLD)
    text.append(names.say("  ({flip} switches)"), DIM)
    return text


def quick(probe: ProbeReport, names: KeyNames) -> Text:
    """A probe in two lines."""
    style = GOOD if probe.ratio <= 1.05 else WARN if probe.ratio <= 1.25 else BAD
    text = Text("quick probe: perplexity ")
    text.append(f"{probe.ratio:.3f} x", style)
    text.append(" the checkpoint's")
    if probe.steered:
        text.append(" while steering", WARN)
    text.append(f", KL {probe.kl_mean:.4f}, top-1 agreement {probe.top1_agreement:.0%}\n")
    way = names.say("{preview} measures on all held-out text")
    return text.append(f"on {probe.tokens} tokens only; {way}", DIM)


def verdict(view: SessionView, probe: ProbeReport | None, names: KeyNames) -> Text:
    """The scores before and after, or which key measures them."""
    plan, scores = view.plan, view.scores
    assert plan is not None
    if scores is None and probe is not None and probe.measured_state == plan.state_after:
        return quick(probe, names)
    if scores is None:
        return Text(names.say("not measured yet: press {preview}"), WARN)
    ratio = scores.ratio
    style = GOOD if ratio <= 1.05 else WARN if ratio <= 1.25 else BAD
    text = Text("perplexity ")
    text.append(f"{scores.baseline['all']:.3f} → {scores.perplexity['all']:.3f} ")
    text.append(f"({ratio:.3f} x)", style)
    low, high = scores.interval["all"]
    text.append(f"\n95% interval {low:.3f} to {high:.3f}, {scores.tokens:,} tokens", DIM)
    if scores.kl_mean is not None:
        text.append(f"\nKL mean {scores.kl_mean:.4f}")
        if scores.kl_p99 is not None:
            text.append(f", p99 {scores.kl_p99:.3f}")
    if scores.top1_agreement is not None:
        text.append(f"\ntop-1 agreement {scores.top1_agreement:.1%}")
    if scores.steered:
        text.append("\nmeasured with steering on", WARN)
    return text


def guardrails(limits: tuple[tuple[str, float], ...], scores: EvaluateReport | None) -> Text:
    """For each guardrail, whether apply would accept the plan."""
    text = Text()
    for name, limit in limits:
        value = None
        if scores is not None:
            value = scores.kl_mean if name == "max-kl" else scores.ratio
        said = "KL" if name == "max-kl" else "perplexity ratio"
        if value is None or (scores is not None and scores.steered):
            text.append(f"guardrail {said} ≤ {limit:g}: apply measures first\n", DIM)
        elif value <= limit:
            text.append(f"✓ {said} {value:.4g} within {limit:g}\n", GOOD)
        else:
            text.append(f"✗ {said} {value:.4g} above {limit:g}: apply refuses\n", BAD)
    text.rstrip()
    return text


def memory(view: SessionView) -> Text:
    """Memory in use, held by the plan, needed to stage it if known, and available."""
    assert view.plan is not None
    active, plan = view.memory_active, view.plan
    limit = f" of {readable_bytes(view.memory_limit)}" if view.memory_limit else ""
    text = Text(f"memory {readable_bytes(active)}{limit}", DIM)
    text.append(f", {readable_bytes(plan.delta_bytes)} of it for the plan")
    if plan.peak_bytes:
        text.append(f"; peak while staging {readable_bytes(plan.peak_bytes)}")
    return text


def losses_table(
    pruned: Mapping[int, tuple[int, ...]], mass_lost: Mapping[int, float] | None
) -> Table:
    """One line per layer: the share of its activations that is lost, if known, and the experts."""
    out = Table(box=None, padding=(0, 1, 0, 0), show_edge=False, header_style="dim")
    out.add_column("layer", justify="right")
    if mass_lost:
        out.add_column("share lost", no_wrap=True)
    out.add_column("experts pruned", overflow="fold")
    for layer, experts in sorted(pruned.items()):
        if not experts:
            continue
        cells = [_lost(mass_lost.get(layer))] if mass_lost else []
        out.add_row(str(layer), *cells, ranges(list(experts)))
    return out


def _lost(lost: float | None) -> Text:
    if lost is None:
        return Text("-", DIM)
    style = GOOD if lost <= 0.1 else WARN if lost <= 0.3 else BAD
    return Text.assemble(f"{lost:5.1%} ", (bar(lost, 6), style))


def losses_of(state: AppState) -> Mapping[int, float] | None:
    """The share of its activations that each layer loses by the staged plan.

    The plan's own, or where it has none (a merge, a list of experts) by the statistics in hand.
    """
    plan = state.view.plan
    if plan is None or plan.mass_lost:
        return plan.mass_lost if plan is not None else None
    from mlxfun.techniques.prune import manual_mask

    field, gone = expert_selection.field_of(state), expert_selection.pruned_mask(state)
    if field is None or gone is None or not gone.any() or hints.stale(state):
        return None
    losses = manual_mask.lost(field, gone)
    return None if losses is None else dict(zip(field.layers, map(float, losses), strict=True))


def plan_body(
    view: SessionView,
    probe: ProbeReport | None = None,
    limits: tuple[tuple[str, float], ...] = (),
    names: KeyNames = USUAL,
    lost: Mapping[int, float] | None = None,
) -> RenderableType:
    """The whole panel for a staged plan. lost: see `losses_of`."""
    assert view.plan is not None
    parts: list[RenderableType] = [headline(view.plan, view.live, names)]
    parts += [Text(f"! {warning}", WARN) for warning in view.plan.warnings]
    table = losses_table(view.plan.pruned, lost or view.plan.mass_lost)
    parts += [Text(), verdict(view, probe, names)]
    parts += [guardrails(limits, view.scores)] if limits else []
    parts += [memory(view)] if view.memory_active else []
    parts += [Text(), table] if table.row_count else []
    return Group(*parts)


def empty_body(state: AppState) -> Text:
    """The panel without a plan: how to stage one."""
    if hints.dense(state):
        return Text(DENSE)
    measured = state.view.heat is not None and bool(state.view.heat.metrics)
    if not measured:
        return Text(state.names.say(UNMEASURED))
    return Text(state.names.say(MEASURED))


class PlanScroll(VerticalScroll):
    """Scrolls with the arrows; the plan's own keys work here."""

    BINDINGS: ClassVar[list[BindingType]] = [*bindings("plan")]


class PlanPanel(Panel):
    """The staged plan."""

    panel = "plan"
    title = "staged plan"
    about = (
        "A staged plan makes a candidate, which chat then talks to; the current weights are not "
        "changed. 'share lost' is the share of the layer's summed metric that the pruned experts "
        "have: the smaller the better.\n\n"
        "{preview} measures perplexity and KL against the checkpoint, {flip} switches between "
        "current and candidate, {apply} applies, {discard} discards. Undo reverts an applied plan "
        "bit for bit.\n\n"
        "{dial_more} and {dial_fewer} prune one expert more or fewer in every layer by score, "
        "{pick_even} evens the layers out, {plan_save} writes the list of kept experts. `set "
        "max-kl 0.1` and `set max-perplexity-ratio 1.1` are guardrails: apply refuses a plan that "
        "exceeds them."
    )

    DEFAULT_CSS = """
    PlanPanel VerticalScroll { scrollbar-size-vertical: 1; }
    PlanPanel Static { width: 1fr; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: tuple[object, ...] = ()
        self._body: RenderableType = ""
        self._lines = (0, 0)  # of the body, for a width

    def wanted(self) -> int:
        width = max(20, self.size.width - 1)
        if self._lines[1] != width:
            console = self.app.console
            lines = console.render_lines(self._body, console.options.update(width=width))
            self._lines = (len(lines), width)
        return self._lines[0] + 2

    def compose(self) -> ComposeResult:
        with PlanScroll(can_focus=True):
            yield Static()

    def entrance(self) -> Widget:
        return self.query_one(PlanScroll)

    def show(self, state: AppState) -> None:
        """Draw the plan of `state`."""
        self.entitle(state.names)
        view = state.view
        # Called on every event; the table is only built again when something in it changed.
        shown = (
            view.plan,
            view.scores,
            view.live,
            hints.next_key(state),
            state.draft,
            state.probe,
            state.limits,
        )
        if all(a is b for a, b in zip(shown, self._shown, strict=False)) and self._shown:
            return
        self._shown = shown
        if state.draft is not None and state.view.heat is not None:
            body = draft_body(state)
        elif view.plan is not None:
            body = plan_body(view, state.probe, state.limits, state.names, losses_of(state))
        else:
            body = empty_body(state)
        self.query_one(Static).update(body)
        self._body, self._lines = body, (0, 0)
        self.subtitle("apply or discard" if view.plan and state.draft is None else "")
