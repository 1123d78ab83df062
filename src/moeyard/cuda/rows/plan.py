"""How rows are cut for a launch: a pure function of sizes."""

from dataclasses import dataclass

from moeyard.cuda.runtime.cards import WARP
from moeyard.cuda.runtime.few import FEW_KERNELS


@dataclass(frozen=True)
class RowPlan:
    """How rows are cut for one launch of send.cu, sum.cu or quantize.cu."""

    loads: int
    """Words of a row that a lane has in flight."""
    threads: int
    """Of a block."""
    store: str = "__stcs"
    """How results are written."""
    team: int = WARP
    """Threads that share a row of quantize.cu, where a row has one scale."""


def row_plan(rows: int, words: int, rows_at_once: int) -> RowPlan:
    """One warp per piece. Pieces are as long as leaves enough warps; each lane has `rows_at_once` words in flight."""
    loads = 8
    if "rows" in FEW_KERNELS:
        while loads > 1 and (loads > (4 if rows_at_once <= 2 else 1) or loads * WARP >= 2 * words):
            loads //= 2
        return RowPlan(loads, 256)
    while loads > 1 and (loads * rows_at_once > 8 or loads * WARP >= 2 * words or rows * words < loads * _ENOUGH_WORDS):
        loads //= 2
    if loads == 8:
        return RowPlan(loads, 1024)
    return RowPlan(loads, 256 if rows * words >= 4 * _ENOUGH_WORDS else 128)


def whole_row_plan(rows: int, words: int) -> RowPlan:
    """One team of threads per row, which it holds in registers as far as they go. Small teams share a block."""
    team = WARP
    while team < 512 and 4 * team < words:
        team *= 2
    loads = min(-(-words // team), 4)
    return RowPlan(loads, max(team, 128 if rows * words >= 4 * _ENOUGH_WORDS else 0), team=team)


_ENOUGH_WORDS = 1 << 16
"""Words of a row each lane of which keeps 2048 warps busy."""
