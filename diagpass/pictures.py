"""Pictures of a schedule: the layer x segment grid as a PNG and as coloured text.

Every *cell* (one layer applied to one segment) is a square; its colour and number say in which
*wave* it runs (cells of one wave have no path between them and run together), its letter says of
which *kind* it is (only cells of one kind can be batched). An arrow from cell a to cell b means
that b needs something that a makes.

In: a report, anything whose ``to_dict()`` has the keys ``grid``, ``edges`` and ``schedule`` of
`diagpass.explain`'s report. Out: a PNG file (`plot_grid`, needs matplotlib) or an object that rich
prints (`grid_text`, needs rich). Neither package is imported before it is needed.
"""

from __future__ import annotations

import colorsys
import textwrap
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from types import ModuleType
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

__all__ = ["GridText", "grid_text", "plot_grid"]

# A larger grid is drawn as an overview and two windows of at most this size (segments, layers).
_WINDOW = (16, 16)
# Up to here every cell of the picture has its number and its arrows.
_DETAIL = (24, 16)
# From one cell to the next, in inches, where numbers are drawn: in a large grid, in a small one.
_PITCH = (0.58, 0.95)
# Half the side of a drawn cell, in units of that pitch. The rest is room for arrows.
_HALF = 0.31
# With more waves than this, stripes would be finer than a pixel.
_MAX_STRIPES = 300


