"""Every exception and warning class of diagpass.

An error names the object, the cause and the fix in one sentence. All errors derive from
:class:`DiagpassError`, all warnings from :class:`DiagpassWarning`. When an error is raised inside a
``torch.compile`` backend, Dynamo wraps it: it is then the ``inner_exception`` of
``torch._dynamo.exc.BackendCompilerFailed``.
"""

from __future__ import annotations

__all__ = [
    "BatchingError",
    "CaptureError",
    "ChainError",
    "DiagpassError",
    "DiagpassWarning",
    "OptionError",
    "SequentialError",
    "VerificationError",
]


class DiagpassError(Exception):
    """Base class of every error that diagpass raises on purpose."""


class OptionError(DiagpassError, ValueError):
    """An option is unknown or has a value that it cannot have; the message lists the valid ones."""


class CaptureError(DiagpassError):
    """The model could not be captured as one graph; the message has the reason and the user's line."""


class SequentialError(DiagpassError):
    """Under ``strict=True``: the model would run sequentially; the message says why."""


class ChainError(SequentialError):
    """Under ``strict=True``: a dependency from a layer to a lower one leaves no width."""


class BatchingError(DiagpassError):
    """A kind cannot be batched: an operation has no batching rule, or one that is not trusted."""


class VerificationError(DiagpassError):
    """The wavefront's results differ from the sequential run's by more than rounding explains."""


class DiagpassWarning(UserWarning):
    """Base class of every warning: something runs sequentially or unbatched, and why."""
