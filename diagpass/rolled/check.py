"""A rolled run against the sequential one, in figures.

Unbatched, the schedule must give the very same bits: that proves the reordering. Batched, sums are taken in
another order; the run must then be as close to one in float64 as the sequential run is: that proves the
arithmetic, whatever the precision of the model.
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_map

from diagpass.errors import VerificationError
from diagpass.state import named_state
from diagpass.verify import TOLERANCE, relative_error

log = logging.getLogger(__name__)

FACTOR = 4.0  # how much farther from the float64 run than the sequential run is


def named_results(result: Any, step: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all tensors that a call returned and left behind, by name."""
    leaves, _ = tree_flatten_with_path(result)
    found = {f"output{keystr(path)}": leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}
    found.update({f"state {name}": value for name, value in named_state(step).items()})
    return {name: value.detach().clone() for name, value in found.items()}


def run_in_double(
    model: torch.nn.Module, args: tuple, kwargs: dict, step: str = ""
) -> dict[str, torch.Tensor] | None:
    """The sequential run of a copy in float64; None where the model is in float64 or no copy can be made."""
    floats = [p for p in model.parameters() if p.is_floating_point()]
    if not floats or all(p.dtype == torch.float64 for p in floats):
        return None
    try:
        exact = copy.deepcopy(model)
        for value in (*exact.parameters(), *named_state(exact).values()):
            if value.is_floating_point():
                value.data = value.data.double()
        args, kwargs = tree_map(_double, (args, kwargs))
        with torch.no_grad():
            return named_results(exact(*args, **kwargs), exact.get_submodule(step))
    except Exception as error:  # a model may insist on its own precision
        log.info("no float64 run to compare with: %s", error)
        return None


def compare(
    sequential: dict[str, torch.Tensor],
    unbatched: dict[str, torch.Tensor],
    batched: dict[str, torch.Tensor],
    exact: dict[str, torch.Tensor] | None,
) -> dict[str, dict[str, float]]:
    """Errors by name.

    Raises
    ------
    VerificationError
        The unbatched run differs in a bit, or the batched one by more than rounding explains.
    """
    figures: dict[str, dict[str, float]] = {}
    wrong: list[tuple[float, str]] = []
    for name, reference in sequential.items():
        if name not in unbatched or name not in batched:
            raise VerificationError(f"{name} is missing from the wavefront's results")
        target = reference if exact is None or name not in exact else exact[name]
        mine, its = relative_error(batched[name], target), relative_error(reference, target)
        moved = relative_error(unbatched[name], reference)
        figures[name] = {"unbatched": moved, "batched": mine, "sequential": its}
        bound = max(FACTOR * its, TOLERANCE.get(reference.dtype, 0.0) if exact is None else 0.0, 1e-12)
        if moved > 0:
            wrong.append((float("inf"), f"{name} of the unbatched schedule differs by {moved:.2e}"))
        elif not mine <= bound:
            wrong.append((mine, f"{name} is off by {mine:.2e}, the sequential run by {its:.2e}"))
    if wrong:
        worst = max(wrong)[1]
        raise VerificationError(
            f"the wavefront differs from the sequential run in {len(wrong)} of {len(figures)} values: {worst}"
        )
    return figures


def _double(leaf: Any) -> Any:
    return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.is_floating_point() else leaf
