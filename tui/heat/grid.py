"""Layout of the heatmap: maps between cells [L, E] and the terminal's lines and columns."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mlxfun.arrays import Array
from tui.heat.model import CURSOR, LEVELS, VOID

MAX_CELL_WIDTH, MAX_CELL_HEIGHT = 6, 3


@dataclass(frozen=True, slots=True)
class Grid:
    """Where cells are on the terminal.

    gutter: columns left of the map, for layer numbers. pool: experts that share one cell.

    columns: cells in a line. width: columns of a cell. half: two layers share a line, by half
    blocks; else a layer has `height` lines. lines: of the whole map, without its header.
    """

    gutter: int
    pool: int
    columns: int
    width: int
    height: int
    half: bool
    lines: int

    def line_of(self, position: int) -> int:
        """The first line, of the map, of MoE layer number `position`."""
        return position // 2 if self.half else position * self.height

    def position_at(self, line: int, upper: bool = True) -> int:
        """The MoE layer at a line of the map."""
        return line * 2 + (0 if upper else 1) if self.half else line // self.height

    def column_of(self, expert: int) -> int:
        """The first column, of the map, of an expert's cell."""
        return expert // self.pool * self.width

    def expert_at(self, column: int) -> int:
        """The first expert of the cell at a column of the map."""
        return column // self.width * self.pool


def layout(layers: tuple[int, ...], experts: int, width: int, height: int, fit: bool) -> Grid:
    """The grid for a window of `width` x `height` that includes gutter and header line."""
    count = len(layers)
    gutter = len(str(max(layers, default=0))) + 2
    across, down = max(1, width - gutter), max(1, height - 1)
    pool = -(-experts // across) if fit else 1
    columns = -(-experts // pool)
    cell = max(1, min(MAX_CELL_WIDTH, across // columns))
    half = count > down
    tall = 1 if half else max(1, min(MAX_CELL_HEIGHT, down // max(1, count), cell // 2 + 1))
    lines = -(-count // 2) if half else count * tall
    return Grid(gutter, pool, columns, cell, tall, half, lines)


Marks = tuple[tuple[int, int], tuple[int, int]]
"""The corners of what the cursor marks, both inside: (position, expert) twice."""


def corners(one: tuple[int, int], other: tuple[int, int]) -> Marks:
    """Two opposite corners as (upper left, lower right)."""
    (top, left), (bottom, right) = one, other
    return (min(top, bottom), min(left, right)), (max(top, bottom), max(left, right))


def cells(codes: Array, grid: Grid, marks: Marks | None) -> Array:
    """Codes int32 [lines or pairs, columns] as drawn: pooled, with what is marked, two layers in one.

    Pooling takes the greatest code: the most important kind, then the hottest. In half-block grids
    an entry is `upper * BASE + lower`.
    """
    count, experts = codes.shape
    if grid.pool > 1:
        padded = np.zeros((count, grid.columns * grid.pool), codes.dtype)
        padded[:, :experts] = codes
        codes = padded.reshape(count, grid.columns, grid.pool).max(axis=2)
    if not grid.half:
        return codes
    if marks is not None:
        (top, left), (bottom, right) = marks
        codes = codes.copy()
        codes[top : bottom + 1, left // grid.pool : right // grid.pool + 1] = CURSOR * LEVELS
    if count % 2:
        void = np.full((1, codes.shape[1]), VOID * LEVELS, codes.dtype)
        codes = np.concatenate([codes, void])
    return codes[0::2] * BASE + codes[1::2]


BASE = (VOID + 1) * LEVELS


def changed(old: Array | None, new: Array) -> list[int] | None:
    """The rows in which two maps differ; None when they cannot be compared."""
    if old is None or old.shape != new.shape:
        return None
    return [int(row) for row in np.flatnonzero((old != new).any(axis=1))]
