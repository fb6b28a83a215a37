"""Tests of diagpass: what must hold for models that were not written for it.

Importing this package, before torch computes anything, fixes the arithmetic, so that bitwise equality means
the same on every machine. PyTorch's and MKL's fast kernels let a result depend on more than its operands'
values:

* ATen's vector code computes ``exp`` and its like otherwise than the scalar code beside it, which serves
  what does not fill a vector. Which element gets which depends on strides, and these change when a write
  in place (``chunk.sigmoid_()``, as in ``nn.GRUCell``) becomes a value of its own in the functional graph:
  one unit in the last place, on a machine with AVX2. With
  ``ATEN_CPU_CAPABILITY=default`` there is the scalar code only.
* MKL chooses its path by the address of an operand modulo 16 bytes, and a row of a stacked state may begin
  anywhere. ``MKL_CBWR=COMPATIBLE`` has one path for all addresses.

The bounds of the comparisons are what they are without this: 0.0 where a test says bitwise.
"""

from __future__ import annotations

import os


def _fix_arithmetic() -> None:
    os.environ.setdefault("MKL_CBWR", "COMPATIBLE")
    given = os.environ.get("ATEN_CPU_CAPABILITY")
    os.environ.setdefault("ATEN_CPU_CAPABILITY", "default")
    import torch

    torch.backends.cpu.get_cpu_capability()  # decided here once and for all
    if given is None:  # Inductor, which reads the variable too, is to generate what it does for a user
        del os.environ["ATEN_CPU_CAPABILITY"]


_fix_arithmetic()
