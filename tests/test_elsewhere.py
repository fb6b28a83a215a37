"""Models from elsewhere, unmodified: each runs as a wavefront, or says why not. See tests/zoo."""

from __future__ import annotations

import pytest

from tests.zoo import CASES
from tests.zoo.check import run
from tests.zoo.table import committed_row, deterministic


@pytest.mark.parametrize("name", CASES)
def test_runs_unmodified(name: str) -> None:
    """Equal outputs and final state, waves as derived by hand, and docs/models.md says so."""
    case = CASES[name]
    missing = case.missing()
    if missing is not None:
        pytest.skip(f"{missing} is not installed")
    figures = run(case)
    assert committed_row(name) == deterministic(case, figures), "run `make models`"
