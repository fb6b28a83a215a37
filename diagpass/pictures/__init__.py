"""Pictures of a schedule, as PNG files, as coloured text and as a trace.

    layout.py    what every picture needs from a report
    terminal.py  the layer x segment grid as coloured text (needs rich)
    grid.py      the same as a PNG (needs matplotlib)
    gantt.py     the schedule as a Gantt chart, sequential above wavefront (needs matplotlib)
    curves.py    time and memory against length, from benchmark rows (needs matplotlib)
    trace.py     the schedule, or a run, as a Chrome trace

Every *cell* (one layer applied to one segment) is a square; its colour and number say in which
*wave* it runs (cells of one wave have no path between them and run together), its letter says of
which *kind* it is (only cells of one kind can be batched). An arrow from cell a to cell b means
that b needs something that a makes. No optional package is imported before it is needed.
"""

from diagpass.pictures.curves import plot_curves
from diagpass.pictures.gantt import plot_gantt
from diagpass.pictures.grid import plot_grid
from diagpass.pictures.terminal import GridText, grid_text
from diagpass.pictures.trace import schedule_events, write_trace

__all__ = [
    "GridText",
    "grid_text",
    "plot_curves",
    "plot_gantt",
    "plot_grid",
    "schedule_events",
    "write_trace",
]
