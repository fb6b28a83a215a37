"""The stances of ``torch.compile`` (``torch.compiler.set_stance``): what they ask of a deferred segment.

Under some of them Dynamo may run a frame as it stands, which would read state that is not computed yet. There
it is asked under another one.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch._dynamo.config

__all__ = ["answering", "asks_all", "is_forbidden", "is_off", "may_run_plainly"]

# Stances (torch.compiler.set_stance) under which Dynamo may run a frame as it stands; what is taken instead.
_ANSWERING = {
    "eager_then_compile": "default",
    "aot_eager_then_compile": "default",
    "eager_on_recompile": "fail_on_recompile",
}


def is_off() -> bool:
    """Whether ``torch.compile`` does not come to us: it is switched off, or has to take another backend."""
    stance = _stance()
    forced = getattr(stance, "stance", "") == "force_eager" or getattr(stance, "backend", None) is not None
    return bool(torch._dynamo.config.disable or forced)


def may_run_plainly() -> bool:
    """Whether the user's stance has what was not captured before run as it stands."""
    return getattr(_stance(), "stance", "") == "eager_on_recompile"


def asks_all() -> bool:
    """Whether Dynamo asks all guards of a capture, and not only those that tell captures apart."""
    return not getattr(_stance(), "skip_guard_eval_unsafe", False)


def is_forbidden(error: RuntimeError) -> bool:
    """Whether Dynamo raised this because of a stance under which nothing is captured."""
    return any(name in str(error) for name in ("'fail_on_recompile'", "skip_guard_eval_unsafe stance"))


def _stance() -> Any:
    return getattr(torch._dynamo.eval_frame, "_stance", None)


def answering() -> contextlib.AbstractContextManager[Any]:
    """Inside, Dynamo finds or makes a capture, or raises."""
    stance = _stance()
    wanted = _ANSWERING.get(getattr(stance, "stance", ""))
    if wanted is None:
        return contextlib.nullcontext()
    return torch.compiler.set_stance(wanted, skip_guard_eval_unsafe=stance.skip_guard_eval_unsafe)
