"""The documentation site: ``make docs``."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import diagpass  # noqa: E402

logging.getLogger("diagpass").setLevel(logging.WARNING)  # a package that furo needs has all loggers shown

project = "diagpass"
author = "The diagpass authors"
release = version = diagpass.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.doctest"]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"diagpass {release}"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_google_docstring = False
# what a machine without a network cannot check, and what answers robots with errors
linkcheck_timeout = 20
linkcheck_retries = 2
linkcheck_ignore = [r"https?://localhost.*"]
linkcheck_report_timeouts_as_broken = False


def draw_pictures(_app: Any) -> None:
    """The pictures on the pages are made by the tool itself, from the demo's model."""
    from diagpass.cli.sample import build
    from diagpass.pictures import plot_gantt, plot_grid

    folder = HERE / "_generated"
    folder.mkdir(exist_ok=True)
    model, inputs = build()
    report = diagpass.explain(model, *inputs)
    plot_grid(report, folder / "grid.png")
    plot_gantt(report, folder / "gantt.png")


def list_figures(_app: Any, page: str, source: list[str]) -> None:
    """Pages that come and go (models, performance) are listed where they are."""
    if page == "index":
        names = [name for name in ("models", "performance") if (HERE / f"{name}.md").exists()]
        source[0] = source[0].replace("FIGURES", "\n".join(names))


def setup(app: Any) -> None:
    """Sphinx's hook."""
    app.connect("builder-inited", draw_pictures)
    app.connect("source-read", list_figures)
