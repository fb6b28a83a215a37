"""The cost model: seconds of a sequential run and of the waves, from work and a machine's figures.

A matrix product takes the larger of computing, at the rate that its shape leaves (:func:`utilisation`), and
moving its operands; what is between products moves its bytes; each kernel costs a start. A group of w cells
is w times the work in as many kernels as one cell. A wavefront takes the larger of that and of what the host
needs to record and launch the cells (``docs/derivations.md``). The sequential run that is meant is the best
one: compiled, a segment in one CUDA graph, the host never in the way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diagpass.errors import DiagpassError

if TYPE_CHECKING:
    from diagpass.machine import Machine

__all__ = ["estimate", "total_flops", "utilisation"]

# Rows and columns of a result that one unit of a GPU computes at a time. Libraries have kernels of many such
# sizes; the largest are limited by the registers that hold the sums.
_TILES = [(m, n) for m in (64, 128, 192, 256) for n in range(32, 257, 32) if m * n <= 128 * 256]
_LARGEST = 128, 256


def estimate(
    kinds: Sequence[Mapping[str, Any]],
    schedule: Sequence[Sequence[Mapping[str, Any]]],
    glue: Mapping[str, Any],
    cells: int,
    machine: Machine,
) -> dict[str, float]:
    """Seconds by ``"sequential"``, ``"wavefront"`` and its parts ``"device"`` and ``"host"``.

    Parameters
    ----------
    kinds, schedule, glue, cells
        Of a report. Kinds that run unbatched gain nothing in a wave. Where the schedule holds only the first
        of many cells, the rest is taken to be like them.
    machine
        The figures of a machine.

    Raises
    ------
    DiagpassError
        The machine has no figure for a data type that the cells compute in.
    """
    by_index = {kind["index"]: kind for kind in kinds}
    known = functools.lru_cache(maxsize=None)(lambda kind, width: _seconds(by_index[kind], width, machine))
    sequential = wavefront = 0.0
    placed = 0
    for wave in schedule:
        for group in wave:
            kind, width = group["kind"], len(group["cells"])
            placed += width
            alone = width * known(kind, 1)
            sequential += alone
            wavefront += alone if by_index[kind]["unbatchable"] else known(kind, width)
    more = cells / placed if placed else 1.0
    outside = _seconds(glue, 1, machine)
    sequential, device = more * sequential + outside, more * wavefront + outside
    host = machine.call_seconds + cells * machine.cell_seconds
    return {"sequential": sequential, "wavefront": max(device, host), "device": device, "host": host}


def _seconds(work: Mapping[str, Any], cells: int, machine: Machine) -> float:
    """What some cells take as one group."""
    kernels = work["chains"]
    seconds = cells * work["moved"] / machine.bytes_per_second
    for each in work["products"]:
        if each["dtype"] not in machine.matmul:
            raise DiagpassError(
                f"there is no rate of {each['dtype']} matrix products for {machine.name}; it has those of "
                f"{', '.join(machine.matmul) or 'no data type'}: measure_machine(device, dtypes=...)"
            )
        rate = machine.matmul[each["dtype"]] * utilisation(
            cells * each["batch"], each["m"], each["n"], machine.units
        )
        computing, moving = each["flops"] / rate, each["bytes"] / machine.bytes_per_second
        seconds += cells * each["count"] * max(computing, moving)
        kernels += each["count"]
    return seconds + kernels * machine.start_seconds


def utilisation(batch: int, m: int, n: int, units: int) -> float:
    """The part of a machine's sustained rate that products of ``batch`` results of m x n can reach.

    Each of ``units`` processors computes a tile of a result at a time, so the last round may leave some idle
    and tiles may reach over the edge; and a smaller tile, which fits better, reads more operands for each
    product, in proportion to 1/m + 1/n. The best tile is taken, relative to a product that is large. 0 units
    stand for a machine where this does not matter.
    """
    if units == 0:
        return 1.0
    return min(1.0, _best_tile(batch, m, n, units) / _best_tile(1, 8192, 8192, units))


@functools.lru_cache(maxsize=4096)
def _best_tile(batch: int, m: int, n: int, units: int) -> float:
    def reached(rows: int, columns: int) -> float:
        tiles = batch * math.ceil(m / rows) * math.ceil(n / columns)
        busy = batch * m * n / (rows * columns) / (math.ceil(tiles / units) * units)
        return busy * min(1.0, _reuse(rows, columns) / _reuse(*_LARGEST))

    return max(reached(*tile) for tile in _TILES)


def _reuse(rows: int, columns: int) -> float:
    """Products for each operand that a tile reads."""
    return rows * columns / (rows + columns)


def total_flops(kinds: Sequence[Mapping[str, Any]]) -> int:
    """The FLOPs of all cells."""
    return sum(kind["flops"] * kind["cells"] for kind in kinds)
