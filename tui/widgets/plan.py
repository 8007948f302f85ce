"""The staged plan: what goes, what that costs and saves, and how the model does without it."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.style import Style
from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.widget import Widget
from textual.widgets import Static

from mlxfun.reports import EvaluateReport, PlanReport, SessionView, readable_bytes
from tui import guide
from tui.state import AppState
from tui.text import bar, ranges
from tui.widgets.panel import Panel

GOOD, WARN, BAD = Style(color="green"), Style(color="yellow"), Style(color="red")
DIM, BOLD = Style(dim=True), Style(bold=True)


def headline(plan: PlanReport, live: str) -> Text:
    """The plan in three lines."""
    gone = sum(len(experts) for experts in plan.pruned.values())
    saved = plan.bytes_before - plan.bytes_after
    share = saved / plan.bytes_before if plan.bytes_before else 0.0
    rule = f" by {plan.metric}" if plan.metric else ""
    text = Text()
    text.append(f"{plan.technique}", BOLD)
    text.append(f"{rule}, {plan.strategy}: {gone} experts go\n")
    text.append(f"{plan.experts_before} → {plan.experts_after} a layer, ")
    text.append(f"{readable_bytes(plan.bytes_before)} → {readable_bytes(plan.bytes_after)} ")
    text.append(f"(-{share:.0%})\n", GOOD)
    text.append("live now: ", DIM)
    text.append(live, BOLD)
    text.append("  (f swaps)", DIM)
    return text


def verdict(scores: EvaluateReport | None) -> Text:
    """Before and after, or how to get it."""
    if scores is None:
        return Text("not measured yet: press v", WARN)
    ratio = scores.ratio
    style = GOOD if ratio <= 1.05 else WARN if ratio <= 1.25 else BAD
    text = Text("perplexity ")
    text.append(f"{scores.baseline['all']:.3f} → {scores.perplexity['all']:.3f} ")
    text.append(f"({ratio:.3f}x)", style)
    low, high = scores.interval["all"]
    text.append(f"\n95 % interval {low:.3f} to {high:.3f}, {scores.tokens:,} tokens", DIM)
    if scores.kl_mean is not None:
        text.append(f"\nKL mean {scores.kl_mean:.4f}")
        if scores.kl_p99 is not None:
            text.append(f", p99 {scores.kl_p99:.3f}")
    if scores.top1_agreement is not None:
        text.append(f"\nsame next token {scores.top1_agreement:.1%}")
    if scores.steered:
        text.append("\nmeasured with steering on", WARN)
    return text


def losses(plan: PlanReport) -> Table:
    """One line a layer: the share of its work that goes, and the experts."""
    out = Table(box=None, padding=(0, 1, 0, 0), show_edge=False, header_style="dim")
    out.add_column("layer", justify="right")
    out.add_column("work lost", no_wrap=True)
    out.add_column("experts that go", overflow="fold")
    for layer, experts in sorted(plan.pruned.items()):
        lost = plan.mass_lost.get(layer) if plan.mass_lost else None
        if lost is None:
            cell = Text("unknown", DIM)
        else:
            style = GOOD if lost <= 0.1 else WARN if lost <= 0.3 else BAD
            cell = Text.assemble(f"{lost:5.1%} ", (bar(lost, 6), style))
        out.add_row(str(layer), cell, ranges(list(experts)))
    return out


def plan_body(view: SessionView) -> RenderableType:
    """The whole panel for a staged plan."""
    assert view.plan is not None
    parts: list[RenderableType] = [headline(view.plan, view.live)]
    parts += [Text(f"! {warning}", WARN) for warning in view.plan.warnings]
    parts += [Text(), verdict(view.scores), Text(), losses(view.plan)]
    return Group(*parts)


def empty_body(state: AppState) -> Text:
    """The panel without a plan: what to do to get one."""
    measured = state.view.heat is not None and bool(state.view.heat.metrics)
    if not measured:
        return Text("Nothing staged.\nPress c to calibrate, then p to stage a prune.")
    return Text(
        "Nothing staged.\nPress p to stage a prune: you see here what goes and what it costs, "
        "and decide then."
    )


class PlanPanel(Panel):
    """The staged plan."""

    panel = "plan"
    title = "staged plan"
    about = (
        "A staged plan is live but not committed: the chat talks to the candidate, the committed "
        "weights are untouched. 'work lost' is the share of the layer's summed metric that goes "
        "with the condemned experts: small is good.\n\n"
        "v measures perplexity and KL against the checkpoint, f swaps base and candidate, "
        "a applies, d discards. Applying can be undone bit for bit."
    )

    DEFAULT_CSS = """
    PlanPanel VerticalScroll { scrollbar-size-vertical: 1; }
    PlanPanel Static { width: 1fr; }
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: tuple[object, ...] = ()

    def compose(self) -> ComposeResult:
        with VerticalScroll(can_focus=True):
            yield Static()

    def entrance(self) -> Widget:
        return self.query_one(VerticalScroll)

    def show(self, state: AppState) -> None:
        """Draw the plan of `state`."""
        view = state.view
        # Called on every event; the table is only built again when something in it changed.
        shown = (view.plan, view.scores, view.live, guide.next_key(state))
        if all(a is b for a, b in zip(shown, self._shown, strict=False)) and self._shown:
            return
        self._shown = shown
        body = plan_body(view) if view.plan else empty_body(state)
        self.query_one(Static).update(body)
        self.subtitle("apply or discard" if view.plan else "")
