"""diagpass: segment-recurrent models as wavefronts, with the sequential model's results.

>>> import torch, diagpass
>>> class Layer(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.cell = torch.nn.GRUCell(8, 8)
...     def forward(self, x, state):
...         return self.cell(x, state)
>>> class Stack(torch.nn.Module):
...     def __init__(self):
...         super().__init__()
...         self.layers = torch.nn.ModuleList(Layer() for _ in range(4))
...     def forward(self, xs):
...         states = [xs.new_zeros(xs.shape[1], 8) for _ in self.layers]
...         for x in xs:
...             for at, layer in enumerate(self.layers):
...                 x = states[at] = layer(x, states[at])
...         return x
>>> model, xs = Stack().eval(), torch.randn(6, 2, 8)
>>> report = diagpass.explain(model, xs)
>>> report.cells, report.waves
(24, 9)
>>> fast = diagpass.transform(model, options={"compiler": "eager"})
>>> with torch.no_grad():
...     torch.allclose(fast(xs), model(xs), atol=1e-6)
True
"""

from diagpass.calibration import measure_machine
from diagpass.describe.progress import Progress
from diagpass.errors import (
    BatchingError,
    CaptureError,
    ChainError,
    DiagpassError,
    DiagpassWarning,
    OptionError,
    SequentialError,
    VerificationError,
)
from diagpass.loop import SegmentLoop, SegmentStream
from diagpass.machine import Machine
from diagpass.report import Report
from diagpass.transform import explain, transform

__version__ = "0.1.0"

__all__ = [
    "BatchingError",
    "CaptureError",
    "ChainError",
    "DiagpassError",
    "DiagpassWarning",
    "Machine",
    "OptionError",
    "Progress",
    "Report",
    "SegmentLoop",
    "SegmentStream",
    "SequentialError",
    "VerificationError",
    "explain",
    "measure_machine",
    "transform",
]
