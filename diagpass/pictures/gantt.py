"""The schedule as a Gantt chart: the sequential run above, the waves below, on one axis of steps.

A *step* is one cell alone or one wave: how many follow one another is what the pass changes. How long a step
takes, the picture does not claim.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

from diagpass.describe.figures import count
from diagpass.pictures.layout import MAX_STRIPES, Grid, HasDict, ink, load, wave_rgb

__all__ = ["plot_gantt"]

_NUMBERS = 60  # with more steps than this, cells have no room for their segments' numbers


def plot_gantt(report: HasDict, path: str | PathLike[str]) -> None:
    """Draw the schedule to a PNG: a row for each layer, sequential above, wavefront below.

    Parameters
    ----------
    report
        What `diagpass.explain` returns, or the ``report`` of a transformed model.
    path
        The file to write.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If the report has no cells.
    """
    load("matplotlib", "plot", "plot_gantt()")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grid = Grid.of(report)
    rows = min(max(grid.layers * 0.28, 0.9), 5.5)
    figure = Figure(figsize=(14, 2 * rows + 2.6), layout="constrained")
    above, below = figure.subplots(2, 1)
    order = sorted(range(len(grid.cells)), key=lambda at: (grid.cells[at].segment, grid.cells[at].layer))
    alone = [(step, grid.cells[at]) for step, at in enumerate(order)]
    waves = [(cell.wave, cell) for cell in grid.cells]
    _draw(above, grid, alone, len(order), f"sequential: {count(len(order), 'step')}, one cell each")
    mean = len(order) / grid.num_waves
    _draw(
        below,
        grid,
        waves,
        len(order),
        f"wavefront: {count(grid.num_waves, 'step')}, {mean:.2f} cells each on average",
    )
    number = ", number: segment" if len(order) <= _NUMBERS else ""
    below.set_xlabel(f"step (one cell above, one wave below); colour: wave{number}")
    figure.suptitle(grid.title(), fontsize=13)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=120)


def _draw(axes: Any, grid: Grid, steps: list[tuple[int, Any]], total: int, title: str) -> None:
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    stripes = grid.num_waves <= MAX_STRIPES
    numbered = total <= _NUMBERS
    boxes, colours = [], []
    for step, cell in steps:
        rgb = wave_rgb(cell.wave, grid.num_waves, stripes=stripes)
        width = 0.92 if total <= 300 else max(1.0, total / 1500)  # never finer than a pixel
        boxes.append(Rectangle((step, cell.layer - 0.4), width, 0.8))
        colours.append(rgb)
        if numbered:
            text = axes.text(
                step + 0.46,
                cell.layer,
                str(cell.segment),
                ha="center",
                va="center",
                color=ink(rgb),
                fontsize=8,
            )
            text.set_in_layout(False)
    axes.add_collection(PatchCollection(boxes, facecolor=colours, linewidth=0))
    axes.set_xlim(0, total)
    axes.set_ylim(-0.6, grid.layers - 0.4)
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=11, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
