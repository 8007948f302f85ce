"""Renderers of what was seen inside a model."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from commands.output.render.base import experts_text, new_table, text, with_notes
from mlxfun.tracing.reports import (
    HEAD_FIGURES,
    ActivationsReport,
    AttentionReport,
    AttributionReport,
    DifferenceReport,
    HeadMapsReport,
    HeadsReport,
    LensReport,
    PatchReport,
    ProbesReport,
    TraceReport,
    TunedLensReport,
    VectorsReport,
)

COLUMNS = 8  # tokens side by side before the last ones are shown alone
ROWS = 20
LONGEST = 12  # characters of a token in a cell


def token(content: str, most: int = LONGEST) -> str:
    """A token, its spaces seen, cut where it is long."""
    shown = repr(content)[1:-1].replace(" ", "·")
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def _written(path: str) -> list[RenderableType]:
    return [text(f"written to {path}", "dim")] if path else []


def trace(report: TraceReport) -> RenderableType:
    """A line for each value."""
    table = new_table("value", "shape", "dtype", "norm", "lowest", "highest",
                      numbers=("norm", "lowest", "highest"))  # fmt: skip
    for value in report.values:
        figures = (
            "" if x is None else f"{x:.4g}" for x in (value.norm, value.lowest, value.highest)
        )
        shape = "x".join(map(str, value.shape))
        name = f"{value.name}: {experts_text(value.experts)}" if value.experts else value.name
        table.add_row(text(name), shape, value.dtype, *figures)
    said = ", ".join(f"{token(word)} {chance:.0%}" for word, chance in report.says[:5])
    where = f"figures at position {report.position}, {token(report.tokens[report.position])}"
    return Group(text(report.summary()), table, text(f"{where}; next: {said}", "dim"))


def difference(report: DifferenceReport) -> RenderableType:
    """A line for each layer: relative changes, and the share of the routes that moved."""
    names = ("attention", "routes", "mlp", "residual")
    table = new_table("layer", *names, numbers=("layer", *names))
    for layer, *changes in report.rows:
        shown = ("" if x is None else "=" if x == 0 else f"{x:.1%}" for x in changes)
        table.add_row(str(layer), *shown)
    worst = max(range(len(report.kl)), key=report.kl.__getitem__)
    where = f"largest KL {report.kl[worst]:.4f} nats, at position {worst}"
    return Group(
        text(report.summary()), table, text(f"{where} {token(report.tokens[worst])}", "dim")
    )


def lens(report: LensReport) -> RenderableType:
    """Layers down, the last tokens across; followed answers behind them."""
    first = max(0, len(report.tokens) - COLUMNS)
    heads = [token(t) for t in report.tokens[first:]]
    table = new_table("layer", *heads, *(f"rank of {token(a)}" for a in report.answers),
                      numbers=("layer",))  # fmt: skip
    for row in range(len(report.layers) - 1, -1, -1):
        cells = [
            _shaded(token(words[0]), chances[0])
            for words, chances in zip(report.words[row], report.probabilities[row], strict=True)
        ]
        ranks = report.answer_ranks[row][-1] if report.answers else ()
        table.add_row(str(report.layers[row]), *cells[first:], *map(str, ranks))
    notes = [f"{first} tokens before these are left out"] if first else []
    return with_notes(Group(text(report.summary()), table, *_written(report.written)), notes)


def tuned(report: TunedLensReport) -> RenderableType:
    """How far each layer is from the model, before and after."""
    table = new_table("layer", "KL before", "after", numbers=("layer", "KL before", "after"))
    for layer, before, after in report.rows:
        table.add_row(str(layer), f"{before:.3f}", f"{after:.3f}")
    return Group(text(report.summary()), table)


def _shaded(word: str, chance: float) -> Text:
    style = "bold" if chance >= 0.5 else "" if chance >= 0.1 else "dim"
    return text(f"{word} {chance:.0%}", style)


def attention(report: AttentionReport) -> RenderableType:
    """What each token looks at most."""
    table = new_table("position", "token", "looks at", numbers=("position",))
    for at, (name, looks) in enumerate(zip(report.tokens, report.looks, strict=True)):
        seen = ", ".join(
            f"{i} {token(report.tokens[i])} {report.weights[at][i]:.0%}"
            for i in looks
            if report.weights[at][i] >= 0.01
        )
        table.add_row(str(at), text(token(name)), text(seen))
    return Group(text(report.summary()), table, *_written(report.written))


def head_maps(report: HeadMapsReport) -> RenderableType:
    """Where each head of a layer looks, in figures."""
    table = new_table("head", *HEAD_FIGURES, numbers=("head", *HEAD_FIGURES))
    for head, (first, before, own, tokens) in enumerate(report.rows):
        table.add_row(str(head), f"{first:.0%}", f"{before:.0%}", f"{own:.0%}", f"{tokens:.1f}")
    return Group(text(report.summary()), table, *_written(report.written))


def heads(report: HeadsReport) -> RenderableType:
    """The first heads by a pattern."""
    table = new_table("layer", "head", "score", numbers=("layer", "head", "score"))
    for layer, head, score in report.rows[:ROWS]:
        table.add_row(str(layer), str(head), f"{score:.3f}")
    return Group(text(report.summary()), table)


def patch(report: PatchReport) -> RenderableType:
    """The strongest components."""
    table = new_table("layer", report.across, "score", numbers=("layer", "score"))
    for layer, column, label, score in report.top:
        said = f"{column} {token(label)}" if report.across == "position" else str(column)
        table.add_row(str(layer), text(said), f"{score:+.3f}")
    against = f" over {token(report.other)}" if report.other else ""
    of = f"of {token(report.answer)}{against}" if report.answer else ""
    line = f"{report.metric} {of} corrupted {report.corrupted:.3f}, clean {report.clean:.3f}"
    return Group(text(report.summary()), text(line, "dim"), table, *_written(report.written))


def attribution(report: AttributionReport) -> RenderableType:
    """The largest shares."""
    table = new_table("part", "logit", numbers=("logit",))
    for name, logit in report.shares[:ROWS]:
        table.add_row(name, f"{logit:+.3f}")
    return Group(text(report.summary()), table, *_written(report.written))


def activations(report: ActivationsReport) -> RenderableType:
    """Where they were written, and the values that the file holds."""
    shown = ", ".join(report.names[:ROWS])
    more = f" and {len(report.names) - ROWS} more" if len(report.names) > ROWS else ""
    return Group(text(report.summary()), text(f"{shown}{more}", "dim"))


def vectors(report: VectorsReport) -> RenderableType:
    """Each set of vectors with its layers."""
    parts: list[RenderableType] = [text(report.summary())]
    for row in report.rows:
        table = new_table("layer", "norm", "separated", numbers=("layer", "norm", "separated"))
        apart = dict(row.told_apart)
        for layer, norm in row.norms:
            share = f"{apart[layer]:.0%}" if layer in apart else ""
            table.add_row(str(layer), f"{norm:.3g}", share)
        made = f"{row.name}: {row.method} of {row.positive} and {row.negative} samples"
        where = f", written to {row.path}" if row.path else ""
        parts += [text(f"{made}, state {row.state[:8]}{where}", "dim"), table]
    parts += [text(f"in force: {words}") for words in report.standing]
    return with_notes(Group(*parts), report.notices)


def probes(report: ProbesReport) -> RenderableType:
    """How well each layer tells the classes apart."""
    table = new_table("layer", "right", "balanced", numbers=("layer", "right", "balanced"))
    for layer, accuracy, balanced in report.rows:
        table.add_row(str(layer), f"{accuracy:.1%}", f"{balanced:.1%}")
    return Group(text(report.summary()), table)
