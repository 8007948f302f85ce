"""One-shot commands: one line of a shell script does one whole job, without a session.

    mlxfun-shell MODEL collect --dataset D --output F
    mlxfun-shell prune --model MODEL --saliency F --n-prune 16 --output DIR

They take the names, options and defaults of mlx_fun's commands, so that its scripts run once the
name of the program is replaced. Each is a row of `TABLE` and nothing else: its options are those of
a command of the shell, some under another name, and it runs as a headless session of a few lines.
"""

from __future__ import annotations

import copy
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from commands.registry import COMMANDS
from commands.table.to_disk import NAMES as STRAIGHT

OUTPUT = "{output}"
"""Stands for the value of --output in the lines of a row."""


METRICS = {"ean": "man"}
"""mlx_fun's names of metrics that the shell has under another one: its ean is the mean norm."""


@dataclass(frozen=True, slots=True)
class OneShot:
    """A row of the table.

    command: of the shell. output: help of --output, "" for a command that has its own or none.
    renamed: {option here: option of the command}. arguments: {option here: argument of the
    command}. defaults: {option of the command: value}, where mlx_fun's differ from the shell's.
    fixed: words that are always given. after: lines that follow, with OUTPUT in them. asks: the
    command is followed by a chat with --prompt and --max-tokens. model: whether one is needed.
    also: {another name in mlx_fun: option here}. refused, noted: {option of mlx_fun that is not
    offered, or that does nothing here: why}.
    """

    command: str
    output: str = ""
    renamed: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, str] = field(default_factory=dict)
    defaults: Mapping[str, str] = field(default_factory=dict)
    fixed: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    asks: bool = False
    model: bool = True
    also: Mapping[str, str] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    noted: Mapping[str, str] = field(default_factory=dict)


_SAVED = ("apply", f"save {OUTPUT}")
_DIRECTORY = "Directory to save the model in."
_KV_CACHE = dict.fromkeys(
    ("--kv-compress", "--kv-compress-bits"),
    "there are no compressed KV caches here: leave --kv-compress and --kv-compress-bits out",
)
_SETS = {"--max-samples": "128", "--max-tokens": "2048"}

TABLE: dict[str, OneShot] = {
    "collect": OneShot(
        "collect", "The .npz to write.", defaults=_SETS, after=(f"stats save {OUTPUT}",)
    ),
    "prune": OneShot(
        "prune",
        _DIRECTORY,
        defaults={"--metric": "reap"},
        after=_SAVED,
        noted={
            "--stream": "--stream is about memory in mlx_fun: here the whole model is loaded, and a "
            "model that does not fit is refused before any work; what is saved is the same"
        },
    ),
    "merge": OneShot(
        "merge",
        _DIRECTORY,
        defaults={
            "--metric": "reap",
            "--max-samples": "64",
            "--max-tokens": "2048",
            "--max-similarity-tokens": "512",
            "--max-alignment-tokens": "256",
            "--alignment": "greedy",
        },
        after=_SAVED,
    ),
    "smoke-test": OneShot(
        "smoke-test",
        defaults={"--prompt": "pragma solidity ^0.8.0;", "--max-tokens": "100"},
        refused=_KV_CACHE,
    ),
    "safety-scan": OneShot(
        "safety-scan",
        renamed={"--harmful-dataset": "--harmful", "--benign-dataset": "--benign"},
        defaults=_SETS,
    ),
    "domain-scan": OneShot(
        "domain-scan",
        renamed={"--domain-dataset": "--domain", "--general-dataset": "--general"},
        defaults=_SETS,
    ),
    "steer": OneShot(
        "steer",
        renamed={"--mode": "--safety-mode"},
        fixed=("--ancestor-modes",),
        asks=True,
        refused=_KV_CACHE,
    ),
    "abliterate": OneShot(
        "abliterate",
        _DIRECTORY,
        renamed={"--harmful-dataset": "--harmful", "--benign-dataset": "--harmless"},
        defaults={
            "--max-samples": "64",
            "--max-tokens": "2048",
            "--projection": "orthogonal",
            "--answer-tokens": "32",
        },
        after=_SAVED,
    ),
    "amplify": OneShot(
        "amplify",
        _DIRECTORY,
        # mlx_fun asks for no text; a router without a bias is fitted on some.
        defaults={"--scale": "1.0", "--dataset": "demo:mixed", "--max-samples": "64"},
        after=_SAVED,
    ),
    "convert-nvfp4": OneShot(
        "save",
        arguments={"--output": "path"},
        defaults={"--quantize": "nvfp4"},
        also={"--hf-path": "--model", "--mlx-path": "--output"},
        refused={
            "--mode": "convert-nvfp4 keeps packed weights packed, so there is no --mode here: leave "
            "it out, or unpack with mlx_lm.convert --dequantize"
        },
    ),
    "stats-diff": OneShot("stats diff", arguments={"--file1": "a", "--file2": "b"}, model=False),
    "stats-merge": OneShot(
        "stats merge",
        arguments={"--files": "files"},
        defaults={"--metric": "reap"},
        fixed=("--by", "rank"),
        model=False,
    ),
    "stats-purge": OneShot("stats purge", arguments={"--input": "path"}, model=False),
}
"""Every one-shot command."""

