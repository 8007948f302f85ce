"""Calibration and routing statistics: `collect`, `stats`, `why`."""

from __future__ import annotations

from dataclasses import replace

import click

from commands.conditions import always, with_experts, with_stats
from commands.declare import Call, command, data_option, data_options, dataset_options, positive
from commands.types import FilePath, NewFile, Number, OneExpert
from mlxfun.calibration.options import METRICS, CollectOptions
from mlxfun.errors import UsageError
from mlxfun.report import Report
from mlxfun.techniques.prune.options import SelectOptions

NPZ = FilePath((".npz",))
NEW_NPZ = NewFile((".npz",))


@command("collect", group="observe", key="c", when=with_experts)
@data_option(
    "--dataset",
    "File or directory of texts or chats, or demo:NAME; FILE:2 for twice the share "
    "(default: the last one, see set).",
)
@data_options
@click.option("--batch-tokens", type=positive, metavar="N", help="Tokens in a batch, with padding.")
@click.option("--max-batch", type=positive, metavar="N", help="Lines in a batch.")
@click.option("--add", is_flag=True, help="Add to the statistics in hand, not start anew.")
def collect(call: Call) -> Report:
    """Run text through the model and count what each expert does.

    Steering is off meanwhile: what is counted is what the weights do, as in scans. Cancelling
    keeps what was collected so far and says how much that is.
    """
    batch = {k: call[k] for k in ("batch_tokens", "max_batch") if call[k] is not None}
    with call.bench.dataset(call["dataset"]) as sources:
        data = dataset_options(sources, call.params, call.bench.settings.seed)
        options = CollectOptions(data, add=call["add"], known=call.bench.kept_statistics, **batch)
        return call.session.collect(options, call.ctx)


@command("stats show", group="observe", when=with_stats)
def show(call: Call) -> Report:
    """Show the statistics in hand: samples, coverage, the least and most used experts."""
    return call.session.stats("show")


@command("stats save", group="observe", when=with_stats, read_only=True)
@click.argument("path", type=NEW_NPZ)
def save(call: Call) -> Report:
    """Write the statistics to an .npz file."""
    return call.session.save_stats(call.bench.writable(call["path"]))


@command("stats load", group="observe", when=with_experts)
@click.argument("path", type=NPZ)
def load(call: Call) -> Report:
    """Take statistics from an .npz file instead of collecting them."""
    return call.session.load_stats(call.bench.readable(call["path"]))


@command("stats count", group="observe", when=with_experts)
@click.argument("switch", type=click.Choice(["on", "off"]), metavar="on|off")
@click.option("--auto-save", type=NEW_NPZ, help="Write the statistics here after every answer.")
def count(call: Call) -> Report:
    """Count chat traffic into the statistics too, or stop doing so."""
    path = call["auto_save"]
    if path is not None and call["switch"] == "off":
        raise UsageError("stats count: --auto-save needs on")
    return call.session.set_counting(
        call["switch"] == "on", call.bench.writable(path) if path is not None else None
    )


@command("stats reset", group="observe", danger=True, when=with_experts)
def reset(call: Call) -> Report:
    """Forget the statistics in hand."""
    return call.session.reset_stats()


allow_stale = click.option(
    "--allow-stale", is_flag=True, help="Also for different models or states of the weights."
)


@command("stats diff", group="observe", when=always, read_only=True)
@click.argument("a", type=NPZ)
@click.argument("b", type=NPZ)
@click.option("--output", type=NewFile((".json",)), help="Write the differences as JSON.")
@click.option(
    "--metric",
    type=click.Choice(METRICS),
    default="reap",
    help="Whose scores are subtracted for the figures (default: reap).",
)
@allow_stale
def diff(call: Call) -> Report:
    """Compare two .npz files: how alike they rank the experts, and where they differ.

    Sums are compared as shares of their layer, so the files may be of different length. The figures
    of --metric are of the scores themselves, A minus B.
    """
    from mlxfun.calibration.files import diff_files  # brings NumPy: not at the top

    bench, output = call.bench, call["output"]
    return diff_files(
        bench.readable(call["a"]),
        bench.readable(call["b"]),
        bench.writable(output) if output is not None else None,
        call["allow_stale"],
        call["metric"],
        bench.known,
    )


