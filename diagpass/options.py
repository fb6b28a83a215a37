"""The options of ``transform`` and of the ``diagonal`` backend: one place, the same names for both.

In: the user's ``options`` dict. Out: a frozen :class:`Options`, every value checked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from diagpass.errors import OptionError

_CHOICES = {
    "compiler": ("inductor", "eager"),
    "schedule": ("auto", "wavefront", "sequential"),
    "weights": ("share", "copy"),
    "loop": ("auto", "flat", "rolled"),
    "form": ("auto", "measured", "batched", "looped", "single"),
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What a user may choose.

    Parameters
    ----------
    compiler
        ``"inductor"`` compiles each batched kind once; ``"eager"`` runs the emitted graph as it is.
    schedule
        ``"auto"`` runs the wavefront when the dataflow leaves width, and on CUDA under Inductor without
        width, too: the cells one after the other, compiled and recorded; ``"wavefront"`` runs it always;
        ``"sequential"`` runs the captured graph in program order.
    weights
        ``"share"`` makes the model's parameters views of the stacked weights (held once);
        ``"copy"`` leaves the model's storage alone.
    cells
        Glob over module paths that names the cells, such as ``"model.layers.*"``, or a list of such
        globs; None lets the graph decide.
    loop
        How a model with a loop of its own is captured by ``transform``: ``"flat"`` captures the loop for
        its number of segments, ``"rolled"`` captures the module that runs one segment, once for any
        number; ``"auto"`` is rolled from some 256 cells on, where such a module is found.
    form
        How a group of cells is computed: ``"batched"`` in one graph with batched matrix products,
        ``"looped"`` in one graph with the products cell by cell, ``"single"`` cell by cell. ``"measured"``
        times them at the first call and keeps the fastest; ``"auto"`` does so on the CPU under Inductor and
        is ``"batched"`` elsewhere. Pin one where two processes must give the same bits.
    max_width
        The largest number of cells in one wave, None for no limit. With 1 the cells run one by one,
        unbatched, in the order of the waves.
    memory_limit
        Bytes that the cells of a wave may take for what they compute on the way, None for no limit: waves
        have as many cells as fit, and one at least. What a cell takes is estimated from its graph, unfused.
    strict, verify
        As the arguments of :func:`diagpass.transform`; options here so that the backend has them.
    """

    compiler: str = "inductor"
    schedule: str = "auto"
    weights: str = "share"
    cells: tuple[str, ...] | None = None
    loop: str = "auto"
    form: str = "auto"
    max_width: int | None = None
    memory_limit: int | None = None
    strict: bool = False
    verify: bool = False

    @classmethod
    def parse(cls, given: Mapping[str, Any] | None, **defaults: Any) -> Options:
        """Check a user's dict and fill in the defaults.

        Raises
        ------
        OptionError
            An unknown name (the valid ones are listed) or a value out of its range.
        """
        given = dict(given or {})
        valid = [field.name for field in dataclasses.fields(cls)]
        for name, value in given.items():
            if name not in valid:
                raise OptionError(f"unknown option {name!r}; the valid options are: {', '.join(valid)}")
            if name in _CHOICES and value not in _CHOICES[name]:
                choices = ", ".join(repr(choice) for choice in _CHOICES[name])
                raise OptionError(f"option {name!r} is one of {choices}; got {value!r}")
            if name in ("strict", "verify") and not isinstance(value, bool):
                raise OptionError(f"option {name!r} is True or False; got {value!r}")
        if "cells" in given:
            given["cells"] = _globs(given["cells"])
        for name in ("max_width", "memory_limit"):
            limit = given.get(name)
            if limit is not None and (type(limit) is not int or limit < 1):
                raise OptionError(f"option {name!r} is None or an int of at least 1; got {limit!r}")
        return cls(**{**defaults, **given})


def _globs(value: Any) -> tuple[str, ...] | None:
    if value is None:
        return None
    globs: tuple = (value,) if isinstance(value, str) else ()
    if isinstance(value, (list, tuple)):
        globs = tuple(value)
    if not globs or not all(isinstance(glob, str) and glob for glob in globs):
        raise OptionError(
            f"option 'cells' is a glob over module paths such as 'model.layers.*'; got {value!r}"
        )
    return globs
