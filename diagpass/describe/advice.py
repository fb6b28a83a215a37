"""What to change: one sentence a finding, from its cause."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diagpass.describe.figures import letter

__all__ = ["advise", "cause_of", "is_narrow"]

_BY_CAUSE = {
    "chain": (
        "let each layer carry its own state to its own next segment (as ARMT does instead of RMT), so that "
        "no layer waits for a higher one of the segment before; without that there is nothing to gain here"
    ),
    "one segment": "cut the input into more segments: a smaller segment size, or a longer input",
    "one layer": (
        "nothing can run beside a single layer; name the layers with options={'cells': ...} if it is not one"
    ),
    "no layers": (
        "name the modules that are the layers with options={'cells': 'path.of.layers.*'}; a model without "
        "repeated modules has nothing to batch"
    ),
    "random": "call model.eval(), or set the dropout to 0",
    "capture": (
        "write that line with tensor operations (torch.where instead of if, no .item()), or move it out of "
        "forward; torch.compile(model, fullgraph=True) has to accept the model"
    ),
    "strides": "write that line without as_strided, with view, reshape or unfold",
    "gradients": "call it under torch.no_grad()",
    "dependencies": "see the critical path: each cell waits for the one before it",
}


def is_narrow(reason: str | None) -> bool:
    """Whether a refusal's sentence says that width is all that is missing."""
    return cause_of(reason) in ("chain", "one segment", "one layer", "dependencies")


def cause_of(reason: str | None) -> str | None:
    """The cause that a refusal's sentence names, as a key."""
    if reason is None:
        return None
    for words, cause in (
        ("a chain leaves", "chain"),
        ("has one segment", "one segment"),
        ("one repeated layer", "one layer"),
        ("no repeated module", "no layers"),
        ("no module path matches", "no layers"),
        ("random numbers", "random"),
        ("as_strided", "strides"),
        ("gradients are recorded", "gradients"),
        ("could not be captured", "capture"),
        ("dependencies leave", "dependencies"),
    ):
        if words in reason:
            return cause
    return "other"


def advise(
    reason: str | None, kinds: Sequence[dict[str, Any]], blocking: dict[str, Any] | None, cells: int
) -> list[str]:
    """What to change, most important first; empty if there is nothing."""
    found = []
    cause = cause_of(reason)
    if cause in _BY_CAUSE:
        found.append(_BY_CAUSE[cause])
    if reason is None and blocking is not None:
        found.append(
            f"without the dependencies {blocking['reach']} {blocking['waves_without']:,} waves would do "
            f"instead of {blocking['waves']:,}: {_BY_CAUSE['chain']}"
        )
    for kind in kinds:
        if kind["unbatchable"]:
            found.append(
                f"replace {kind['unbatchable']} by an operation with a batching rule, or leave it: "
                f"the {kind['cells']:,} cells of kind {letter(kind['index'])} then run one by one"
            )
    for kind in kinds:
        differs = kind["differs"]
        if reason is None and differs and differs["cause"] in ("shape", "constant"):
            both = f"kinds {letter(kind['index'])} and {letter(differs['kind'])} are batched apart"
            theirs = next((each["layers"] for each in kinds if each["index"] == differs["kind"]), [])
            if set(theirs) & set(kind["layers"]):
                found.append(f"{both}; make their segments of one length, by padding the last one, say")
            else:
                found.append(f"{both}; make their layers the same where that costs nothing")
            break
    return found
