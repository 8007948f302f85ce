"""`safety-scan` and `domain-scan` compare how two text sets use experts; `prepare-dataset`, `dataset`."""

from __future__ import annotations

from typing import Any

import click

from commands.conditions import always, with_experts
from commands.declare import (
    DATASET,
    Call,
    Decorator,
    command,
    data_option,
    data_options,
    dataset_options,
    positive,
    stack,
)
from commands.types import NewFile, Number
from mlxfun.data.options import PrepareOptions
from mlxfun.report import Report
from mlxfun.scans.options import ScanOptions

JSON = NewFile((".json",))


def _set(name: str, what: str) -> Decorator:
    return data_option(name, f"{what}: file, directory, or demo:NAME.", required=True)


rules = stack(
    click.option("--output", type=JSON, required=True, help="Where the report is written."),
    click.option(
        "--threshold-percentile",
        type=Number(50, 100, max_open=True),
        default=90.0,
        metavar="P",
        help="Flag only the outermost 100 - P percent on each side (default: 90).",
    ),
    click.option(
        "--alpha",
        type=Number(0, 1, min_open=True, max_open=True),
        default=0.01,
        metavar="Q",
        help="Bound on the share of false discoveries among the flagged (default: 0.01).",
    ),
    data_options,
)


def _options(call: Call, first: str, second: str, domain_name: str = "") -> ScanOptions:
    bench = call.bench
    one, two = (
        dataset_options(bench.readable_sources(call[name]), call.params, bench.settings.seed)
        for name in (first, second)
    )
    return ScanOptions(
        one,
        two,
        bench.writable(call["output"]),
        call["threshold_percentile"],
        call["alpha"],
        domain_name,
    )


@command("safety-scan", group="observe", when=with_experts, read_only=True)
@_set("--harmful", "Prompts that ought to be refused")
@_set("--benign", "Prompts of like topics that ought to be answered")
@rules
def safety_scan(call: Call) -> Report:
    """Find the experts that harmful and benign prompts use differently, and write a safety report.

    An expert is flagged when its difference is among the largest, larger than chance and the same
    for other choices of samples. Routing follows the topic first, so give both sets like topics.
    The report serves prune --safety-map and steer --safety-map.
    """
    return call.session.safety_scan(_options(call, "harmful", "benign"), call.ctx)


@command("domain-scan", group="observe", when=with_experts, read_only=True)
@_set("--domain", "Text of the domain")
@_set("--general", "Text of everything else")
@click.option("--domain-name", required=True, metavar="NAME", help="What the domain is called.")
@rules
def domain_scan(call: Call) -> Report:
    """Find the experts that serve a domain, and those that serve general text; write a report.

    The report serves prune --domain-map and steer --domain-map. See also safety-scan.
    """
    options = _options(call, "domain", "general", call["domain_name"])
    return call.session.domain_scan(options, call.ctx)


class _ColumnFilter(click.ParamType[tuple[str, str]]):
    """`"lang=en"` -> ("lang", "en")."""

    name = "COLUMN=VALUE"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, str]:
        if isinstance(value, tuple):
            return value
        column, equals, wanted = str(value).partition("=")
        if not column or not equals:
            self.fail(f"{value!r} is not COLUMN=VALUE, such as lang=en", param, ctx)
        return column, wanted


@command("prepare-dataset", group="observe", when=always, read_only=True)
@click.argument("source", metavar="HUB_ID")
@click.option("--output", type=NewFile((".jsonl",)), required=True, help="The JSONL to write.")
@click.option("--split", default="train", help="Which split (default: train).")
@click.option("--subset", metavar="NAME", help="Which configuration of the data set.")
@click.option("--revision", metavar="REV", help="Branch, tag or commit on the Hub.")
@click.option(
    "--text-column",
    metavar="NAME",
    help="Take this column as text (default: messages, prompt and completion, or text).",
)
@click.option(
    "--where", type=_ColumnFilter(), multiple=True, help="Keep records of this value only."
)
@click.option("--min-chars", type=positive, metavar="N", help="Drop shorter records.")
@click.option("--max-chars", type=positive, metavar="N", help="Drop longer records.")
@click.option("--max-samples", type=positive, metavar="N", help="Stop after N kept records.")
def prepare_dataset(call: Call) -> Report:
    """Stream a data set of the Hub into a JSONL file that collect and the scans read.

    Needs the extra: pip install 'mlxfun[dataset]'. For instance prepare-dataset
    HuggingFaceH4/ultrachat_200k --split train_sft --max-samples 256 --output chat.jsonl
    """
    from mlxfun.data.hub import prepare

    values = dict(call.params)
    values["output"] = call.bench.writable(values["output"])
    return prepare(PrepareOptions(**values), call.ctx)


@command("dataset", group="observe", when=always, read_only=True)
@click.argument("files", type=DATASET, nargs=-1, required=True, metavar="FILE...")
@data_options
def dataset(call: Call) -> Report:
    """Show what would be read of a data set: forms, counts, lengths, the first sample.

    With a model loaded, lengths are in its tokens, and the sample is what the model sees of it.
    Several files are a mixture; FILE:2 takes twice the share of FILE.
    """
    sources = call.bench.readable_sources(call["files"])
    options = dataset_options(sources, call.params, call.bench.settings.seed)
    if call.bench.loaded is not None:
        return call.session.dataset(options, call.ctx)
    from mlxfun.data.describe import describe  # brings NumPy: not at the top

    return describe(options, None, None, call.ctx)


COMMANDS = (safety_scan, domain_scan, prepare_dataset, dataset)
