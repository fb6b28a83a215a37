"""What every picture needs from a report: the grid, its colours, its words.

In: a report, anything whose ``to_dict()`` has the keys ``grid``, ``edges`` and ``schedule`` of
`diagpass.explain`'s report. Out: a :class:`Grid`.
"""

from __future__ import annotations

import colorsys
from collections import Counter
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from diagpass.describe.figures import count

__all__ = ["MAX_STRIPES", "Grid", "GridCell", "HasDict", "ink", "load", "wave_rgb"]

# With more waves than this, stripes would be finer than a pixel.
MAX_STRIPES = 300


class HasDict(Protocol):
    """What a picture is made of: a report, or what looks like one."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data with ``grid``, ``edges`` and ``schedule``."""
        ...


@dataclass(frozen=True)
class GridCell:
    """One square: where it stands (``segment``, ``layer``) and what it shows."""

    segment: int
    layer: int
    kind: int
    wave: int


@dataclass(frozen=True)
class Grid:
    """What both pictures need from a report.

    ``edges`` holds pairs of indices into ``cells``; ``widths[w]`` maps each kind in wave ``w`` to
    the number of its cells there.
    """

    cells: tuple[GridCell, ...]
    edges: tuple[tuple[int, int], ...]
    widths: tuple[dict[int, int], ...]
    segments: int
    layers: int
    num_waves: int

    @classmethod
    def of(cls, report: HasDict) -> Grid:
        """Read a report's dictionary.

        Raises
        ------
        ValueError
            If the report holds no cells, so that there is nothing to draw.
        """
        data = report.to_dict()
        cells = tuple(
            GridCell(int(c["segment"]), int(c["layer"]), int(c["kind"]), int(c["wave"])) for c in data["grid"]
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
        """One line: sizes, waves, widths."""
        mean = len(self.cells) / self.num_waves
        widest = max(sum(w.values()) for w in self.widths) if self.widths else 1
        return (
            f"{count(self.layers, 'layer')} x {count(self.segments, 'segment')}: "
            f"{count(len(self.cells), 'cell')} in {count(self.num_waves, 'wave')}, "
            f"mean width {mean:.2f}, widest {widest}"
        )


def load(name: str, extra: str, what: str) -> ModuleType:
    """Import an optional package, or say which extra brings it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise ImportError(
            f'{what} needs {package}, which is not installed; pip install "diagpass[{extra}]" brings it'
        ) from error


def wave_rgb(wave: int, num_waves: int, *, stripes: bool = True) -> tuple[float, float, float]:
    """Give a wave its colour: the hue runs from blue to red, odd waves are a shade darker."""
    part = wave / max(num_waves - 1, 1)
    hue = 0.62 * (1.0 - part)
    return colorsys.hls_to_rgb(hue, 0.48 if stripes and wave % 2 else 0.62, 0.60)


def ink(rgb: tuple[float, float, float]) -> str:
    """Choose black or white, whichever can be read on a colour."""
    red, green, blue = rgb
    return "black" if 0.299 * red + 0.587 * green + 0.114 * blue > 0.5 else "white"
