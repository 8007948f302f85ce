"""`sae train`, `sae features` and `sae use`: sparse autoencoders of one value, and their features."""

from __future__ import annotations

import click

from commands.declare import (
    Call,
    Needed,
    command,
    data_option,
    data_options,
    dataset_options,
    positive,
)
from commands.types import Experts, FilePath, Number, Whole
from mlxfun.errors import UsageError
from mlxfun.report import Report
from mlxfun.tracing.options import (
    SAE_KINDS,
    SaeFeaturesOptions,
    SaeTraining,
    SaeTrainOptions,
    SaeUseOptions,
)

DEFAULTS = SaeTraining()
TRAINING = ("kind", "features", "k", "passes", "batch", "rate", "skip", "dead_after")
above_zero = Number(0, min_open=True)

at_option = click.option(
    "--at", metavar="NAME", help="The value, where the autoencoder's files do not say it."
)


@command("sae train", group="observe", read_only=True)
@click.argument("path", type=FilePath())
@click.option(
    "--at",
    cls=Needed,
    unless=("values",),
    metavar="NAME",
    help="The value, see trace: layers.3.residual, layers.3.mlp.output, layers.3.experts.7.output...",
)
@data_option("--dataset", "What it is trained on (default: the last one, see set).")
@data_options
@click.option(
    "--from",
    "values",
    type=FilePath((".safetensors",)),
    metavar="FILE",
    help="Train on a file of activations save --all-tokens; --dataset then only judges.",
)
@click.option(
    "--kind",
    type=click.Choice(SAE_KINDS),
    default=DEFAULTS.kind,
    help="topk: K features a token (default). jumprelu: a threshold each, K on average.",
)
@click.option(
    "--features", type=positive, default=None, metavar="N", help="How many (default: 8 x width)."
)
@click.option(
    "--k", type=positive, default=DEFAULTS.k, metavar="K", help="Active ones (default: 32)."
)
@click.option(
    "--passes", type=positive, default=1, metavar="N", help="Over the samples (default: 1)."
)
@click.option(
    "--batch",
    type=positive,
    default=DEFAULTS.batch,
    metavar="N",
    help="Tokens a step (default: 1024).",
)
@click.option(
    "--rate", type=above_zero, default=None, metavar="X", help="Of Adam (default: by --features)."
)
@click.option(
    "--skip",
    type=Whole(min=0),
    default=DEFAULTS.skip,
    metavar="N",
    help="Leave out the first tokens of each sample, whose values are far larger (default: 1).",
)
@click.option(
    "--dead-after",
    type=positive,
    default=None,
    metavar="N",
    help="Tokens without activity that make a feature dead (default: a tenth of a pass).",
)
@click.option("--resume", is_flag=True, help="Go on with the run that PATH holds, as it began.")
def train(call: Call) -> Report:
    """Train a sparse autoencoder of one value, into the directory PATH. The model is not changed.

    PATH gets SAELens' files and the state of training, when it is cancelled too. A twentieth of the
    samples is held out and says how well values are rebuilt, and what the model makes of them.
    """
    bench = call.bench
    chosen = {name: call[name] for name in TRAINING if call[name] is not None}
    training = SaeTraining(**chosen, seed=bench.settings.seed)
    values = None if call["values"] is None else bench.readable(call["values"])
    path = bench.writable(call["path"])
    if values is None and call["at"] is None:
        raise UsageError("sae train needs --at NAME, the value, such as --at layers.3.residual")
    options = SaeTrainOptions(path, call["at"], training, values, call["resume"])
    if values is not None and not call["dataset"]:
        return call.session.train_sae(options, None, call.ctx)
    with bench.dataset(call["dataset"]) as sources:
        data = dataset_options(sources, call.params, bench.settings.seed)
        return call.session.train_sae(options, data, call.ctx)


@command("sae features", group="observe", read_only=True)
@click.argument("path", type=FilePath())
@data_option("--dataset", "Where they are looked for (default: the last one, see set).")
@data_options
@click.option(
    "--features",
    type=Experts(),
    metavar="LIST",
    help='These: "0,4..7" (default: those with the largest values).',
)
@click.option(
    "--count", type=positive, default=10, metavar="N", help="How many without it (default: 10)."
)
@click.option(
    "--examples", type=positive, default=5, metavar="N", help="Of each feature (default: 5)."
)
@at_option
def features(call: Call) -> Report:
    """See where features of an autoencoder are active: density, and the tokens of largest value.

    PATH is a directory of sae train, or one that SAELens has written.
    """
    names = ("at", "features", "count", "examples")
    path = call.bench.readable(call["path"])
    options = SaeFeaturesOptions(path, **{name: call[name] for name in names})
    with call.bench.dataset(call["dataset"]) as sources:
        data = dataset_options(sources, call.params, call.bench.settings.seed)
        return call.session.sae_features(options, data, call.ctx)


@command("sae use", group="edit")
@click.argument("path", type=FilePath())
@click.option("--feature", type=Whole(min=0), required=True, metavar="N", help="Which.")
@click.option(
    "--strength", type=Number(), metavar="X", help="Add its direction, times X, at every token."
)
@click.option(
    "--clamp", type=Number(), metavar="X", help="Set it to X at every token; 0 takes it out."
)
@at_option
def use(call: Call) -> Report:
    """Steer by a feature of an autoencoder in every forward; undo takes it back.

    X is in the units of sae features: a feature's own largest value is strong. It takes the place of
    what stands at the same value; intervene --clear takes it away.
    """
    path = call.bench.readable(call["path"])
    options = SaeUseOptions(path, call["feature"], call["strength"], call["clamp"], call["at"])
    if (options.strength is None) == (options.level is None):
        raise UsageError("sae use takes --strength X or --clamp X, one of both")
    name, change = call.session.sae_change(options)
    return call.session.intervene(name, change, str(call["path"]))


COMMANDS = (train, features, use)