class _HasDict(Protocol):
    def to_dict(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class _Cell:
    """One square: where it stands (``segment``, ``layer``) and what it shows."""

    segment: int
    layer: int
    kind: int
    wave: int


@dataclass(frozen=True)
class _Grid:
    """What both pictures need from a report.

    ``edges`` holds pairs of indices into ``cells``; ``widths[w]`` maps each kind in wave ``w`` to
    the number of its cells there.
    """

    cells: tuple[_Cell, ...]
    edges: tuple[tuple[int, int], ...]
    widths: tuple[dict[int, int], ...]
    segments: int
    layers: int
    num_waves: int

    @classmethod
    def of(cls, report: _HasDict) -> _Grid:
        """Read a report's dictionary.

        Raises
        ------
        ValueError
            If the report holds no cells, so that there is nothing to draw.
        """
        data = report.to_dict()
        cells = tuple(
            _Cell(int(c["segment"]), int(c["layer"]), int(c["kind"]), int(c["wave"])) for c in data["grid"]
        )
        if not cells:
            raise ValueError("the report has no cells, so there is no grid to draw")
        widths: list[dict[int, int]] = []
        for wave in data["schedule"]:
            counts: Counter[int] = Counter()
            for group in wave:
                counts[int(group["kind"])] += len(group["cells"])
            widths.append(dict(sorted(counts.items())))
        return cls(
            cells=cells,
            edges=tuple((int(i), int(j)) for i, j in data["edges"]),
            widths=tuple(widths),
            segments=1 + max(c.segment for c in cells),
            layers=1 + max(c.layer for c in cells),
            num_waves=max(len(widths), 1 + max(c.wave for c in cells)),
        )

    def offsets(self) -> dict[tuple[int, int], int]:
        """Count the edges by how far they reach: ``(segments on, layers up) -> edges``."""
        counts: Counter[tuple[int, int]] = Counter()
        for i, j in self.edges:
            a, b = self.cells[i], self.cells[j]
            counts[b.segment - a.segment, b.layer - a.layer] += 1
        return dict(sorted(counts.items()))

    def kind_sizes(self) -> dict[int, int]:
        """Count the cells of each kind."""
        return dict(sorted(Counter(c.kind for c in self.cells).items()))

    def title(self) -> str:
        mean = len(self.cells) / self.num_waves
        widest = max(sum(w.values()) for w in self.widths) if self.widths else 1
        return (
            f"{_count(self.layers, 'layer')} x {_count(self.segments, 'segment')}: "
            f"{_count(len(self.cells), 'cell')} in {_count(self.num_waves, 'wave')}, "
            f"mean width {mean:.2f}, widest {widest}"
        )


def _load(name: str, extra: str, what: str) -> ModuleType:
    """Import an optional package, or say which extra brings it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f'{what} needs {package}, which is not installed; pip install "diagpass[{extra}]" brings it'
        ) from error


def _count(n: int, word: str) -> str:
    return f"{n:,} {word}" if n == 1 else f"{n:,} {word}s"


def _letter(kind: int) -> str:
    """Name a kind: A, B, ..., Z, A1, B1, ..."""
    round_, place = divmod(kind, 26)
    return chr(ord("A") + place) + (str(round_) if round_ else "")


def _offset_text(segments: int, layers: int) -> str:
    """Put a dependency's reach into words."""
    if segments == 0:
        return "from the layer below" if layers == 1 else f"from {_count(layers, 'layer')} below"
    back = "at the segment before" if segments == 1 else f"{_count(segments, 'segment')} before"
    if layers == 0:
        return f"state, from the same layer {back}"
    if layers > 0:
        return f"state, from {_count(layers, 'layer')} below {back}"
    return f"chain, from {_count(-layers, 'layer')} above {back}"


def _wave_rgb(wave: int, num_waves: int, *, stripes: bool = True) -> tuple[float, float, float]:
    """Give a wave its colour: the hue runs from blue to red, odd waves are a shade darker."""
    part = wave / max(num_waves - 1, 1)
    hue = 0.62 * (1.0 - part)
    return colorsys.hls_to_rgb(hue, 0.48 if stripes and wave % 2 else 0.62, 0.60)


def _ink(rgb: tuple[float, float, float]) -> str:
    """Choose black or white, whichever can be read on a colour."""
    red, green, blue = rgb
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"


# ---------------------------------------------------------------------------------------------
# Terminal


def grid_text(report: _HasDict) -> GridText:
    """Make the layer x segment grid printable by rich.

    Each cell shows the number of its wave on the wave's colour. Where the terminal is wide enough
    the dependencies between neighbours are drawn as arrows; in a narrower one the numbers go
    first, then the middle of the grid. A legend counts every dependency by its reach.

    Parameters
    ----------
    report
        What `diagpass.explain` returns, or the ``report`` of a transformed model.

    Returns
    -------
    GridText
        Pass it to ``rich.print`` or ``Console.print``; ``str()`` of it is the plain text.

    Raises
    ------
    ImportError
        If rich is not installed.
    ValueError
        If the report has no cells.
    """
    _load("rich", "cli", "grid_text()")
    return GridText(_Grid.of(report))


class GridText:
    """A grid that fits itself to the width of the console it is printed on."""

    def __init__(self, grid: _Grid) -> None:
        self._grid = grid

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._lines(options.max_width)

    def __str__(self) -> str:
        return "\n".join(line.plain.rstrip() for line in self._lines(120))

    def _lines(self, width: int) -> Iterator[Text]:
        from rich.text import Text

        grid = self._grid
        yield Text(grid.title(), style="bold", no_wrap=True)
        yield Text()
        digits = len(str(grid.num_waves - 1))
        label = len(f"layer {grid.layers - 1} ")
        room = max(width - label, 8)
        if grid.segments * (digits + 4) <= room:
            yield from self._arrow_rows(digits, label)
        elif grid.segments * (digits + 2) <= room:
            yield from self._plain_rows(digits, label, list(range(grid.segments)), numbers=True)
        elif grid.segments <= room:
            yield from self._plain_rows(digits, label, list(range(grid.segments)), numbers=False)
        else:
            side = max((room - 3) // (2 * (digits + 2)), 1)
            columns = [*range(side), None, *range(grid.segments - side, grid.segments)]
            yield from self._plain_rows(digits, label, columns, numbers=True)
        yield Text()
        yield from self._legend()

    def _square(self, text: str, cell: _Cell | None) -> tuple[str, str]:
        """Give a cell's text with its style; a hole in the grid stays dim."""
        if cell is None:
            return text, "dim"
        rgb = _wave_rgb(cell.wave, self._grid.num_waves)
        red, green, blue = (round(255 * part) for part in rgb)
        return text, f"{_ink(rgb)} on rgb({red},{green},{blue})"

    def _at(self) -> dict[tuple[int, int], _Cell]:
        return {(c.segment, c.layer): c for c in self._grid.cells}

    def _arrow_rows(self, digits: int, label: int) -> Iterator[Text]:
        """Draw the rows with an arrow for every dependency between neighbours."""
        from rich.text import Text

        grid, at = self._grid, self._at()
        joined = set()
        for i, j in grid.edges:
            a, b = grid.cells[i], grid.cells[j]
            joined.add(((a.segment, a.layer), (b.segment, b.layer)))
        for layer in reversed(range(grid.layers)):
            row = Text(f"layer {layer}".ljust(label), style="bold", no_wrap=True)
            under = Text(" " * label, no_wrap=True)
            for s in range(grid.segments):
                cell = at.get((s, layer))
                number = str(cell.wave).center(digits + 2) if cell else "·".center(digits + 2)
                row.append(*self._square(number, cell))
                right = ((s, layer), (s + 1, layer)) in joined
                row.append(" →" if right else "  ", style="not bold")
                up = ((s, layer - 1), (s, layer)) in joined
                under.append(("↑" if up else " ").center(digits + 2))
                slant = ((s, layer - 1), (s + 1, layer)) in joined
                under.append(" ↗" if slant else "  ")
            yield row
            if layer:
                yield under
        yield self._segment_axis(label, digits + 4, digits + 2, list(range(grid.segments)))

    def _plain_rows(
        self, digits: int, label: int, columns: list[int | None], *, numbers: bool
    ) -> Iterator[Text]:
        """Draw the rows without arrows; a column ``None`` stands for what is left out."""
        from rich.text import Text

        at = self._at()
        size = digits + 2 if numbers else 1
        for layer in reversed(range(self._grid.layers)):
            row = Text(f"layer {layer}".ljust(label), style="bold", no_wrap=True)
            for s in columns:
                if s is None:
                    row.append(" … ", style="dim")
                    continue
                cell = at.get((s, layer))
                text = str(cell.wave).center(size) if cell and numbers else " " * size
                row.append(*self._square(text if cell else "·".center(size), cell))
            yield row
        yield self._segment_axis(label, size, size, columns)

    def _segment_axis(self, label: int, step: int, centre: int, columns: list[int | None]) -> Text:
        """Number the columns, as many of them as there is room for."""
        from rich.text import Text

        every = 1
        while every * step < len(str(self._grid.segments)) + 1:
            every += 4 if every == 1 else 5
        axis = [" "] * (label + step * len(columns) + 8)
        axis[: min(7, label)] = "segment"[:label]
        place = label
        for s in columns:
            if s is None:
                place += 3
                continue
            if s % every == 0:
                name = str(s)
                start = place + max((centre - len(name)) // 2, 0) if step > 1 else place
                axis[start : start + len(name)] = name
            place += step
        return Text("".join(axis).rstrip(), style="dim", no_wrap=True)

    def _legend(self) -> Iterator[Text]:
        from rich.text import Text

        yield Text("the number (or colour) of a cell is the wave it runs in", style="dim")
        for (segments, layers), count in self._grid.offsets().items():
            sign = {(0, 1): "↑", (1, 0): "→", (1, 1): "↗"}.get((segments, layers), " ")
            if layers < 0:
                sign = "↘"
            line = Text(f"  {sign} {count:>5} x {_offset_text(segments, layers)}")
            if layers < 0:
                line.stylize("bold red")
            yield line


# ---------------------------------------------------------------------------------------------
# PNG


def plot_grid(report: _HasDict, path: str | PathLike[str]) -> None:
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
    _load("matplotlib", "plot", "plot_grid()")
    # A Figure of its own leaves pyplot, its global state and the user's display backend alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    grid = _Grid.of(report)
    if grid.segments <= _DETAIL[0] and grid.layers <= _DETAIL[1]:
        figure = _small_figure(Figure, grid)
    else:
        figure = _large_figure(Figure, grid)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=120)


def _small_figure(figure_class: Any, grid: _Grid) -> Any:
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


def _large_figure(figure_class: Any, grid: _Grid) -> Any:
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


def _draw_cells(axes: Axes, grid: _Grid, segments: range, layers: range, pitch: float) -> None:
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
        rgb = _wave_rgb(cell.wave, grid.num_waves)
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
            color=_ink(rgb),
            zorder=4,
        )
        letter = axes.text(
            cell.segment + _HALF - 0.05,
            cell.layer - _HALF + 0.03,
            _letter(cell.kind),
            ha="right",
            va="bottom",
            fontsize=pitch * 11.0,
            color=_ink(rgb),
            zorder=4,
        )
        # the layout need not measure thousands of texts that lie inside the axes
        number.set_in_layout(False)
        letter.set_in_layout(False)
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


def _draw_edges(axes: Axes, grid: _Grid, edges: list[tuple[int, int]]) -> None:
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


def _draw_overview(axes: Axes, grid: _Grid) -> None:
    """Draw the whole grid, a coloured pixel for a cell."""
    import numpy as np

    image = np.ones((grid.layers, grid.segments, 3))
    stripes = grid.num_waves <= _MAX_STRIPES
    for cell in grid.cells:
        image[cell.layer, cell.segment] = _wave_rgb(cell.wave, grid.num_waves, stripes=stripes)
    axes.imshow(image, origin="lower", aspect="auto", interpolation="nearest")
    axes.set_title("the whole grid; frames mark the parts drawn below", fontsize=11)
    _label_axes(axes, max_layer_ticks=8)


def _mark_window(axes: Axes, segments: range, layers: range) -> None:
    from matplotlib.patches import Rectangle

    corner = (segments[0] - 0.5, layers[0] - 0.5)
    axes.add_patch(Rectangle(corner, len(segments), len(layers), fill=False, edgecolor="black", linewidth=2))


def _draw_widths(axes: Axes, grid: _Grid) -> None:
    """Draw the number of cells in each wave as a bar in the wave's colour."""
    from matplotlib.collections import PatchCollection
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    waves = range(len(grid.widths))
    gap = 0.85 if len(waves) <= 200 else 1.0
    widths = [sum(kinds.values()) for kinds in grid.widths]
    stripes = grid.num_waves <= _MAX_STRIPES
    colours = [_wave_rgb(wave, grid.num_waves, stripes=stripes) for wave in waves]
    bars = [Rectangle((wave - gap / 2, 0), gap, height) for wave, height in zip(waves, widths, strict=True)]
    axes.add_collection(PatchCollection(bars, facecolor=colours))
    if len(widths) <= 40:
        for wave, kinds in enumerate(grid.widths):
            text = " ".join(f"{n}{_letter(kind)}" for kind, n in kinds.items())
            axes.annotate(text, (wave, widths[wave]), ha="center", va="bottom", fontsize=8)
    axes.set_xlim(-0.7, len(widths) - 0.3)
    axes.set_ylim(0, max(widths, default=1) * 1.18)
    axes.set_xlabel("wave")
    axes.set_ylabel("cells")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=24, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _add_legend(figure: Any, grid: _Grid, width: float) -> None:
    """Say what numbers, letters and arrows mean, and count them; ``width`` is in inches."""
    kinds = grid.kind_sizes()
    letters = [f"{_letter(kind)}: {_count(n, 'cell')}" for kind, n in list(kinds.items())[:8]]
    if len(kinds) > 8:
        letters.append(f"and {len(kinds) - 8} more")
    reaches = grid.offsets()
    arrows = [f"{n:,} x {_offset_text(*reach)}" for reach, n in list(reaches.items())[:6]]
    if len(reaches) > 6:
        arrows.append(f"and {len(reaches) - 6} more")
    sentences = (
        "number and colour: wave; letter: kind (" + ", ".join(letters) + ")",
        "arrows, what a cell needs: " + ("; ".join(arrows) or "nothing"),
    )
    characters = int(width * 13)
    figure.supxlabel("\n".join(textwrap.fill(s, characters) for s in sentences), fontsize=10)
