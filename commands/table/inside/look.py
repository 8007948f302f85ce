"""`trace`, `lens`, `attention`, `patch` and `attribute`: what happens inside a forward."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from commands.declare import Call, Decorator, command, positive
from commands.types import Experts, FilePath, NewFile, Whole, Words
from mlxfun.errors import UsageError
from mlxfun.report import Report
from mlxfun.tracing.options import (
    COMPONENTS,
    EXPORTS,
    HEAD_KINDS,
    METRICS,
    PATCH_METHODS,
    AttentionOptions,
    AttributeOptions,
    DifferenceOptions,
    LensOptions,
    PatchOptions,
    TraceOptions,
)

text_argument = click.argument("text", nargs=-1, type=Words())
layers_option = click.option(
    "--layers",
    type=Experts(),
    metavar="LIST",
    help='These decoder layers: "0,4..7" (default: all).',
)

chat_option = click.option(
    "--chat",
    is_flag=True,
    help="Ask the text as a question, through the chat template: its last token is where the answer "
    "begins.",
)


def export_option(extensions: tuple[str, ...] = EXPORTS) -> Decorator:
    """`--export`: the result as a file."""
    kinds = ", ".join(extensions)
    return click.option(
        "--export", type=NewFile(extensions), help=f"Write the result to a file ({kinds})."
    )


def position_option(what: str) -> Decorator:
    """`--position`: of a prompt's own tokens."""
    return click.option(
        "--position", type=int, default=-1, metavar="N", help=f"{what}; -1 is the last (default)."
    )


prompts_option = click.option(
    "--prompts",
    is_flag=True,
    help="Ask each sample through the chat template; its last token is where the answer begins.",
)


def words_of(call: Call) -> str:
    """The text of the command. Raises UsageError without one."""
    text = " ".join(call["text"])
    if not text:
        raise UsageError("the text is missing; write it behind the command")
    return text


def export_of(call: Call) -> Path | None:
    """Where the result goes."""
    return None if call["export"] is None else call.bench.writable(call["export"])


@command("trace", group="observe", read_only=True)
@text_argument
@chat_option
@click.option(
    "--at",
    multiple=True,
    metavar="NAME",
    help="A value: layers.3.attn.output, layers.*.router.choice, layers.3.experts.7.output, ... "
    "(default: layers.*.residual). Repeatable.",
)
@position_option("Whose figures are shown")
def trace(call: Call) -> Report:
    """Look at values of one forward over a text, by name.

    Names are the same on every architecture: embed, layers.N.input, .residual, .attn.q, .k, .v,
    .queries, .keys, .values, .weights, .heads, .output, .mlp.gate, .up, .output, .norm1, .norm2,
    .router.logits, .choice, .weights, .experts.E.output, norm, output; in place of N, * is every
    layer and 2-5 are some. A wrong name lists those that are near.
    """
    at = call["at"] or TraceOptions("").at
    return call.session.trace_values(
        TraceOptions(words_of(call), tuple(at), call["position"], call["chat"])
    )


@command("difference", group="observe", read_only=True)
@text_argument
@chat_option
@click.option(
    "--against",
    default="checkpoint",
    metavar="STATE",
    help="checkpoint (default), base (of the staged plan), or a node of the history.",
)
def difference(call: Call) -> Report:
    """See what an edit changes inside a forward, layer by layer, and where it begins."""
    return call.session.difference(DifferenceOptions(words_of(call), call["against"], call["chat"]))


@command("lens", group="observe", read_only=True)
@text_argument
@chat_option
@layers_option
@click.option("--positions", type=Experts(), metavar="LIST", help="These tokens (default: all).")
@click.option("--top-k", type=positive, default=5, metavar="N", help="Words a cell (default: 5).")
@click.option(
    "--answer",
    "answers",
    multiple=True,
    metavar="TOKEN",
    help='Follow this token through the layers: " Paris" with its space, or #ID. Repeatable.',
)
@click.option("--tuned", type=FilePath((".safetensors",)), help="Read through a lens of tune-lens.")
@export_option()
def lens(call: Call) -> Report:
    """See what each layer would say if the model ended there (logit lens)."""
    values = {name: call[name] for name in ("layers", "positions", "top_k", "answers", "chat")}
    tuned = None if call["tuned"] is None else call.bench.readable(call["tuned"])
    options = LensOptions(words_of(call), **values, tuned=tuned, export=export_of(call))
    return call.session.lens(options, call.ctx)


