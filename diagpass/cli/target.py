"""``MODULE:FACTORY`` -> a model and its inputs."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from diagpass.errors import DiagpassError

__all__ = ["TargetError", "called", "load"]


class TargetError(DiagpassError):
    """There is no such module or factory, or it does not return ``(model, inputs_tuple)``."""


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    """Import from the current folder first, as ``python -m`` does."""
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def load(target: str) -> tuple[nn.Module, tuple[Any, ...]]:
    """Import and call a factory.

    Parameters
    ----------
    target
        ``"package.module:factory"``; the factory takes no arguments and returns a module and a tuple of its
        positional inputs.

    Raises
    ------
    TargetError
        One sentence with what was tried, what went wrong and what to do.
    """
    name, colon, path = target.partition(":")
    if not colon or not name or not path:
        raise TargetError(
            f"{target!r} is not of the form MODULE:FACTORY; give an importable module and a callable in it, "
            "such as examples.armt:build"
        )
    with _current_folder():
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
                raise TargetError(
                    f"there is no module {error.name!r}, neither in the current folder "
                    f"({os.getcwd()}) nor on PYTHONPATH; check the spelling, or run diagpass where "
                    f"{name.partition('.')[0]} is"
                ) from error
            raise TargetError(
                f"module {name!r} needs {error.name!r}, which is not installed; install it in the "
                "environment that diagpass runs in"
            ) from error
        except Exception as error:
            raise TargetError(
                f"importing module {name!r} raised {_said(error)}; mend it, or run with --debug "
                "for the traceback"
            ) from error
        for part in path.split("."):
            if not hasattr(found, part):
                callables = [key for key, value in vars(found).items() if callable(value) and key[0] != "_"]
                some = ", ".join(callables[:8]) or "none"
                raise TargetError(f"module {name!r} has no {path!r}; the callables it has: {some}")
            found = getattr(found, part)
        if not callable(found):
            raise TargetError(
                f"{target} is a {type(found).__name__}, not a callable; name a function that returns "
                "(model, inputs_tuple)"
            )
        try:
            made = found()
        except Exception as error:
            raise TargetError(
                f"the factory {target} raised {_said(error)}; it is called without arguments and must return "
                "(model, inputs_tuple); run with --debug for the traceback"
            ) from error
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[0], nn.Module):
        raise TargetError(
            f"the factory {target} returned {_shape(made)}; it must return (model, inputs_tuple), a "
            "torch.nn.Module and a tuple of its positional inputs"
        )
    model, inputs = made
    if not isinstance(inputs, (tuple, list)):
        raise TargetError(
            f"the factory {target} returned its inputs as a {type(inputs).__name__}; they must be a tuple: "
            "return model, (inputs,)"
        )
    return model, tuple(inputs)


@contextlib.contextmanager
def called(target: str, model: nn.Module, inputs: tuple[Any, ...]) -> Iterator[None]:
    """Around work with a model: say so if it is the model itself that fails on its inputs.

    Raises
    ------
    TargetError
        The model raises when it is called as it stands, too.
    """
    try:
        yield
    except DiagpassError:
        raise
    except Exception:
        try:
            with torch.no_grad():
                model(*inputs)
        except Exception as error:
            raise TargetError(
                f"the model of {target} raised {_said(error)}, called as it stands with the factory's "
                "inputs; mend one or the other, or run with --debug for the traceback"
            ) from error
        raise


def _said(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _shape(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of ({', '.join(type(item).__name__ for item in value)})"
    return f"a {type(value).__name__}"
