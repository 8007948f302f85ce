"""Commands that walk the tree of states."""

from __future__ import annotations

import click

from commands.declare import Call, command, redoable, undoable
from commands.types import Node
from mlxfun.reports import Report


@command("undo", group="history", key="u", when=undoable)
def undo(call: Call) -> Report:
    """Take the last applied edit back, bit for bit."""
    return call.session.undo()


@command("redo", group="history", key="r", when=redoable)
def redo(call: Call) -> Report:
    """Do the edit again that undo took back."""
    return call.session.redo()


@command("goto", group="history")
@click.argument("node", type=Node())
def goto(call: Call) -> Report:
    """Go to any state of the history tree by its number."""
    return call.session.goto(call["node"], call.ctx)


@command("history", group="history")
def history(call: Call) -> Report:
    """List the states: the command that made each, bytes held, scores."""
    return call.session.history()


COMMANDS = (undo, redo, goto, history)
