"""Time and memory against length, from benchmark rows.

A *row* is a dict with ``case`` (what ran), ``preset`` (the model), ``segment`` (its length in tokens),
``tokens`` and ``ms``; ``peak_bytes`` is optional.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

from diagpass.pictures.layout import load

__all__ = ["plot_curves"]


def plot_curves(
    rows: str | PathLike[str] | Iterable[Mapping[str, Any]],
    path: str | PathLike[str],
    preset: str | None = None,
    segment: int | None = None,
) -> None:
    """Draw time (and memory, where it was measured) against length to a PNG, a line for each case.

    Parameters
    ----------
    rows
        Benchmark rows, or a JSON file with a list of them.
    path
        The file to write.
    preset, segment
        Take only rows of this model and this segment length.

    Raises
    ------
    ImportError
        If matplotlib is not installed.
    ValueError
        If no row is left.
    """
    load("matplotlib", "plot", "plot_curves()")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    taken = [
        row
        for row in _rows(rows)
        if (preset is None or row.get("preset") == preset)
        and (segment is None or row.get("segment") == segment)
        and row.get("ms") is not None
    ]
    if not taken:
        raise ValueError(
            f"no benchmark row has preset={preset!r} and segment={segment!r}; there is nothing to draw"
        )
    lines: dict[str, list[Mapping[str, Any]]] = {}
    for row in taken:
        lines.setdefault(_name(row, taken), []).append(row)
    measured = any(row.get("peak_bytes") for row in taken)
    figure = Figure(figsize=(14 if measured else 10, 5.5), layout="constrained")
    axes = figure.subplots(1, 2 if measured else 1, squeeze=False)[0]
    for name, members in lines.items():
        members = sorted(members, key=lambda row: row["tokens"])
        tokens = [row["tokens"] for row in members]
        axes[0].plot(tokens, [row["ms"] for row in members], marker="o", label=name)
        held = [(row["tokens"], row["peak_bytes"] / 1e9) for row in members if row.get("peak_bytes")]
        if measured and held:
            axes[1].plot(*zip(*held, strict=True), marker="o", label=name)
    for at, words in enumerate(("time, ms", "peak memory, GB")[: len(axes)]):
        axes[at].set_xlabel("tokens")
        axes[at].set_ylabel(words)
        axes[at].set_xscale("log", base=2)
        axes[at].set_yscale("log")
        axes[at].grid(visible=True, which="both", alpha=0.3)
        axes[at].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes[0].legend(fontsize=9)
    parts = [text for text in (preset, f"segment {segment}" if segment else None) if text]
    figure.suptitle("length against cost" + (f": {', '.join(parts)}" if parts else ""), fontsize=13)
    FigureCanvasAgg(figure)
    figure.savefig(path, format="png", dpi=120)


def _rows(rows: str | PathLike[str] | Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if isinstance(rows, (str, PathLike)):
        return json.loads(Path(rows).read_text("utf-8"))
    return list(rows)


def _name(row: Mapping[str, Any], rows: list[Mapping[str, Any]]) -> str:
    """The case, and what else tells this line from the others."""
    more = [
        f"{key} {row[key]}"
        for key in ("preset", "segment")
        if row.get(key) is not None and len({each.get(key) for each in rows}) > 1
    ]
    return ", ".join([str(row["case"]), *more])