ELSEWHERE = {
    "ui": "there is no ui: the shell's own screen shows the experts, chats and steers, run "
    "`mlxfun-shell MODEL`",
}
"""Commands of mlx_fun that are not offered, and what to use instead."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a one-shot command line asks for: the model ("" for none), lines for a headless run.

    notes: where a word means something else than in mlx_fun.
    """

    model: str
    lines: tuple[str, ...]
    notes: tuple[str, ...]
    as_json: bool
    output_root: Path | None


def named(words: Sequence[str]) -> tuple[str, str, list[str]] | None:
    """(model, name, rest) of the program's arguments, None if they name no one-shot command.

    The name comes first, or second behind the model. A model in a directory of such a name is
    written as ./prune.

    >>> named(["demo", "collect", "--dataset", "x"])
    ('demo', 'collect', ['--dataset', 'x'])
    >>> named(["--demo", "-c", "collect"]) is None
    True
    """
    known = TABLE.keys() | ELSEWHERE
    if words and words[0] in known:
        return "", words[0], list(words[1:])
    if len(words) > 1 and words[1] in known and (words[0] == "--demo" or words[0][0:1] != "-"):
        return words[0].removeprefix("--"), words[1], list(words[2:])
    return None


def parse(model: str, name: str, words: list[str], program: str) -> Asked | None:
    """The lines for a one-shot command, None if its help was asked for and printed.

    Raises click.UsageError with one sentence.
    """
    if name in ELSEWHERE:
        raise click.UsageError(ELSEWHERE[name])
    row = TABLE[name]
    words, said = _translated(row, words)
    context_name = f"{program} {'MODEL ' if row.model else ''}{name}"
    built = _click(row, name)
    found = built.main(words, prog_name=context_name, standalone_mode=False)
    if not isinstance(found, dict):
        return None
    chosen = found.pop("model", None) or model
    if row.model and not chosen:
        raise click.UsageError(f"{name} needs a model: {program} MODEL {name}, or --model MODEL")
    as_json, root = found.pop("as_json"), found.pop("output_root")
    metric = found.get("opt_--metric")
    notes = said
    if metric in METRICS:
        found["opt_--metric"] = METRICS[metric]
        mean = f"mlx_fun's metric {metric}, a mean of output norms, is {METRICS[metric]} here"
        notes = (*said, mean)
    return Asked(chosen if row.model else "", _lines(row, found), notes, as_json, root)


def _translated(row: OneShot, words: Sequence[str]) -> tuple[list[str], tuple[str, ...]]:
    """(the words under the names of here, notes). Raises click.UsageError."""
    kept, notes = [], []
    for word in words:
        name, equals, value = word.partition("=")
        if name in row.refused:
            raise click.UsageError(row.refused[name])
        if name in row.noted:
            notes.append(row.noted[name])
            continue
        kept.append(row.also.get(name, name) + equals + value)
    return kept, tuple(notes)


