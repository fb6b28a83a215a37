"""Stacks of GRU or LSTM cells, unrolled in plain Python.

The oldest layer x segment grid: every time step is a segment, every `nn.GRUCell` or `nn.LSTMCell` a
layer. Running it along diagonals is the wavefront of Appleyard et al. 2016, "Optimizing Performance
of Recurrent Neural Networks on GPUs" (arXiv 1604.01946, section 3.3). GRU: Cho et al. 2014 (arXiv
1406.1078); LSTM: Hochreiter and Schmidhuber 1997.

>>> model, inputs = build(kind="lstm", layers=3, segments=5, batch=2, d_model=16)
>>> outputs, states = model(*inputs)
>>> tuple(outputs.shape), len(states), tuple(states[0][1].shape)
((2, 5, 16), 3, (2, 16))
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

CELLS: dict[str, type[nn.Module]] = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}

#: what a layer carries on: ``h`` [B, D] of a GRU, ``(h, c)`` of an LSTM
State = Tensor | tuple[Tensor, Tensor]


class RNNStack(nn.Module):
    """Recurrent cells on top of each other, all of one width.

    Parameters
    ----------
    kind
        "gru" or "lstm".
    layers
        Number of cells.
    d_model
        Width D of inputs, outputs and states.

    Raises
    ------
    ValueError
        If `kind` is neither.
    """

    def __init__(self, kind: str, layers: int, d_model: int) -> None:
        super().__init__()
        if kind not in CELLS:
            raise ValueError(f"kind must be one of {', '.join(CELLS)}, got {kind!r}")
        self.kind = kind
        self.d_model = d_model
        self.cells = nn.ModuleList(CELLS[kind](d_model, d_model) for _ in range(layers))

    def initial_state(self, x: Tensor) -> list[State]:
        """Zeros for every layer, like `x` [B, ..., D] in batch, dtype and device."""
        zeros = [x.new_zeros(x.shape[0], self.d_model) for _ in self.cells]
        return [(z, z.clone()) for z in zeros] if self.kind == "lstm" else list(zeros)

    def forward(self, x: Tensor, state: list[State] | None = None) -> tuple[Tensor, list[State]]:
        """Run all time steps.

        Parameters
        ----------
        x
            Inputs [B, time steps, D].
        state
            A state for each layer, as returned by an earlier call; zeros unless given.

        Returns
        -------
        The top layer's outputs [B, time steps, D], and the state of each layer after the last
        step: ``h`` [B, D] of a GRU, ``(h, c)`` of an LSTM.
        """
        state = self.initial_state(x) if state is None else list(state)
        outputs = []
        for h in x.unbind(dim=1):
            for at, cell in enumerate(self.cells):
                state[at] = cell(h, state[at])
                h = state[at][0] if self.kind == "lstm" else state[at]
            outputs.append(h)
        return torch.stack(outputs, dim=1), state


def build(
    kind: str = "gru",
    layers: int = 3,
    segments: int = 8,
    batch: int = 2,
    d_model: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[RNNStack, tuple[Tensor]]:
    """Make a small stack with random weights, in evaluation mode, and inputs for it.

    Weights and inputs are drawn in float32 and then cast; the global random state is left as it
    was.

    Returns
    -------
    The model and its positional inputs ``(x [batch, segments, d_model],)``; a segment is one step.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = RNNStack(kind, layers, d_model)
        x = torch.randn(batch, segments, d_model)
    return model.to(dtype).eval(), (x.to(dtype),)