@command("attention", group="observe", read_only=True)
@text_argument
@chat_option
@click.option("--layer", type=Whole(min=0), default=0, metavar="N", help="Which layer.")
@click.option("--head", type=Whole(min=0), default=0, metavar="N", help="Which head.")
@click.option(
    "--all-heads",
    "every",
    is_flag=True,
    help="Small maps of all heads of the layer, and where each looks on the whole.",
)
@click.option(
    "--find",
    type=click.Choice([kind.replace(" ", "-") for kind in HEAD_KINDS]),
    help="Rank all heads by this pattern instead, on random tokens written twice; no text.",
)
@export_option()
def attention(call: Call) -> Report:
    """See what a head attends to, as the model computes it: after norms, RoPE and mask."""
    if call["find"] is not None:
        if call["text"] or call["export"] is not None:
            raise UsageError("--find takes no text and writes no file: it ranks all heads")
        kind = next(k for k in HEAD_KINDS if k.replace(" ", "-") == call["find"])
        return call.session.attention(AttentionOptions(find=kind))
    options = AttentionOptions(words_of(call), call["layer"], call["head"])
    options = replace(options, chat=call["chat"], every=call["every"])
    return call.session.attention(replace(options, export=export_of(call)))


@command("patch", group="observe", read_only=True)
@click.argument("clean")
@click.argument("corrupted")
@chat_option
@click.option(
    "--component",
    type=click.Choice(COMPONENTS),
    default="residual",
    help="What is patched (default: residual); heads and experts each by themselves.",
)
@click.option(
    "--metric",
    type=click.Choice(METRICS),
    default="logit_diff",
    help="What is restored (default: logit_diff, of the tokens that the two runs say).",
)
@click.option(
    "--method",
    type=click.Choice(PATCH_METHODS),
    default="activation",
    help="activation: one run a cell (default). path: only by the direct path to --receiver. "
    "attribution: all cells estimated by one gradient.",
)
@click.option(
    "--answer", metavar="TOKEN", help="The token of the metric (default: the clean run's)."
)
@click.option(
    "--other", metavar="TOKEN", help="What it is compared with (default: the corrupted's)."
)
@click.option(
    "--receiver", default="output", metavar="NAME", help="Of path patching (default: output)."
)
@layers_option
@export_option()
def patch(call: Call) -> Report:
    """Find which component carries an answer: each one of a clean run, put into a corrupted one.

    CLEAN and CORRUPTED are two texts of equally many tokens, in quotes. A score of 1 brings the
    corrupted run's metric to the clean run's, 0 changes nothing.
    """
    names = ("component", "metric", "method", "answer", "other", "layers", "receiver", "chat")
    values = {name: call[name] for name in names}
    options = PatchOptions(call["clean"], call["corrupted"], **values, export=export_of(call))
    return call.session.patch(options, call.ctx)


@command("attribute", group="observe", read_only=True)
@text_argument
@chat_option
@click.option("--answer", metavar="TOKEN", help="Whose logit (default: the token the model says).")
@click.option("--other", metavar="TOKEN", help="Compare with this token.")
@position_option("Which token's prediction")
@export_option((".json", ".md", ".csv"))
def attribute(call: Call) -> Report:
    """See which attention, head and expert wrote a token's logit (direct logit attribution)."""
    values = {name: call[name] for name in ("answer", "other", "position", "chat")}
    options = AttributeOptions(words_of(call), **values, export=export_of(call))
    return call.session.attribute(options)


COMMANDS = (trace, difference, lens, attention, patch, attribute)
