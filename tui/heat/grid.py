"""Layout of the heatmap: maps between cells [L, E] and the terminal's lines and columns.

The map fills its window: experts and layers are divided over the columns and lines there are, so
that cells differ by one column or line in size. Where there are more experts than columns, or more
layers than half lines, several share a cell.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

import numpy as np

from mlxfun.arrays import Array
from tui.heat.model import CONDEMNED, CURSOR, LEVELS, PRUNED, SHARE, VOID


@dataclass(frozen=True, slots=True)
class Axis:
    """How things (experts or layers) are divided over units (columns, lines or half lines).

    firsts: the first thing of each cell; edges: the unit at which each cell begins, and the end of
    the last; count: how many things there are.
    """

    firsts: tuple[int, ...]
    edges: tuple[int, ...]
    count: int

    def cell_of(self, thing: int) -> int:
        """The cell of a thing."""
        return bisect_right(self.firsts, thing) - 1

    def cell_at(self, unit: int) -> int:
        """The cell at a unit, the last one behind the end."""
        return min(bisect_right(self.edges, unit) - 1, len(self.firsts) - 1)

    def things(self, cell: int) -> tuple[int, int]:
        """(first, last) thing of a cell."""
        ends = (*self.firsts[1:], self.count)
        return self.firsts[cell], ends[cell] - 1

    @property
    def pooled(self) -> bool:
        """Whether several things share a cell."""
        return len(self.firsts) < self.count


def divided(count: int, units: int) -> Axis:
    """`count` things over `units` as evenly as whole units allow.

    >>> divided(3, 8).edges, divided(5, 2).firsts
    ((0, 3, 5, 8), (0, 2))
    """
    cells = max(1, min(count, units))
    firsts = tuple(i * count // cells for i in range(cells))
    edges = tuple((2 * i * units + cells) // (2 * cells) for i in range(cells + 1))
    return Axis(firsts, edges, count)


def uniform(count: int, size: int) -> Axis:
    """A cell of `size` units for each thing."""
    return Axis(tuple(range(count)), tuple(range(0, (count + 1) * size, size)), count)


@dataclass(frozen=True, slots=True)
class Grid:
    """Where cells are on the terminal.

    gutter: columns left of the map, for layer numbers. across: the experts; down: the layers, in
    lines, or in half lines when `half`: two rows then share a line, by half blocks.
    """

    gutter: int
    across: Axis
    down: Axis
    half: bool

    @property
    def columns(self) -> int:
        """Columns of the whole map."""
        return self.across.edges[-1]

    @property
    def lines(self) -> int:
        """Lines of the whole map, without its header."""
        units = self.down.edges[-1]
        return -(-units // 2) if self.half else units

    def lines_of(self, position: int) -> tuple[int, int]:
        """(first line, end) of MoE layer number `position`."""
        row = self.down.cell_of(position)
        start, end = self.down.edges[row : row + 2]
        return (start // 2, -(-end // 2)) if self.half else (start, end)

    def positions_on(self, line: int) -> tuple[int, int]:
        """(first, last) MoE layer on a line of the map."""
        units = (line * 2, line * 2 + 1) if self.half else (line, line)
        upper, lower = (self.down.things(self.down.cell_at(unit)) for unit in units)
        return upper[0], lower[1]

    def columns_of(self, expert: int) -> tuple[int, int]:
        """(first column, end) of an expert's cell."""
        cell = self.across.cell_of(expert)
        return self.across.edges[cell], self.across.edges[cell + 1]

    def expert_at(self, column: int) -> int:
        """The first expert of the cell at a column of the map."""
        return self.across.firsts[self.across.cell_at(column)]

    def pool_of(self, position: int, expert: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """((first, last) layer, (first, last) expert) of the cell that holds an expert."""
        return (
            self.down.things(self.down.cell_of(position)),
            self.across.things(self.across.cell_of(expert)),
        )


def layout(
    layers: tuple[int, ...], experts: int, width: int, height: int, fit: bool, margin: int = 0
) -> Grid:
    """The grid for a window of `width` x `height` that includes gutter, margin and header line."""
    count = len(layers)
    gutter = len(str(max(layers, default=0))) + 2
    across, down = max(1, width - gutter - margin), max(1, height - 1)
    half = count > down
    if fit:
        units = min(2 * down, 2 * count) if half else down
        return Grid(gutter, divided(experts, across), divided(count, units), half)
    columns = uniform(experts, max(1, across // max(1, experts)))
    return Grid(gutter, columns, uniform(count, 1) if half else divided(count, down), half)


Marks = tuple[tuple[int, int], tuple[int, int]]
"""The corners of what the cursor marks, both inside: (position, expert) twice."""


def corners(one: tuple[int, int], other: tuple[int, int]) -> Marks:
    """Two opposite corners as (upper left, lower right)."""
    (top, left), (bottom, right) = one, other
    return (min(top, bottom), min(left, right)), (max(top, bottom), max(left, right))


def pooled(codes: Array, grid: Grid) -> Array:
    """Codes int32 [rows, cells] of the grid's cells.

    Of experts that share a cell the greatest code is shown: the most important kind, then the
    hottest. Where some of them are to be pruned it is the fraction of those, of all that are left.
    """
    if not (grid.across.pooled or grid.down.pooled):
        return codes
    shown = _reduced(np.maximum, codes, grid)
    kinds = shown // LEVELS
    if not (kinds == CONDEMNED).any():
        return shown
    there = codes // LEVELS
    going = _reduced(np.add, (there == CONDEMNED).astype(np.int32), grid)
    left = _reduced(np.add, (there != PRUNED).astype(np.int32), grid)
    level = np.ceil(going * (LEVELS - 1) / np.maximum(left, 1)).astype(np.int32)
    mixed: Array = np.where(kinds == CONDEMNED, SHARE * LEVELS + level, shown)
    return mixed


def _reduced(how: np.ufunc, values: Array, grid: Grid) -> Array:
    if grid.across.pooled:
        values = how.reduceat(values, grid.across.firsts, axis=1)
    if grid.down.pooled:
        values = how.reduceat(values, grid.down.firsts, axis=0)
    return values


def cells(codes: Array, grid: Grid, marks: Marks | None) -> Array:
    """Codes int32 [rows or lines, cells] as drawn: pooled, with what is marked, two rows in one.

    In half-block grids an entry is `upper * BASE + lower`, a row for each line.
    """
    shown = pooled(codes, grid)
    if not grid.half:
        return shown
    if marks is not None:
        (top, left), (bottom, right) = marks
        rows = slice(grid.down.cell_of(top), grid.down.cell_of(bottom) + 1)
        columns = slice(grid.across.cell_of(left), grid.across.cell_of(right) + 1)
        shown = shown.copy()
        shown[rows, columns] = CURSOR * LEVELS
    if grid.down.edges[-1] != len(grid.down.firsts):
        shown = np.repeat(shown, np.diff(grid.down.edges), axis=0)
    if len(shown) % 2:
        void = np.full((1, shown.shape[1]), VOID * LEVELS, shown.dtype)
        shown = np.concatenate([shown, void])
    return shown[0::2] * BASE + shown[1::2]


BASE = (VOID + 1) * LEVELS


def changed(old: Array | None, new: Array) -> list[int] | None:
    """The rows in which two maps differ; None when they cannot be compared."""
    if old is None or old.shape != new.shape:
        return None
    return [int(row) for row in np.flatnonzero((old != new).any(axis=1))]
