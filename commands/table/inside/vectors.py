"""`intervene` and the steering vectors: changes of values in every forward, until taken away."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from commands.declare import Call, command, data_option, data_options, dataset_options
from commands.table.inside.look import layers_option, position_option, prompts_option
from commands.types import Experts, NewFile, Whole, Words
from mlxfun.data.expert_notation import parse_experts
from mlxfun.errors import UsageError
from mlxfun.report import Report
from mlxfun.tracing.options import VECTOR_METHODS, VectorOptions

KINDS = {
    "zero": "",
    "scale": "FACTOR",
    "set": "NUMBER",
    "clamp": "LOW HIGH",
    "drop": "EXPERTS",
    "scale-expert": "EXPERT FACTOR",
    "force": "EXPERTS",
}
"""{kind of intervention: its values}."""


def _numbers(kind: str, values: list[str]) -> list[float]:
    wanted = KINDS[kind].split()
    if len(values) != len(wanted):
        raise UsageError(f"intervene NAME {kind} takes {' and '.join(wanted) or 'no value'}")
    try:
        found = [float(value) for value in values]
    except ValueError:
        raise UsageError(f"intervene {kind}: {' '.join(values)!r} are no numbers") from None
    if not all(abs(x) < float("inf") for x in found):
        raise UsageError(f"intervene {kind}: {' '.join(values)} must be finite")
    return found


def _experts(kind: str, values: list[str]) -> tuple[int, ...]:
    if len(values) != 1:
        raise UsageError(f'intervene NAME {kind} takes EXPERTS, such as "3,7"')
    return parse_experts(values[0])


def _made(kind: str, values: list[str], heads: tuple[int, ...] | None) -> Any:
    """The intervention that the words mean."""
    # Not at the top: it needs MLX, and commands are declared before that is imported.
    from mlxfun.tracing import interventions as made

    if heads is not None and kind in ("drop", "force", "scale-expert"):
        raise UsageError(f"intervene {kind} is about experts, and takes no --heads")
    if kind == "drop":
        return made.compose(*(made.drop_expert(expert) for expert in _experts(kind, values)))
    if kind == "force":
        return made.force_route(_experts(kind, values))
    numbers = _numbers(kind, values)
    if kind == "scale-expert":
        return made.scale_expert(int(numbers[0]), numbers[1])
    simple: dict[str, Callable[..., Any]] = {
        "zero": made.zero_out,
        "scale": made.scale,
        "set": made.replace_with,
        "clamp": made.clamp,
    }
    return simple[kind](*numbers, heads=heads)


@command("intervene", group="edit", between=True)
@click.argument("words", nargs=-1, type=Words())
@click.option("--heads", type=Experts(), metavar="LIST", help="Of attention: these heads only.")
@click.option("--clear", is_flag=True, help="Take away what stands at NAME, or everything.")
def intervene(call: Call) -> Report:
    """Change a value in every forward until it is taken away: NAME KIND [VALUES].

    NAME as in trace. Kinds: zero; scale FACTOR; set NUMBER; clamp LOW HIGH; and of a layer's experts
    (layers.3.experts) drop EXPERTS or scale-expert EXPERT FACTOR, of its router (layers.3.router)
    force EXPERTS. It is a step of the history: undo takes it back, and what is measured without
    steering is measured without it.
    """
    words = list(call["words"])
    if call["clear"]:
        if len(words) > 1:
            raise UsageError("intervene --clear takes one name, or none for everything")
        return call.session.clear_interventions(words[0] if words else None)
    if len(words) < 2:
        raise UsageError(
            "intervene takes NAME KIND [VALUES], such as: layers.3.mlp.output scale 0.5"
        )
    name, kind, *values = words
    if kind not in KINDS:
        raise UsageError(f"there is no intervention {kind!r}; there are {', '.join(KINDS)}")
    return call.session.intervene(name, _made(kind, values, call["heads"]))


@command("vector make", group="observe")
@click.argument("name")
@data_option("--positive", "Samples that have the quality.", required=True)
@data_option("--negative", "Samples that lack it.", required=True)
@data_options
@click.option(
    "--method",
    type=click.Choice(VECTOR_METHODS),
    default="mean",
    help="mean: difference of the means (default). pca: the direction in which all differ most.",
)
@layers_option
@position_option("Which token of each sample")
@prompts_option
def make(call: Call) -> Report:
    """Make steering vectors from two data sets, one for each layer, and keep them under NAME."""
    bench = call.bench
    positive, negative = (
        dataset_options(bench.readable_sources(call[side]), call.params, bench.settings.seed)
        for side in ("positive", "negative")
    )
    names = ("name", "method", "layers", "position", "prompts")
    options = VectorOptions(**{name: call[name] for name in names})
    return call.session.make_vector(options, positive, negative, call.ctx)


@command("vector use", group="edit", between=True)
@click.argument("name")
@click.option(
    "--layer",
    type=Whole(min=0),
    metavar="N",
    help="Where it is added (default: the layer that separates the samples best).",
)
@click.option(
    "--strength", type=float, default=1.0, metavar="X", help="1 is as far as the sets are apart."
)
def use(call: Call) -> Report:
    """Add a steering vector to the residual stream in every forward; undo takes it back.

    NAME is that of vector make, or a file that vector save has written. intervene --clear takes it
    away.
    """
    if not abs(call["strength"]) < float("inf"):
        raise UsageError(f"--strength {call['strength']:g} must be a finite number")
    # Not at the top: it needs MLX, and commands are declared before that is imported.
    from mlxfun.tracing.interventions import add_vector

    session, name, source = call.session, call["name"], ""
    if name not in session.vectors and name.endswith(".safetensors"):
        source = session.load_vector(call.bench.readable(Path(name)))
        name = source
    layer, vector = session.vector(name, call["layer"])
    change = add_vector(vector, call["strength"])
    return session.intervene(f"layers.{layer}.residual", change, source or name)


@command("vector list", group="observe", read_only=True)
def list_(call: Call) -> Report:
    """List the steering vectors in hand, and the interventions in force."""
    return call.session.list_vectors()


@command("vector save", group="observe", read_only=True)
@click.argument("name")
@click.argument("path", type=NewFile((".safetensors",)))
def save(call: Call) -> Report:
    """Write steering vectors to a safetensors file, with what they were made of."""
    return call.session.save_vector(call["name"], call.bench.writable(call["path"]))


COMMANDS = (intervene, make, use, list_, save)
