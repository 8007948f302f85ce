"""The list of guides, and the text of each. Reading one needs the standard library only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Guide:
    """One chapter: the file `NAME.md` beside this one.

    summary: its line in the list of guides. commands: those whose help pages point to it.
    """

    name: str
    summary: str
    commands: tuple[str, ...] = ()


_ALL = (
    Guide("screen", "Panels and keys: heatmap, selecting experts, A/B chat, mixer"),
    Guide(
        "editing",
        "Staging, applying and undoing an edit; history; saving",
        ("apply", "discard", "flip", "compact", "undo", "redo", "goto", "history", "name", "save"),
    ),
    Guide(
        "data",
        "Data sets, the demo data, and how experts are numbered",
        ("prepare-dataset", "dataset"),
    ),
    Guide(
        "calibration",
        "Routing statistics: metrics; combining and comparing runs",
        (
            *("collect", "why", "stats show", "stats save", "stats load", "stats count"),
            *(
                "stats reset",
                "stats diff",
                "stats merge",
                "stats rank",
                "stats purge",
                "stats subtract",
            ),
        ),
    ),
    Guide(
        "pruning",
        "Removing experts: rankings, refits, selection by hand",
        ("prune", "select", "plan show", "plan save"),
    ),
    Guide(
        "large-models",
        "Models larger than memory, read layer by layer",
        (),
    ),
    Guide("narrowing", "Fewer neurons in every expert: the least loss for a size", ("narrow",)),
    Guide("merging", "Averaging experts into similar ones, compared with pruning", ("merge",)),
    Guide("distillation", "Training routers or experts after an edit", ("distil",)),
    Guide(
        "scans",
        "Finding the experts of a domain or of refusals",
        ("safety-scan", "domain-scan", "dossier", "topics"),
    ),
    Guide(
        "inside",
        "What a forward computes, by name: lenses, patching, features",
        (
            *("trace", "difference", "lens", "attention", "patch", "attribute", "activations save"),
            *("tune-lens", "probe-train", "intervene", "vector make", "vector use", "vector list"),
            *("vector save", "sae train", "sae features", "sae use"),
        ),
    ),
    Guide("steering", "Forcing experts on or off, or biasing them, at run time", ("steer",)),
    Guide(
        "router-edits",
        "Making steering permanent in the routers: amplify and bake",
        ("amplify", "bake"),
    ),
    Guide(
        "ablation",
        "Removing a refusal direction from the weights",
        ("abliterate", "refusals"),
    ),
    Guide(
        "measurements",
        "Perplexity, KL and top-1 agreement; A/B divergence",
        ("evaluate", "preview", "tasks", "probe", "compare", "ab"),
    ),
    Guide(
        "recipes",
        "Trying ways of making a model smaller: compress, recipe files",
        ("compress", "bits", "recipe"),
    ),
    Guide(
        "sessions",
        "Recording and replaying sessions; recovery after a crash",
        ("record", "replay", "resume", "expect"),
    ),
    Guide(
        "memory",
        "Larger than memory: planning, experts on disk, profiles",
        ("plan", "load", "residency", "residency sweep", "profile save", "profile load"),
    ),
    Guide("serving", "Serving OpenAI's and Anthropic's clients while you edit", ("serve",)),
    Guide("distributed", "Calibration and scans on several machines", ("workers",)),
    Guide("headless", "Scripts: --headless, JSON, exit codes; the line shell --plain"),
    Guide("configuration", "config.toml: theme, defaults, undo budget, keys"),
    Guide("library", "Using mlxfun from Python"),
    Guide("performance", "Measured cost of calibration, steering, edits and scans"),
    Guide("installation", "Requirements, GPUs under Linux, a faster BLAS, extras"),
    Guide("commands", "Every command with its key and an example"),
)

GUIDES: dict[str, Guide] = {guide.name: guide for guide in _ALL}
"""The guides by name, in reading order. No name is that of a command."""

_BY_COMMAND = {command: guide for guide in _ALL for command in guide.commands}


def guide_for(command: str) -> Guide | None:
    """The guide that explains `command`, None for one that needs none."""
    return _BY_COMMAND.get(command)


def source(name: str) -> str:
    """The Markdown text of a guide. Raises KeyError for an unknown name."""
    from importlib.resources import files  # most sessions read none

    return (files(__package__) / f"{GUIDES[name].name}.md").read_text("utf-8")
