"""The schedule as a Gantt chart: the sequential run above, the waves below, on one axis of steps.

A *step* is one cell alone or one wave: how many follow one another is what the pass changes. How long a step
takes, the picture does not claim. Of many steps the first ones are drawn, and how long both rows are.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

from diagpass.describe.figures import count
from diagpass.pictures.layout import Grid, HasDict, ink, load, wave_rgb

__all__ = ["plot_gantt"]

_NUMBERS = 60  # with more steps than this, cells have no room for their segments' numbers
_ROOM = 240  # with more, a step would be a few pixels: the first ones are drawn, and the lengths of all


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
    order = sorted(range(len(grid.cells)), key=lambda at: (grid.cells[at].segment, grid.cells[at].layer))
    alone = [(step, grid.cells[at]) for step, at in enumerate(order)]
    waves = [(cell.wave, cell) for cell in grid.cells]
    total = len(order)
    shown = total if total <= _ROOM else min(max(4 * grid.layers, _NUMBERS), _ROOM // 2)
    rows = min(max(grid.layers * 0.28, 0.9), 5.5)
    whole = shown < total
    figure = Figure(figsize=(14, 2 * rows + 2.6 + 1.6 * whole), layout="constrained")
    ratios = [*([1.0] if whole else []), rows, rows]
    *top, above, below = figure.subplots(len(ratios), 1, height_ratios=ratios, squeeze=False)[:, 0]
    for axes in top:
        _lengths(axes, total, grid.num_waves)
    mean = total / grid.num_waves
    first = f", the first {shown:,} of them" if whole else ""
    _draw(above, grid, alone, shown, f"sequential: {count(total, 'step')}, one cell each{first}")
    each = f"{mean:.2f} cells each on average"
    first = f", the first {min(shown, grid.num_waves):,} of them" if whole else ""
    _draw(below, grid, waves, shown, f"wavefront: {count(grid.num_waves, 'step')}, {each}{first}")
    number = ", number: segment" if shown <= _NUMBERS else ""
    below.set_xlabel(f"step (one cell above, one wave below); colour: wave{number}")
    figure.suptitle(grid.title(), fontsize=13)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=120)


def _lengths(axes: Any, total: int, waves: int) -> None:
    """Both runs from beginning to end, as a bar each."""
    for row, (name, steps) in enumerate((("wavefront", waves), ("sequential", total))):
        axes.barh(row, steps, height=0.6, color=wave_rgb(row, 2, stripes=False))
        inside = steps > 0.8 * total
        place = ("right", steps - 0.01 * total) if inside else ("left", steps + 0.01 * total)
        text = f"{name}: {count(steps, 'step')}"
        axes.text(place[1], row, text, ha=place[0], va="center", fontsize=10)
    axes.set_xlim(0, total)
    axes.set_yticks([])
    axes.set_title("both from beginning to end", fontsize=11, loc="left")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    _open(axes)


def _draw(axes: Any, grid: Grid, steps: list[tuple[int, Any]], shown: int, title: str) -> None:
    """The first steps, a row for each layer."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    steps = [(step, cell) for step, cell in steps if step < shown]
    colours_in_all = min(grid.num_waves, shown)
    numbered = shown <= _NUMBERS
    boxes, colours = [], []
    for step, cell in steps:
        rgb = wave_rgb(cell.wave, colours_in_all)
        boxes.append(Rectangle((step, cell.layer - 0.4), 0.92, 0.8))
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
    axes.set_xlim(0, shown)
    axes.set_ylim(-0.6, grid.layers - 0.4)
    axes.set_ylabel("layer")
    axes.set_title(title, fontsize=11, loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=16, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=8, integer=True, min_n_ticks=1))
    _open(axes)


def _open(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
