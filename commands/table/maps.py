"""Options that name scan reports; several in one command, each with its own mode and limit.

    steer --domain-map python.json --domain-mode boost --max-experts 3 --domain-map law.json ...

A mode, or a limit, that is given once counts for all maps; given more than once, each counts for
the map before it. With one map the order does not matter.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem

from commands.declare import Decorator, Handler
from commands.types import FilePath, Items
from mlxfun.errors import UsageError
from mlxfun.steering.options import STEER_MODES, ScanMap

MAP = FilePath((".json",))
KEEPING = click.Choice(["protect", "target"])
LIMIT = "max_experts"
NAMES = (*(f"{kind}_{what}" for kind in STEER_MODES for what in ("map", "mode")), LIMIT)


def map_options(away: str, stale: str) -> Decorator:
    """The options that name scan reports. away: what happens to experts that are not kept."""
    mode_help = f"Keep its experts, or {away}."
    options = (
        click.option("--safety-map", type=MAP, help="safety_report.json of a safety scan."),
        click.option("--safety-mode", type=KEEPING, default="protect", help=mode_help),
        click.option("--domain-map", type=MAP, help="domain_report.json of a domain scan."),
        click.option("--domain-mode", type=KEEPING, default="protect", help=mode_help),
        click.option(
            "--allow-stale", is_flag=True, help=f"Use {stale} made on another state of the weights."
        ),
    )

    def add(handler: Handler) -> Handler:
        for option in reversed(options):
            handler = option(handler)
        return handler

    return add


class ExpertLimit(click.ParamType[int | None]):
    """`"3"` -> 3, `"all"` -> None."""

    name = "limit"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | None:
        if value == "all":
            return None
        try:
            most = int(value)
        except ValueError:
            most = 0
        if most < 1:
            self.fail(f"{value!r} is neither a number of experts, from 1 on, nor all", param, ctx)
        return most

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
        return [CompletionItem(x) for x in ("all",) if x.startswith(incomplete)]


class GivenOption(NamedTuple):
    """One option of the line, in its order."""

    name: str
    value: Any


class WithMaps(click.Command):
    """A command whose options named `NAMES`, all of them multiple, become one parameter `maps`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse, then join each map with its mode and limit. Raises click.UsageError."""
        # Click gathers the values of each option; the order among options is known to its parser.
        _, _, order = self.make_parser(ctx).parse_args(args=list(args))
        rest = super().parse_args(ctx, args)
        if not ctx.resilient_parsing:
            values = {name: iter(ctx.params.pop(name)) for name in NAMES}
            given = [GivenOption(p.name, next(values[p.name])) for p in order if p.name in values]
            try:
                ctx.params["maps"] = joined(given)
            except UsageError as problem:
                raise click.UsageError(str(problem), ctx) from None
        return rest


def joined(given: Sequence[GivenOption]) -> tuple[ScanMap, ...]:
    """The maps of a line in order, each with its mode and its limit. Raises UsageError."""
    kinds = [kind for name, _ in given for kind in STEER_MODES if name == f"{kind}_map"]
    if not kinds and any(name == LIMIT for name, _ in given):
        raise UsageError("--max-experts limits a map: give --safety-map or --domain-map")
    paths = [value for name, value in given if name.endswith("_map")]
    modes = {kind: _spread(given, f"{kind}_mode", (f"{kind}_map",), STEER_MODES[kind][0])
             for kind in STEER_MODES}  # fmt: skip
    limits = _spread(given, LIMIT, tuple(f"{kind}_map" for kind in STEER_MODES), None)
    return tuple(
        ScanMap(path, kind, next(modes[kind]), next(limits))
        for path, kind in zip(paths, kinds, strict=True)
    )


def _spread(
    given: Sequence[GivenOption], name: str, maps: tuple[str, ...], default: Any
) -> Iterator[Any]:
    """The value of option `name` for each of the options `maps`, in order."""
    values = [value for option, value in given if option == name]
    count = sum(option in maps for option, _ in given)
    if len(values) == 1 or (values and count == 1):
        return iter([values[-1]] * count)
    found: list[Any] = []
    for option, value in given:
        if option in maps:
            found.append(default)
        elif option == name and count and not found:
            what = " or ".join(f"--{m.replace('_', '-')}" for m in maps)
            raise UsageError(
                f"--{name.replace('_', '-')} {value} stands before the first {what}: given more "
                "than once, each counts for the map before it"
            )
        elif option == name and found:
            found[-1] = value
    return iter(found)
