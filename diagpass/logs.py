"""Logging beyond Python's own: artifacts for ``TORCH_TRACE`` and tlparse.

``TORCH_LOGS="+diagpass"`` needs no help: PyTorch takes the name of any importable package and shows its
loggers. Artifacts go through a private function of PyTorch; where it is missing or has changed nothing is
written and nothing fails.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

__all__ = ["artifact"]

log = logging.getLogger(__name__)


def artifact(name: str, text: Callable[[], str]) -> None:
    """Hand a text to PyTorch's structured trace, if one is being written; it is made only then."""
    try:
        from torch._logging import trace_structured

        trace_structured(
            "artifact", metadata_fn=lambda: {"name": name, "encoding": "string"}, payload_fn=text
        )
    except Exception as error:  # a private interface: never a reason to fail
        log.debug("no artifact %s: %s", name, error)