@command("stats merge", group="observe", when=always, read_only=True)
@click.argument("files", type=NPZ, nargs=-1, required=True, metavar="A B...")
@click.option("--output", type=NEW_NPZ, required=True, help="Where the merged .npz is written.")
@click.option(
    "--by",
    type=click.Choice(["sum", "rank"]),
    default="sum",
    help="sum: as one long run (default). rank: each file has the same say, however long.",
)
@click.option(
    "--metric",
    type=click.Choice(METRICS),
    help="With --by rank: rank by this metric alone (default: each metric by itself).",
)
@allow_stale
def merge(call: Call) -> Report:
    """Merge several .npz files into one, to be used like that of a single run."""
    from mlxfun.calibration.files import merge_files  # brings NumPy: not at the top

    files = tuple(call.bench.readable(path) for path in call["files"])
    output = call.bench.writable(call["output"])
    return merge_files(
        files, output, call["by"], call["allow_stale"], call["metric"], call.bench.known
    )


@command("stats rank", group="observe", when=always)
@click.argument("files", type=NPZ, nargs=-1, required=True, metavar="A B...")
@click.option(
    "--metric",
    type=click.Choice(METRICS),
    default="reap_sum",
    help="What to rank by (default: reap_sum).",
)
@click.option("--n-prune", type=positive, metavar="N", help="Prune N per layer.")
@click.option(
    "--min-rank", type=positive, metavar="R", help="Only those never above rank R: 1 is busiest."
)
@click.option("--max-rank", type=positive, metavar="R", help="Only those never below rank R.")
@click.option("--model-wide", is_flag=True, help="The same expert numbers in every layer.")
@click.option("--output", type=NewFile((".json", ".csv")), help="Write who stays as a list.")
@click.option("--stage", is_flag=True, help="Stage the selection.")
@allow_stale
def rank(call: Call) -> Report:
    """Rank the experts by two to four .npz files together: the lowest summed ranks matter least.

    For instance stats rank code.npz prose.npz --n-prune 4 --min-rank 9 --stage: no expert is pruned that is
    among the eight busiest of a layer in either file.
    """
    from mlxfun.calibration.ranking import RankOptions, rank_files  # brings NumPy: not at the top

    names = ("metric", "n_prune", "min_rank", "max_rank", "model_wide", "allow_stale")
    output = call["output"]
    session = call.session if call["stage"] else None  # says so first when there is no model
    heat = session.view().heat if session is not None else None
    report = rank_files(
        [call.bench.readable(path) for path in call["files"]],
        RankOptions(**{name: call[name] for name in names}),
        call.bench.writable(output) if output is not None else None,
        heat.alive if heat is not None else None,
        call.bench.known,
    )
    if session is None:
        return report
    session.select(SelectOptions(clear=True, drop={k: v for k, v in report.chosen.items() if v}))
    return replace(report, staged=True)


@command("stats purge", group="observe", when=always, read_only=True)
@click.argument("path", type=NPZ)
@click.option("--output", type=NEW_NPZ, required=True, help="Where the filtered .npz is written.")
@click.option("--min-freq", type=positive, metavar="N", help="Take out experts of fewer tokens.")
@click.option(
    "--min-count", type=positive, metavar="N", help="The same for tokens with a measured norm."
)
@click.option(
    "--max-norm",
    type=Number(min=0, min_open=True),
    metavar="X",
    help="Warn of experts with a larger mean output norm; they stay.",
)
def purge(call: Call) -> Report:
    """Clear the scores of experts with too few tokens in an .npz; at least one filter is needed.

    Such experts then score 0 by every metric. To take a run out of a sum, see stats subtract.
    """
    from mlxfun.calibration.filters import purge_file  # brings NumPy: not at the top

    limits = {name: call[name] for name in ("min_freq", "min_count", "max_norm")}
    bench = call.bench
    return purge_file(bench.readable(call["path"]), bench.writable(call["output"]), **limits)


@command("stats subtract", group="observe", when=always, read_only=True)
@click.argument("a", type=NPZ)
@click.argument("b", type=NPZ)
@click.option("--output", type=NEW_NPZ, required=True, help="Where the remaining .npz is written.")
@allow_stale
def subtract(call: Call) -> Report:
    """Subtract the run in B from sums in A that include it."""
    from mlxfun.calibration.files import subtract_files  # brings NumPy: not at the top

    bench = call.bench
    a, b = bench.readable(call["a"]), bench.readable(call["b"])
    return subtract_files(a, b, bench.writable(call["output"]), call["allow_stale"], bench.known)


@command("why", group="observe", key="w", when=with_experts)
@click.argument("cell", type=OneExpert(), metavar="L:E")
def why(call: Call) -> Report:
    """Show the scores by which an expert is pruned or kept, for instance why 3:7."""
    layer, expert = call["cell"]
    return call.session.why(layer, expert)


COMMANDS = (collect, show, save, load, count, reset, diff, merge, rank, purge, subtract, why)
