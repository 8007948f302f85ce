"""The history of edits: `undo`, `redo`, `goto`, `history`, `name`, `compare`."""

from __future__ import annotations

import click

from commands.conditions import redoable, undoable, unstaged
from commands.declare import Call, command
from commands.table.measure import measure_options, options
from commands.types import Node
from mlxfun.report import Report


@command("undo", group="history", key="u", when=undoable)
def undo(call: Call) -> Report:
    """Take the last applied edit back, bit for bit."""
    return call.session.undo(call.ctx)


@command("redo", group="history", key="r", when=redoable)
def redo(call: Call) -> Report:
    """Do the edit again that undo took back."""
    return call.session.redo(call.ctx)


@command("goto", group="history", when=unstaged)
@click.argument("node", type=Node())
def goto(call: Call) -> Report:
    """Go to any state of the history tree by its number."""
    return call.session.goto(call["node"], call.ctx)


@command("history", group="history")
def history(call: Call) -> Report:
    """List the states: the command that made each, bytes held, scores."""
    return call.session.history()


@command("name", group="history")
@click.argument("node", type=Node())
@click.argument("label", nargs=-1)
def name(call: Call) -> Report:
    """Give a state of the history a name; without one, take it away."""
    return call.session.name_node(call["node"], " ".join(call["label"]))


@command("compare", group="history", when=unstaged, read_only=True)
@click.argument("first", type=Node())
@click.argument("second", type=Node())
@measure_options
def compare(call: Call) -> Report:
    """Measure two states of the history on the same tokens: perplexity, KL, size, experts.

    The model stays where it is, and steering is off for both: a state is weights. With --samples
    answers are shown, too.
    """
    return call.session.compare_nodes(call["first"], call["second"], options(call), call.ctx)


COMMANDS = (undo, redo, goto, history, name, compare)
