"""The wavefront against the sequential reference: outputs and final state, in figures."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import keystr, tree_flatten_with_path

from diagpass.errors import VerificationError
from diagpass.state import Snapshot, named_state

# Relative error that rounding explains, by the dtype that a tensor is in. A float64 model may compute
# its norms in float32, hence the wide bound.
TOLERANCE = {
    torch.float64: 1e-6,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 6e-2,
}


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    """``|value - reference| / |reference|`` in the Frobenius norm; 0 where both are NaN."""
    if value.shape != reference.shape:
        return float("inf")
    if not (value.is_floating_point() or value.is_complex()):
        return 0.0 if torch.equal(value, reference) else float("inf")
    wide = torch.complex128 if value.is_complex() else torch.float64
    left, right = value.detach().to(wide), reference.detach().to(wide)
    same = (left == right) | (left.isnan() & right.isnan())
    difference = torch.where(same, torch.zeros_like(left), left - right).norm()
    if difference == 0:
        return 0.0
    scale = torch.where(same & right.isnan(), torch.zeros_like(right), right).norm()
    return float(difference / scale) if scale > 0 else float("inf")


def differences(reference: Reference, model: nn.Module, outputs: Any) -> list[tuple[str, float, torch.dtype]]:
    """Name, relative error and data type of every output and state of a run, against a reference.

    Raises
    ------
    VerificationError
        The outputs or the state have another structure.
    """
    return [
        (name, relative_error(value, expected), expected.dtype)
        for name, value, expected in reference._pairs(model, outputs)
    ]


@dataclasses.dataclass
class Reference:
    """The sequential run of one call: its outputs and the state it left."""

    outputs: list[tuple[str, Any]]
    spec: Any
    state: dict[str, torch.Tensor]

    @classmethod
    def take(cls, model: nn.Module, args: tuple, kwargs: dict) -> Reference:
        """Run the model as it stands and put its state back."""
        before = Snapshot(model, args, kwargs)
        try:
            with torch.no_grad():
                return cls.of(model, model(*args, **kwargs))
        finally:
            before.restore()

    @classmethod
    def of(cls, model: nn.Module, outputs: Any) -> Reference:
        """The outputs of a sequential run that just happened, and the state it left."""
        state = {name: value.detach().clone() for name, value in named_state(model).items()}
        leaves, spec = tree_flatten_with_path(outputs)
        kept = [
            (keystr(path), leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf)
            for path, leaf in leaves
        ]
        return cls(kept, spec, state)

    def compare(self, model: nn.Module, outputs: Any) -> dict[str, float]:
        """Relative errors by name.

        Raises
        ------
        VerificationError
            A value differs by more than rounding explains; the message names the worst.
        """
        errors: dict[str, float] = {}
        bounds: dict[str, float] = {}
        for name, value, reference in self._pairs(model, outputs):
            errors[name] = relative_error(value, reference)
            bounds[name] = TOLERANCE.get(reference.dtype, 0.0)
        wrong = {name: error for name, error in errors.items() if error > bounds[name]}
        if wrong:
            worst = max(wrong, key=lambda name: wrong[name])
            raise VerificationError(
                f"the wavefront differs from the sequential run in {len(wrong)} of {len(errors)} values, "
                f"most in {worst}: relative error {wrong[worst]:.2e}, bound {bounds[worst]:.0e}"
            )
        return errors

    def _pairs(self, model: nn.Module, outputs: Any) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        got, got_spec = tree_flatten_with_path(outputs)
        if got_spec != self.spec:
            raise VerificationError(f"the outputs have another structure: {got_spec}, not {self.spec}")
        for (_, value), (name, reference) in zip(got, self.outputs, strict=True):
            if isinstance(reference, torch.Tensor):
                yield f"output{name}", value, reference
        state = named_state(model)
        if state.keys() != self.state.keys():
            changed = sorted(state.keys() ^ self.state.keys())
            raise VerificationError(f"the state has other entries: {', '.join(changed)}")
        for name, reference in self.state.items():
            yield f"state {name}", state[name], reference
