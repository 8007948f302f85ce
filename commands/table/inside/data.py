"""`activations save` and `probe-train`: what data sets look like inside a model."""

from __future__ import annotations

from typing import Any

import click

from commands.declare import (
    Call,
    command,
    data_option,
    data_options,
    dataset_options,
    positive,
)
from commands.table.inside.look import layers_option, position_option, prompts_option
from commands.types import NewFile, Number
from mlxfun.report import Report
from mlxfun.tracing.options import ActivationOptions, ProbeTrainOptions, TuneLensOptions


@command("activations save", group="observe", read_only=True)
@click.argument("path", type=NewFile((".safetensors",)))
@data_option("--dataset", "Whose activations (default: the last one, see set).")
@data_options
@click.option(
    "--at",
    multiple=True,
    metavar="NAME",
    help="A value, see trace (default: layers.*.residual). Repeatable.",
)
@position_option("Which token of each sample")
@prompts_option
@click.option("--all-tokens", is_flag=True, help="Every token of each sample.")
def save_activations(call: Call) -> Report:
    """Write activations of a data set to a safetensors file, with what they were made on.

    Samples run in batches of bounded size, so the file may be larger than memory.
    """
    at = call["at"] or ("layers.*.residual",)
    position = None if call["all_tokens"] else call["position"]
    path = call.bench.writable(call["path"])
    options = ActivationOptions(path, tuple(at), position, call["prompts"])
    with call.bench.dataset(call["dataset"]) as sources:
        data = dataset_options(sources, call.params, call.bench.settings.seed)
        return call.session.save_activations(options, data, call.ctx)


class _ClassSource(click.ParamType[tuple[str, str]]):
    """`python=demo:python` -> ("python", "demo:python")."""

    name = "NAME=DATASET"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        name, equals, source = str(value).partition("=")
        if not name or not equals or not source:
            self.fail(f"{value!r} is not NAME=DATASET, such as python=demo:python", param, ctx)
        return name, source


@command("probe-train", group="observe", read_only=True)
@click.option(
    "--class",
    "classes",
    type=_ClassSource(),
    multiple=True,
    required=True,
    metavar="NAME=DATASET",
    help="A class and its samples; give at least two.",
)
@data_options
@layers_option
@position_option("Which token of each sample")
@prompts_option
@click.option(
    "--held-out",
    type=Number(0, 1, min_open=True, max_open=True),
    default=0.25,
    metavar="X",
    help="Share of the samples that judge the probes (default: 0.25).",
)
def probe_train(call: Call) -> Report:
    """Train a linear probe at each layer that separates data sets, scored on unseen samples."""
    bench = call.bench
    classes = {
        name: dataset_options(bench.readable_sources((source,)), call.params, bench.settings.seed)
        for name, source in call["classes"]
    }
    values = {name: call[name] for name in ("layers", "position", "held_out", "prompts")}
    options = ProbeTrainOptions(**values, seed=bench.settings.seed)
    return call.session.train_probes(options, classes, call.ctx)


@command("tune-lens", group="observe", read_only=True)
@click.argument("path", type=NewFile((".safetensors",)))
@data_option("--dataset", "What it is trained on (default: the last one, see set).")
@data_options
@layers_option
@click.option(
    "--passes", type=positive, default=3, metavar="N", help="Over the samples (default: 3)."
)
@click.option(
    "--rate",
    type=Number(0, 1, min_open=True),
    default=1e-3,
    metavar="X",
    help="Learning rate (default: 0.001).",
)
def tune(call: Call) -> Report:
    """Train a tuned lens: an affine map for each layer, for lens --tuned. The model is not changed.

    A fifth of the samples is held out, and says how far each layer is from the model before and
    after.
    """
    path = call.bench.writable(call["path"])
    options = TuneLensOptions(path, call["layers"], call["passes"], call["rate"])
    with call.bench.dataset(call["dataset"]) as sources:
        data = dataset_options(sources, call.params, call.bench.settings.seed)
        return call.session.tune_lens(options, data, call.ctx)


COMMANDS = (save_activations, probe_train, tune)
