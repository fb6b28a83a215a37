"""``diagpass verify``: the sequential run against the wavefront, in figures per output and state."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import nn

from diagpass.errors import VerificationError
from diagpass.report import Report
from diagpass.transform import transform
from diagpass.verify import TOLERANCE, Reference, differences

__all__ = ["Checked", "check"]


@dataclasses.dataclass(frozen=True)
class Checked:
    """One tensor of the two runs: the relative error and the bound it is held against."""

    name: str
    error: float
    bound: float

    @property
    def equal(self) -> bool:
        """Whether the error is within the bound; NaN is not."""
        return self.error <= self.bound


def check(
    model: nn.Module, inputs: tuple[Any, ...], tolerance: float | None, options: dict[str, Any]
) -> tuple[list[Checked], Report]:
    """Run both and compare; the model's state stays as it was.

    Parameters
    ----------
    model, inputs
        What a factory returned.
    tolerance
        The largest relative error allowed; None for what rounding explains in each tensor's data type.
    options
        For :func:`diagpass.transform`; the wavefront is run wherever it is legal.

    Raises
    ------
    VerificationError
        The two runs differ in structure.
    """
    with torch.no_grad():
        reference = Reference.take(model, inputs, {})
        fast = transform(model, options={"schedule": "wavefront", **options})
        result = fast(*inputs)
        pairs = differences(reference, model, result)
    report = fast.report
    if report is None:
        raise VerificationError("the wavefront left no report: is DIAGPASS_DISABLE set? Unset it to verify")
    found = [
        Checked(name, error, TOLERANCE.get(dtype, 0.0) if tolerance is None else tolerance)
        for name, error, dtype in pairs
    ]
    return found, report
