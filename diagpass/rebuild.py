"""A model and its inputs -> a script that a bug report can hold, where there is no one graph to write.

The script has the model pickled without the contents of its tensors: of each the shape, the data type and
mean and spread, from which values are drawn at random (small whole numbers are kept as they are). What is
pickled by name, classes and functions, must be importable where the script runs. Those of the program that
was started (``__main__``) are not: the script says which, and where they are to be pasted.
"""

from __future__ import annotations

import base64
import io
import pickle
import sys
import textwrap
import types
from typing import Any

import torch
from torch import nn

__all__ = ["model_script"]

KEPT = 4096  # whole numbers that are kept as they are; larger tensors of them become zeros

_SCRIPT = '''"""A model that diagpass was asked about; run it with diagpass {version} and torch {torch}.

It needs, importable from here (current folder or PYTHONPATH): {modules}.
{note}Weights and inputs are drawn at random, with the mean and the spread of those that were there.
"""

import base64
import io
import pickle
import sys
import warnings

import torch

import diagpass

# Paste here what the model needs of the program that made it: {pasted}.
NEEDED = {needed!r}

# The model, positional and keyword inputs, without the contents of tensors.
PICKLED = """
{pickled}
"""


class Unpickler(pickle.Unpickler):
    """Draws tensors where the pickle has descriptions of them."""

    def __init__(self, data):
        super().__init__(io.BytesIO(data))
        self.made = {{}}

    def persistent_load(self, described):
        key, shape, stride, dtype, device, mean, spread, values, parameter, needs_grad = described
        if key not in self.made:
            where = device if torch.device(device).type == "cpu" or torch.cuda.is_available() else "cpu"
            if 0 in stride:  # an expanded tensor shows an element many times; this one has each once
                stride = torch.empty(shape, device="meta").stride()
            value = torch.empty_strided(shape, stride, dtype=getattr(torch, dtype), device=where)
            with torch.no_grad():
                if values is not None:
                    value.copy_(torch.tensor(values).reshape(shape))
                elif value.is_floating_point() or value.is_complex():
                    value.copy_(torch.randn(shape) * spread + mean)
                else:
                    value.zero_()
            if parameter:
                value = torch.nn.Parameter(value, requires_grad=needs_grad)
            self.made[key] = value
        return self.made[key]


def build():
    """The model, its positional and its keyword inputs."""
    missing = [name for name in NEEDED if name not in globals()]
    if missing:
        sys.exit(f"paste the definitions of {{', '.join(missing)}} into this script, above NEEDED")
    torch.manual_seed(0)
    return Unpickler(base64.b64decode(PICKLED)).load()


def main():
    model, args, kwargs = build()
    with torch.no_grad():
        print(diagpass.explain(model, *args, **kwargs))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fast = diagpass.transform(model, options={{"compiler": "eager", "schedule": "wavefront"}})
            try:
                errors = fast.verify(*args, **kwargs)
            except diagpass.DiagpassError as error:
                errors = {{}}
                print(f"{{type(error).__name__}}: {{error}}")
    for warning in said:
        if issubclass(warning.category, diagpass.DiagpassWarning):
            print(f"warning: {{warning.message}}")
    for name, figures in errors.items():
        print(f"{{name}}: " + ", ".join(f"{{how}} {{error:.2e}}" for how, error in figures.items()))


if __name__ == "__main__":
    main()
'''


class _Pickler(pickle.Pickler):
    """Describes tensors instead of writing them; notes whose names are written."""

    def __init__(self, file: Any) -> None:
        super().__init__(file, protocol=5)
        self.names: dict[str, None] = {}
        self.modules: dict[str, None] = {}
        self._held: list[Any] = []

    def persistent_id(self, obj: Any) -> Any:
        """A tensor's description, or None for what is pickled as usual."""
        if isinstance(obj, (type, types.FunctionType)):
            module = obj.__module__
            root = module.partition(".")[0]
            if module == "__main__":
                self.names[obj.__qualname__.partition(".")[0]] = None
            elif root not in ("builtins", "torch", "collections", "diagpass"):
                self.modules[module] = None
        if not isinstance(obj, torch.Tensor):
            return None
        self._held.append(obj)  # so that no other tensor gets its id
        return (id(obj), *_described(obj))


def _described(tensor: torch.Tensor) -> tuple:
    dense = tensor.detach()
    mean = spread = 0.0
    values = None
    if dense.numel() and not dense.is_meta:
        if dense.is_floating_point():
            wide = dense.double()
            mean, spread = float(wide.mean()), float(wide.std(correction=0))
        elif not dense.is_complex() and dense.numel() <= KEPT:
            values = dense.reshape(-1).tolist()
    return (
        list(dense.shape),
        list(dense.stride()),
        str(dense.dtype).removeprefix("torch."),
        str(dense.device),
        mean,
        spread,
        values,
        isinstance(tensor, nn.Parameter),
        tensor.requires_grad,
    )


def model_script(model: nn.Module, args: tuple, kwargs: dict) -> str:
    """The script for a model and the inputs of a call.

    Raises
    ------
    ValueError
        The model cannot be pickled (it holds a lambda, a class made in a function, an open file); the text
        says what.
    """
    from diagpass import __version__

    out = io.BytesIO()
    pickler = _Pickler(out)
    try:
        pickler.dump((model, args, kwargs))
    except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(str(error)) from error
    note = ""
    if pickler.names:
        path = getattr(sys.modules["__main__"], "__file__", None) or "the interactive session"
        note = f"Paste {', '.join(pickler.names)} (from {path}) below, where it says so.\n"
    return _SCRIPT.format(
        version=__version__,
        torch=torch.__version__,
        modules=", ".join(sorted(pickler.modules)) or "nothing else",
        note=note,
        pasted=", ".join(pickler.names) or "nothing",
        needed=list(pickler.names),
        pickled="\n".join(textwrap.wrap(base64.b64encode(out.getvalue()).decode(), 100)),
    )