def _click(row: OneShot, name: str) -> click.Command:
    """The Click command of a row: the shell's options under the names of the table."""
    command = COMMANDS[row.command]
    names = {theirs: ours for ours, theirs in row.renamed.items()}
    saves = any(line.startswith("save ") for line in row.after)
    params: list[click.Parameter] = []
    if row.model:
        params.append(click.Option(["--model"], help="Directory, Hub id, or demo."))
    for param in command.click.params:
        if isinstance(param, click.Argument):
            ours = next(key for key, value in row.arguments.items() if value == param.name)
            many = param.nargs == -1
            params.append(
                click.Option(
                    [ours, f"arg_{param.name}"], required=True, multiple=many, metavar="FILE"
                )
            )
            continue
        assert isinstance(param, click.Option)
        if saves and param.name in STRAIGHT:
            continue  # --output says where
        if param.opts[-1] not in row.fixed:
            params.append(_option(param, row, names))
    if row.output:
        params.append(click.Option(["--output"], required=True, help=row.output))
    if saves:
        params.append(
            click.Option(["--force"], is_flag=True, help="Replace an existing directory.")
        )
    if row.asks:
        params.append(click.Option(["--prompt"], required=True, help="What to ask the model."))
        params.append(click.Option(["--max-tokens"], default="100", help="Length of the answer."))
    params.append(click.Option(["--json", "as_json"], is_flag=True, help="One JSON object a step."))
    root = click.Path(path_type=Path, file_okay=False)
    params.append(
        click.Option(["--output-root"], type=root, help="Write below this directory only.")
    )
    steps = [
        f"{command.name} with these options",
        *(s.replace(OUTPUT, "OUTPUT") for s in row.after),
    ]
    steps += ["chat with the prompt"] if row.asks else []
    help_ = f"{command.help}\n\nOne job without a session: {', then '.join(steps)}."
    return click.Command(name, params=params, help=help_, callback=lambda **found: found)


def _option(param: click.Option, row: OneShot, names: Mapping[str, str]) -> click.Option:
    """A copy of a command's option that passes its words on as they are."""
    option = copy.copy(param)
    given = [names.get(word, word) for word in param.opts]
    option.opts = list(dict.fromkeys([*given, *param.opts]))
    own = row.defaults.get(param.opts[-1])
    if own is not None:
        option.help = (
            f"{(param.help or '').partition(' (default')[0].rstrip('.')} (default: {own})."
        )
    if not param.is_flag:
        # What the words mean is checked by the shell's own command.
        option.type = click.STRING
        option.metavar = param.metavar or param.make_metavar(click.Context(click.Command("x")))
    option.default = () if param.multiple else (False if param.is_flag else None)
    option.name = f"opt_{param.opts[-1]}"
    return option


def _lines(row: OneShot, found: dict[str, Any]) -> tuple[str, ...]:
    """The lines of the shell that do what was asked."""
    command = COMMANDS[row.command]
    words: list[str] = []
    for param in command.click.params:
        if isinstance(param, click.Argument):
            value = found[f"arg_{param.name}"]
            words += list(value) if isinstance(value, tuple) else [value]
            continue
        flag = param.opts[-1]
        value = found.get(f"opt_{flag}")
        if value is True:
            words.append(flag)
            continue
        if value in (None, False, ()):
            value = row.defaults.get(flag)
        for one in value if isinstance(value, tuple) else () if value is None else (value,):
            words += [flag, str(one)]
    lines = [shlex.join([*row.command.split(), *words, *row.fixed])]
    output = found.get("output")
    lines += [line.replace(OUTPUT, shlex.quote(str(output))) for line in row.after]
    if found.get("force"):
        lines[-1] += " --force"
    if row.asks:
        lines.append(shlex.join(["chat", "--max-tokens", found["max_tokens"], found["prompt"]]))
    return tuple(lines)
