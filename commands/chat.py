"""The chat command."""

from __future__ import annotations

from typing import Any

import click

from commands.declare import Call, command, positive
from mlxfun.errors import UsageError
from mlxfun.options import GenerateOptions
from mlxfun.reports import Report, TextReport


@command("chat", group="chat", key="i")
@click.argument("text", nargs=-1)
@click.option("--new", is_flag=True, help="Forget the conversation so far.")
@click.option("--system", metavar="TEXT", help="System prompt.")
@click.option("--temperature", type=click.FloatRange(min=0), metavar="T", help="0 is greedy.")
@click.option(
    "--top-p", type=click.FloatRange(0, 1, min_open=True), metavar="P", help="Nucleus sampling."
)
@click.option("--max-tokens", type=positive, metavar="N", help="Longest answer.")
@click.option("--seed", type=int, metavar="N", help="Seed of the sampling.")
@click.option("--base", "side", flag_value="base", help="Ask the model without the staged plan.")
@click.option("--candidate", "side", flag_value="candidate", help="Ask the staged model.")
@click.option("--thinking/--no-thinking", default=None, help="For templates that know it.")
def chat(call: Call) -> Report:
    """Talk to the live model; the conversation goes on from turn to turn.

    Everything after the options is the text, quotes and dashes included. Put -- before a text that
    looks like an option.
    """
    text = " ".join(call["text"])
    if not text and not call["new"]:
        raise UsageError("chat: the text is missing: chat TEXT, or chat --new to start over")
    if call["new"]:
        call.session.reset_chat()
    if not text:
        return TextReport("a new conversation begins")
    defaults = call.bench.settings

    def given(name: str, default: Any) -> Any:
        return default if call[name] is None else call[name]

    options = GenerateOptions(
        max_tokens=given("max_tokens", defaults.max_tokens),
        temperature=given("temperature", defaults.temperature),
        top_p=given("top_p", defaults.top_p),
        seed=given("seed", defaults.seed),
        side=given("side", "live"),
        system=call["system"],
        thinking=call["thinking"],
    )
    return call.session.chat(text, options, call.ctx)


COMMANDS = (chat,)
