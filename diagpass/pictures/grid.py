"""The layer x segment grid as a PNG."""

from __future__ import annotations

import textwrap
from os import PathLike
from typing import TYPE_CHECKING, Any

from diagpass.describe.figures import count, letter
from diagpass.describe.path import reach_text
from diagpass.pictures.layout import MAX_STRIPES, Grid, HasDict, ink, load, wave_rgb

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_grid"]

# A larger grid is drawn as an overview and two windows of at most this size (segments, layers).
_WINDOW = (16, 16)
# Up to here every cell of the picture has its number and its arrows.
_DETAIL = (24, 16)
# From one cell to the next, in inches, where numbers are drawn: in a large grid, in a small one.
_PITCH = (0.58, 0.95)
# Half the side of a drawn cell, in units of that pitch. The rest is room for arrows.
_HALF = 0.31


def plot_grid(report: HasDict, path: str | PathLike[str]) -> None:
    """Draw the layer x segment grid, its dependencies and the width of its waves to a PNG.

    A small grid is drawn cell by cell: wave number, kind letter, and an arrow for every direct
    dependency (one that leads down, a *chain*, in red). A large one is drawn whole as an overview,
    with its first and its last corner cell by cell below. The bars at the bottom show how many
    cells run in each wave.

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
    load("matplotlib", "plot", "plot_grid()")
    # A Figure of its own leaves pyplot, its global state and the user's display backend alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grid = Grid.of(report)
    if grid.segments <= _DETAIL[0] and grid.layers <= _DETAIL[1]:
        figure = _small_figure(Figure, grid)
    else:
        figure = _large_figure(Figure, grid)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=120)


def _small_figure(figure_class: Any, grid: Grid) -> Any:
    """Every cell with its number and its arrows, above the widths of the waves."""
    pitch = min(max(9.0 / grid.segments, _PITCH[0]), _PITCH[1])
    width = max(grid.segments * pitch + 1.6, 10.5)
    height = grid.layers * pitch + 0.9
    figure = figure_class(figsize=(width, height + 3.3), layout="constrained")
    top, bottom = figure.subplots(2, 1, height_ratios=[height, 2.0])
    figure.suptitle(grid.title(), fontsize=13)
    _draw_cells(top, grid, range(grid.segments), range(grid.layers), pitch)
    _draw_widths(bottom, grid)
    _add_legend(figure, grid, width)
    return figure


def _large_figure(figure_class: Any, grid: Grid) -> Any:
    """The whole grid in colours, two corners cell by cell, the widths of the waves."""
    window_s, window_l = min(_WINDOW[0], grid.segments), min(_WINDOW[1], grid.layers)
    pitch = _PITCH[0]
    width = max(2 * window_s * pitch + 2.0, 14.0)
    overview = min(max(grid.layers * 0.11, 1.6), 5.0)
    detail = window_l * pitch + 0.8
    figure = figure_class(figsize=(width, overview + detail + 4.2), layout="constrained")
    axes = figure.subplot_mosaic(
        [["all", "all"], ["first", "last"], ["widths", "widths"]],
        height_ratios=[overview, detail, 2.0],
    )
    figure.suptitle(grid.title(), fontsize=15)
    _draw_overview(axes["all"], grid)
    corners = {
        "first": (range(window_s), range(window_l)),
        "last": (
            range(grid.segments - window_s, grid.segments),
            range(grid.layers - window_l, grid.layers),
        ),
    }
    for name, (segments, layers) in corners.items():
        _draw_cells(axes[name], grid, segments, layers, pitch)
        axes[name].set_title(
            f"{name} segments ({segments[0]}-{segments[-1]}), layers {layers[0]}-{layers[-1]}",
            fontsize=11,
        )
        _mark_window(axes["all"], segments, layers)
    _draw_widths(axes["widths"], grid)
    _add_legend(figure, grid, width)
    return figure


def _label_axes(axes: Axes, *, max_layer_ticks: int) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("segment")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=24, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=max_layer_ticks, integer=True, min_n_ticks=1))


def _draw_cells(axes: Axes, grid: Grid, segments: range, layers: range, pitch: float) -> None:
    """Draw a window of the grid cell by cell, with the edges that touch it."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import FancyBboxPatch

    shown = [c.segment in segments and c.layer in layers for c in grid.cells]
    boxes, colours = [], []
    digits = len(str(grid.num_waves - 1))
    number_size = pitch * (19.0 if digits < 3 else 17.0 if digits == 3 else 14.0)
    for cell, visible in zip(grid.cells, shown, strict=True):
        if not visible:
            continue
        rgb = wave_rgb(cell.wave, grid.num_waves)
        corner = (cell.segment - _HALF, cell.layer - _HALF)
        boxstyle = "round,pad=0,rounding_size=0.08"
        boxes.append(FancyBboxPatch(corner, 2 * _HALF, 2 * _HALF, boxstyle=boxstyle))
        colours.append(rgb)
        number = axes.text(
            cell.segment,
            cell.layer + 0.05,
            str(cell.wave),
            ha="center",
            va="center",
            fontsize=number_size,
            fontweight="bold",
            color=ink(rgb),
            zorder=4,
        )
        mark = axes.text(
            cell.segment + _HALF - 0.05,
            cell.layer - _HALF + 0.03,
            letter(cell.kind),
            ha="right",
            va="bottom",
            fontsize=pitch * 11.0,
            color=ink(rgb),
            zorder=4,
        )
        # the layout need not measure thousands of texts that lie inside the axes
        number.set_in_layout(False)
        mark.set_in_layout(False)
    axes.add_collection(
        PatchCollection(boxes, facecolor=colours, edgecolor="#333333", linewidth=0.8, zorder=3)
    )
    edges = [(i, j) for i, j in grid.edges if shown[i] or shown[j]]
    _draw_edges(axes, grid, edges)
    axes.set_xlim(segments[0] - 0.65, segments[-1] + 0.65)
    axes.set_ylim(layers[0] - 0.65, layers[-1] + 0.65)
    axes.set_aspect("equal")
    _label_axes(axes, max_layer_ticks=16)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _draw_edges(axes: Axes, grid: Grid, edges: list[tuple[int, int]]) -> None:
    """Draw dependencies: straight between neighbours, along the gaps between cells otherwise."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path

    straight: dict[bool, list[tuple[float, float, float, float]]] = {False: [], True: []}
    lanes: dict[tuple[int, int], float] = {}
    for i, j in edges:
        a, b = grid.cells[i], grid.cells[j]
        reach = (b.segment - a.segment, b.layer - a.layer)
        longest = max(abs(reach[0]), abs(reach[1]))
        chain = reach[1] < 0
        if longest <= 1:
            skip = _HALF / max(longest, 1)
            x, y = a.segment + skip * reach[0], a.layer + skip * reach[1]
            part = 1 - 2 * skip
            straight[chain].append((x, y, part * reach[0], part * reach[1]))
            continue
        # lines of different reach run beside each other in the gap between the cells
        lane = lanes.setdefault(reach, 0.04 * (len(lanes) % 5))
        arrow = FancyArrowPatch(
            path=Path(_route((a.segment, a.layer), (b.segment, b.layer), lane)),
            arrowstyle="-|>",
            mutation_scale=9,
            color=_edge_colour(chain),
            linewidth=1.2 if chain else 0.8,
            joinstyle="round",
            zorder=5 if chain else 2,
        )
        arrow.set_in_layout(False)
        axes.add_patch(arrow)
    for chain, arrows in straight.items():
        if arrows:
            x, y, u, v = zip(*arrows, strict=True)
            axes.quiver(
                x,
                y,
                u,
                v,
                angles="xy",
                scale_units="xy",
                scale=1,
                units="xy",
                width=0.018,
                headwidth=6,
                headlength=7,
                headaxislength=6.5,
                color=_edge_colour(chain),
                zorder=5 if chain else 2,
            )


def _edge_colour(chain: bool) -> str:
    return "#c1121f" if chain else "#444444"


def _route(a: tuple[int, int], b: tuple[int, int], lane: float) -> list[tuple[float, float]]:
    """Lead a dependency between cells that are no neighbours round the cells between them.

    ``a`` and ``b`` are (segment, layer); ``lane`` moves the line sideways in its gap, so that lines
    of different reach do not lie on each other.
    """
    (ax, ay), (bx, by) = a, b
    side = 0.12 + lane
    if ax == bx:
        return [
            (ax + _HALF, ay + side),
            (ax + 0.42 + lane, ay + side),
            (ax + 0.42 + lane, by - side),
            (bx + _HALF, by - side),
        ]
    if ay == by:
        return [
            (ax + side, ay - _HALF),
            (ax + side, ay - 0.42 - lane),
            (bx - side, ay - 0.42 - lane),
            (bx - side, by - _HALF),
        ]
    up = 1 if by > ay else -1
    if bx - ax == 1:
        gap = ax + 0.42 + lane
        return [
            (ax + _HALF, ay + up * side),
            (gap, ay + up * side),
            (gap, by - up * side),
            (bx - _HALF, by - up * side),
        ]
    gap_x, gap_y = ax + 0.42 + lane, by - up * (0.42 + lane)
    return [
        (ax + _HALF, ay + up * side),
        (gap_x, ay + up * side),
        (gap_x, gap_y),
        (bx - side, gap_y),
        (bx - side, by - up * _HALF),
    ]


def _draw_overview(axes: Axes, grid: Grid) -> None:
    """Draw the whole grid, a coloured pixel for a cell."""
    import numpy as np

    image = np.ones((grid.layers, grid.segments, 3))
    stripes = grid.num_waves <= MAX_STRIPES
    for cell in grid.cells:
        image[cell.layer, cell.segment] = wave_rgb(cell.wave, grid.num_waves, stripes=stripes)
    axes.imshow(image, origin="lower", aspect="auto", interpolation="nearest")
    axes.set_title("the whole grid; frames mark the parts drawn below", fontsize=11)
    _label_axes(axes, max_layer_ticks=8)


def _mark_window(axes: Axes, segments: range, layers: range) -> None:
    from matplotlib.patches import Rectangle

    corner = (segments[0] - 0.5, layers[0] - 0.5)
    axes.add_patch(Rectangle(corner, len(segments), len(layers), fill=False, edgecolor="black", linewidth=2))


def _draw_widths(axes: Axes, grid: Grid) -> None:
    """Draw the number of cells in each wave as a bar in the wave's colour."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    waves = range(len(grid.widths))
    gap = 0.85 if len(waves) <= 200 else 1.0
    widths = [sum(kinds.values()) for kinds in grid.widths]
    stripes = grid.num_waves <= MAX_STRIPES
    colours = [wave_rgb(wave, grid.num_waves, stripes=stripes) for wave in waves]
    bars = [Rectangle((wave - gap / 2, 0), gap, height) for wave, height in zip(waves, widths, strict=True)]
    axes.add_collection(PatchCollection(bars, facecolor=colours))
    if len(widths) <= 40:
        for wave, kinds in enumerate(grid.widths):
            text = " ".join(f"{n}{letter(kind)}" for kind, n in kinds.items())
            axes.annotate(text, (wave, widths[wave]), ha="center", va="bottom", fontsize=8)
    axes.set_xlim(-0.7, len(widths) - 0.3)
    axes.set_ylim(0, max(widths, default=1) * 1.18)
    axes.set_xlabel("wave")
    axes.set_ylabel("cells")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=24, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _add_legend(figure: Any, grid: Grid, width: float) -> None:
    """Say what numbers, letters and arrows mean, and count them; ``width`` is in inches."""
    kinds = grid.kind_sizes()
    letters = [f"{letter(kind)}: {count(n, 'cell')}" for kind, n in list(kinds.items())[:8]]
    if len(kinds) > 8:
        letters.append(f"and {len(kinds) - 8} more")
    reaches = grid.offsets()
    arrows = [f"{n:,} x {reach_text(reach)}" for reach, n in list(reaches.items())[:6]]
    if len(reaches) > 6:
        arrows.append(f"and {len(reaches) - 6} more")
    sentences = (
        "number and colour: wave; letter: kind (" + ", ".join(letters) + ")",
        "arrows, what a cell needs: " + ("; ".join(arrows) or "nothing"),
    )
    characters = int(width * 13)
    figure.supxlabel("\n".join(textwrap.fill(s, characters) for s in sentences), fontsize=10)
