"""Several of Inductor's C++ kernels as one source: its compiler reads the headers once for all of them.

Inductor compiles and links each kernel by itself; most of that time goes into the headers and into
libtorch's symbols, the same for all. Here the kernels of a graph are put one behind the other, with
Inductor's own bindings in a namespace for each, and compiled by Inductor's own compiler and cache.
"""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

__all__ = ["compile_together"]

MOST = 12  # kernels in a source: more are spread over the processors

_HEADERS = """
#include <torch/csrc/inductor/cpp_prefix.h>
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <sstream>
#include <cstdlib>
#include <cerrno>
"""


def compile_together(
    kernels: Sequence[tuple[Sequence[str], str]], submit: Callable[..., Any]
) -> Callable[[], list[Callable[..., None]]]:
    """Have kernels compiled.

    Parameters
    ----------
    kernels
        Per kernel the C++ types of its arguments, and its source with a function ``kernel``, as Inductor
        generates them.
    submit
        Has a task done by one of Inductor's workers.

    Returns
    -------
    Callable
        Waits for the compiler and returns a Python function per kernel.
    """
    parts = -(-len(kernels) // MOST)
    bounds = [len(kernels) * at // parts for at in range(parts + 1)] if parts else []
    loads = [_compile(kernels[first:stop], submit) for first, stop in itertools.pairwise(bounds)]
    return lambda: [function for load in loads for function in load()]


def _compile(
    kernels: Sequence[tuple[Sequence[str], str]], submit: Callable[..., Any]
) -> Callable[[], list[Callable[..., None]]]:
    cache: Any = importlib.import_module("torch._inductor.codecache").CppPythonBindingsCodeCache
    names = [f"kernel{at}" for at in range(len(kernels))]
    functions, bindings = [], []
    for name, (types, source) in zip(names, kernels, strict=True):
        arguments = (f"parse_arg<{kind.replace('const ', '')}>(args, {at})" for at, kind in enumerate(types))
        binding = cache.suffix_template.format(
            arg_len=len(types),
            call_entry_func=f"{name}({', '.join(arguments)}); Py_RETURN_NONE;",
            entry_func=name,
            extra_parse_arg="",
        )
        functions.append(f"#define kernel {name}\n{source}\n#undef kernel\n")
        bindings.append(f"namespace {name}_binding {{\n{binding}\n}}\n")

    class Library(cache):
        """Loads a library as what it is: where it lies."""

        cache: ClassVar[dict[str, Any]] = {}

        @classmethod
        def _load_library_inner(cls, path: str, key: str) -> Any:
            return _Library(path)

    tasks: list[_Task] = []

    def keep(perform: Callable[[], None]) -> _Task:
        tasks.append(_Task(perform))
        return tasks[-1]

    # Inductor submits while it holds the lock that the task takes: a worker waits a moment, but without
    # workers the task is done right here, and would wait for itself.
    load = Library.load_async("".join([_HEADERS, *functions, *bindings]), "cpu", submit_fn=keep)
    for task in tasks:
        task.future = submit(task.perform)

    def loaded() -> list[Callable[..., None]]:
        library = load()
        found = []
        for name in names:
            module = type(name, (cache,), {"entry_function": name})._load_library_inner(
                library.path, library.key
            )
            found.append(getattr(module, name))
        return found

    return loaded


@dataclasses.dataclass
class _Task:
    """What a worker is to do."""

    perform: Callable[[], None]
    future: Any = None  # of the worker; None if it was done at once

    def result(self) -> None:
        """Wait until it is done."""
        if self.future is not None:
            self.future.result()


class _Library:
    """Where it lies; Inductor adds its ``key``."""

    key: str

    def __init__(self, path: str) -> None:
        self.path = path
