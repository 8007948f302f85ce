"""`chat` and `ab`: talk to the live model, or ask current model and candidate the same question."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from commands.conditions import comparable
from commands.declare import Call, command, positive, stack
from commands.types import Number, Seed
from mlxfun.errors import MlxfunError, UsageError
from mlxfun.generation.options import GenerateOptions
from mlxfun.generation.reports import ChatReport
from mlxfun.report import Report, TextReport

sampling_options = stack(
    click.option("--system", metavar="TEXT", help="System prompt."),
    click.option("--temperature", type=Number(min=0), metavar="T", help="0 is greedy."),
    click.option(
        "--top-p", type=Number(0, 1, min_open=True), metavar="P", help="Nucleus sampling."
    ),
    click.option("--max-tokens", type=positive, metavar="N", help="Longest answer."),
    click.option("--seed", type=Seed(), metavar="N", help="Seed of the sampling."),
    click.option("--thinking/--no-thinking", default=None, help="For templates that know it."),
)


def sampling(call: Call) -> GenerateOptions:
    """The `sampling_options` of a command, with the shell's defaults."""
    defaults = call.bench.settings

    def given(name: str) -> Any:
        return getattr(defaults, name) if call[name] is None else call[name]

    return GenerateOptions(
        max_tokens=given("max_tokens"),
        temperature=given("temperature"),
        top_p=given("top_p"),
        seed=given("seed"),
        system=call["system"],
        thinking=call["thinking"],
    )


@command("chat", group="chat", key="i")
@click.argument("text", nargs=-1)
@click.option("--new", is_flag=True, help="Forget the conversation so far.")
@click.option(
    "--back",
    type=positive,
    metavar="N",
    help="Remove the last N questions and answers first; without TEXT ask the first again.",
)
@sampling_options
@click.option(
    "--current", "side", flag_value="base", help="Ask the current model, not the candidate."
)
@click.option("--base", "side", flag_value="base", hidden=True)
@click.option("--candidate", "side", flag_value="candidate", help="Ask the candidate.")
def chat(call: Call) -> Report:
    """Chat with the live model; each question continues the conversation.

    Everything after the options is the text, quotes and dashes included. Put -- before a text that
    looks like an option.
    """
    text = " ".join(call["text"])
    if not text and not call["new"] and not call["back"]:
        raise UsageError("chat: the text is missing: chat TEXT, or chat --new to start over")
    if call["new"] and call["back"]:
        raise UsageError("chat: --new removes everything already; leave out --back")
    options = replace(sampling(call), side=call["side"] or "live")
    if call["new"]:
        call.session.reset_chat()
        if not text:
            return TextReport("a new conversation begins")
        return _instead(call, text, options)
    if call["back"]:
        taken = call.session.take_back(call["back"])
        report = _instead(call, text or taken, options)
        if report.finish_reason != "cancelled":
            del call.bench.answers[-call["back"] :]
        return report
    return call.session.chat(text, options, call.ctx)


def _instead(call: Call, text: str, options: GenerateOptions) -> ChatReport:
    """Answer after turns were removed; if that fails or is cancelled they come back."""
    try:
        report = call.session.chat(text, options, call.ctx)
    except MlxfunError:
        call.session.give_back()
        raise
    if report.finish_reason == "cancelled":
        call.session.give_back()
    return report


@command("ab", group="chat", when=comparable, read_only=True)
@click.argument("text", nargs=-1, required=True)
@sampling_options
def ab(call: Call) -> Report:
    """Ask current and candidate the same question, side by side: where they diverge, KL per token.

    With a plan staged the sides are the current model and the candidate; without one the checkpoint
    and the current model, steering included. They answer a token each in turn. Prompt and seed are
    the same; the conversation is not changed.
    """
    return call.session.ab(" ".join(call["text"]), sampling(call), call.ctx)


@command("tokens", group="chat", recorded=False, read_only=True, between=True)
@click.argument("text", nargs=-1, required=True)
@sampling_options
def tokens(call: Call) -> Report:
    """Count the tokens of a text, and of the conversation with it as the next question.

    The options are those of chat: the system prompt counts too.
    """
    return call.session.count_tokens(" ".join(call["text"]), sampling(call))


COMMANDS = (chat, ab, tokens)
