"""Where the console script begins: says which extra is missing, if one is."""

from __future__ import annotations

import sys

__all__ = ["main"]


def main() -> None:
    """Run the command line."""
    try:
        import rich  # noqa: F401
        import typer  # noqa: F401
    except ImportError as error:
        sys.stderr.write(
            f'error: the command line needs {error.name}; pip install "diagpass[cli]" brings it\n'
        )
        raise SystemExit(1) from None
    from diagpass.cli.app import app

    app()
