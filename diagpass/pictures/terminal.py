"""The layer x segment grid as coloured text, for rich."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from diagpass.describe.path import reach_text
from diagpass.pictures.layout import Grid, GridCell, HasDict, ink, load, wave_rgb

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

__all__ = ["GridText", "grid_text"]


def grid_text(report: HasDict) -> GridText:
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
    load("rich", "cli", "grid_text()")
    return GridText(Grid.of(report))


class GridText:
    """A grid that fits itself to the width of the console it is printed on."""

    def __init__(self, grid: Grid) -> None:
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

    def _square(self, text: str, cell: GridCell | None) -> tuple[str, str]:
        """Give a cell's text with its style; a hole in the grid stays dim."""
        if cell is None:
            return text, "dim"
        rgb = wave_rgb(cell.wave, self._grid.num_waves)
        red, green, blue = (round(255 * part) for part in rgb)
        return text, f"{ink(rgb)} on rgb({red},{green},{blue})"

    def _at(self) -> dict[tuple[int, int], GridCell]:
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
            line = Text(f"  {sign} {count:>5} x {reach_text((segments, layers))}")
            if layers < 0:
                line.stylize("bold red")
            yield line
