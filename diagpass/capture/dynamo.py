"""Python -> FX graph: how Dynamo is called, and what it says when it cannot.

``settings`` are the Dynamo options under which our captures are sound (hooks are guarded) and stable
(counters do not recompile). ``capturing`` spares a capture what it can do without. ``counters`` finds
Python counters while a capture is under way, so that it can be started anew with them as symbols.
"""

from __future__ import annotations

import contextlib
import functools
import re
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
import torch._dynamo.config
import torch.fx as fx
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._dynamo.variables.base import VariableTracker
from torch._dynamo.variables.functions import BaseUserFunctionVariable
from torch._dynamo.variables.tensor import (
    NumpyNdarrayVariable,
    SymNodeVariable,
    UnspecializedPythonVariable,
)
from torch.torch_version import TorchVersion

from diagpass.capture.fakes import known_results
from diagpass.capture.lines import plain_lines
from diagpass.capture.marks import attribute_path, spoken
from diagpass.capture.stances import answering
from diagpass.uncollected import uncollected

_TRACES_GRADIENTS = TorchVersion(torch.__version__) >= TorchVersion("2.13")
MANY = 1 << 16  # plans are bounded by their own cache, not by Dynamo's limit of 8


_free = threading.local()  # patches that nobody is in at present, by the symbols that they are for


@contextlib.contextmanager
def settings(symbols: Collection[str] = (), answers: bool = False) -> Iterator[None]:
    """The configuration for capturing and running.

    A patch of torch's configuration leaves a context variable behind for good, so patches are used again.

    Parameters
    ----------
    symbols
        Sources to keep symbolic.
    answers
        Whether nothing may run as it stands, whatever stance is set: a segment whose state is not computed
        yet would read memory that holds nothing.
    """
    pattern = _pattern(frozenset(symbols))
    free = _free.__dict__.setdefault(pattern, [])
    patches = free.pop() if free else _patches(pattern)
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        if answers:
            stack.enter_context(answering())
        yield
    free.append(patches)


@contextlib.contextmanager
def capturing() -> Iterator[None]:
    """Around what Dynamo may capture: what it does again and again is done once, and garbage waits."""
    with uncollected(), plain_lines(), known_results():
        yield


@functools.lru_cache(maxsize=256)
def _pattern(symbols: frozenset[str]) -> str:
    """One expression: of a list torch tries each in turn, and ``re`` compiles anew what is beyond 512.

    torch cuts it at commas and drops spaces, which may stand in a module's name.
    """
    escaped = (re.escape(name).replace(",", r"\x2c").replace(r"\ ", r"\x20") for name in sorted(symbols))
    return "|".join(f"{name}$" for name in escaped)


def _patches(pattern: str) -> list[contextlib.AbstractContextManager]:
    config: Any = torch._dynamo.config
    compiler_config: Any = torch.compiler.config
    wanted: dict[str, Any] = {
        "allow_unspec_int_on_nn_module": True,
        "allow_rnn": True,
        "skip_nnmodule_hook_guards": False,
        "recompile_limit": MANY,
        "accumulated_recompile_limit": MANY,
    }
    if _TRACES_GRADIENTS:  # a memory that is trained as it runs
        wanted["trace_autograd_ops"] = True
    common = config.patch(**wanted)
    return [common, compiler_config.patch(dynamic_sources=pattern)] if pattern else [common]


def source_name(source: Any) -> str:
    """Dynamo's name of a source, such as ``L['self'].count``; a property since torch 2.12."""
    name: Any = source.name
    return str(name() if callable(name) else name)


def counters() -> set[str]:
    """Sources of int attributes that the captured frame reads as constants and changes.

    Only meaningful inside a backend call. Captured as constants they would mean a new capture at every
    call.
    """
    try:
        output = InstructionTranslator.current_tx().output
    except (AttributeError, LookupError):
        return set()
    guarded = {guard.name for guard in output.guards}
    found = set()
    for variable, attributes in output.side_effects.store_attr_mutations.items():
        owner = getattr(variable, "value", None)
        if owner is None or variable.source is None:
            continue
        for attribute in attributes:
            if type(getattr(owner, attribute, None)) is not int:
                continue
            try:
                base = source_name(variable.source)
            except NotImplementedError:  # made inside the frame
                continue
            found |= {
                name for name in (f"{base}.{attribute}", f"{base}.__dict__['{attribute}']") if name in guarded
            }
    return found


def symbols() -> set[str]:
    """Sources of the ints that the capture under way reads as symbols."""
    try:
        env: Any = InstructionTranslator.current_tx().output.shape_env
    except (AttributeError, LookupError):
        return set()
    return set(getattr(env, "source_to_var", ()) or ())


def bounded_deque() -> str | None:
    """A name for a ``deque`` with ``maxlen`` that the captured frame touches, or None.

    Dynamo (2.11 to 2.13) appends to a full one without dropping the oldest entry, so that what it
    captures computes something else. Only meaningful inside a backend call.
    """
    try:
        effects = InstructionTranslator.current_tx().output.side_effects
    except (AttributeError, LookupError):
        return None
    if any(isinstance(item, deque) and item.maxlen is not None for item in effects.keepalive):
        return "a part of the model's state"
    for variable in effects.id_to_variable.values():
        bound = getattr(variable, "maxlen", None)
        if bound is not None and bound.is_python_constant() and bound.as_python_constant() is not None:
            return source_name(variable.source) if variable.source is not None else "a local deque"
    return None


def accumulated_gradient(gm: fx.GraphModule) -> str | None:
    """A name for a tensor on which ``backward()`` in the captured frame may leave a gradient, or None.

    Dynamo makes ``torch.autograd.grad`` of it, and attributes that are set. Only meaningful inside a backend
    call.
    """
    if not gm.graph.find_nodes(op="call_function", target=torch.autograd.grad):
        return None
    try:
        effects = InstructionTranslator.current_tx().output.side_effects
    except (AttributeError, LookupError):
        return None
    for variable, attributes in effects.store_attr_mutations.items():
        if "grad" in attributes and variable.source is not None:
            with contextlib.suppress(NotImplementedError):  # made inside the frame
                return source_name(variable.source)
    return None


def lost_write() -> str | None:
    """What to say of an attribute whose last value the captured frame does not leave behind, or None.

    Dynamo (seen in torch 2.13 and 2.14) goes on with a copy of its table of side effects after each operator
    that has a function of its own (``cond``, ``flex_attention``, a hook on a tensor). Objects whose
    ``__dict__`` it has looked at before write to the old table, where nobody reads. Only meaningful inside a
    backend call.
    """
    try:
        effects = InstructionTranslator.current_tx().output.side_effects
    except (AttributeError, LookupError):
        return None
    tables = [effects]
    for table in tables:
        for variable in [*table.id_to_variable.values(), *table.store_attr_mutations]:
            known = vars(variable).get("dict_vt")  # getattr may make Dynamo trace more
            items = getattr(known, "items", None)
            written: Any = getattr(items, "side_effects", effects)
            if written is effects or isinstance(variable, BaseUserFunctionVariable):
                continue
            if all(written is not each for each in tables):
                tables.append(written)
            owner: Any = getattr(items, "item", None)
            read = effects.store_attr_mutations.get(owner, {})
            for name, value in written.store_attr_mutations.get(owner, {}).items():
                if read.get(name) is not value:
                    return (
                        f"TorchDynamo loses what {_named(variable)}.{name} is set to after a control flow "
                        "operator, flex_attention or a hook on a tensor; register it as a buffer"
                    )
    return None


def _named(variable: VariableTracker) -> str:
    with contextlib.suppress(NotImplementedError):  # made inside the frame
        if variable.source is not None:
            return attribute_path(source_name(variable.source))
    return "an object made inside"


def made_numbers() -> str | None:
    """What the captured frame leaves or returns that Dynamo reads out of a tensor, at once, or None.

    A Python float that is computed from a symbol comes out of the graph as a tensor, whose ``item()`` Dynamo
    takes, and a NumPy array as one that it converts: wrong where the values of results come later. Only
    meaningful inside a backend call.
    """
    try:
        tx = InstructionTranslator.current_tx()
        effects = tx.output.side_effects
    except (AttributeError, LookupError):
        return None
    for variable, attributes in effects.store_attr_mutations.items():
        for attribute, value in attributes.items():
            what = _read_at_once([value])
            if what is not None:
                with contextlib.suppress(NotImplementedError, AttributeError):  # made inside the frame
                    return f"{spoken(f'{source_name(variable.source)}.{attribute}')} is {what}"
                return f"an attribute {attribute} is {what}"
    left = [item for item in effects.id_to_variable.values() if effects.is_modified(item)]
    what = _read_at_once([*tx.stack, *left])
    return None if what is None else f"the step returns or keeps {what}"


def _read_at_once(values: list[Any]) -> str | None:
    """What among these, or inside of them, comes from the graph and is no tensor, int or bool afterwards."""
    found: list[str] = []

    def look(variable: Any) -> None:
        if getattr(variable, "source", None) is not None:
            return
        if isinstance(variable, (NumpyNdarrayVariable, UnspecializedPythonVariable)):
            found.append("a NumPy array or number")
        elif isinstance(variable, SymNodeVariable) and variable.python_type() is float:
            found.append("a Python float computed from an int that changes")

    VariableTracker.visit(look, values)
    return found[0] if found else None


def iterator() -> str | None:
    """A name for an iterator that outlives the captured frame, or None: capturing one advances it.

    Only meaningful inside a backend call.
    """
    found = _existing(lambda effects, variable, item: hasattr(type(item), "__next__"))
    return next((name for name, _ in found), None)


def outside_writes(holds: Callable[[int], bool]) -> list[tuple[str, Any]]:
    """Python objects that the captured frame changes and ``holds`` (an id) says no to: their names and they.

    Attributes that are set and set back, and stacks that are empty again, do not count. Only meaningful
    inside a backend call.
    """

    def found(effects: Any, variable: Any, item: Any) -> bool:
        if isinstance(item, torch.Tensor) or not effects.is_modified(variable) or holds(id(item)):
            return False
        if isinstance(item, list) and not item and getattr(variable, "items", None) == []:
            return False
        attributes = effects.store_attr_mutations.get(variable)
        return not attributes or any(_differs(item, name, value) for name, value in attributes.items())

    return list(_existing(found))


def _differs(item: Any, name: str, value: Any) -> bool:
    """Whether an attribute would have another value than it has."""
    if not value.is_python_constant():
        return True
    before, after = getattr(item, name, _differs), value.as_python_constant()
    return type(before) is not type(after) or before != after


def _existing(found: Callable[[Any, Any, Any], bool]) -> Iterator[tuple[str, Any]]:
    """The objects from before the frame for which ``found`` says yes, each with its name."""
    try:
        effects = InstructionTranslator.current_tx().output.side_effects
    except (AttributeError, LookupError):
        return
    objects = {id(item): item for item in effects.keepalive}
    for number, variable in effects.id_to_variable.items():
        if number not in objects or variable.source is None:
            continue
        try:
            name = source_name(variable.source)
        except NotImplementedError:  # made inside the frame
            continue
        if found(effects, variable, objects[number]):
            attributes = effects.store_attr_mutations.get(variable, ())
            said = spoken(name)
            yield ", ".join(f"{said}.{attribute}" for attribute in attributes) or said, objects[number]


def graph_break() -> tuple[str, str] | None:
    """The reason and ``file:line`` if the graph being compiled ends at a graph break, else None.

    Only meaningful inside a backend call.
    """
    try:
        reason = InstructionTranslator.current_tx().output.compile_subgraph_reason
    except (AttributeError, LookupError):
        return None
    if reason is None or not reason.graph_break:
        return None
    frames = [frame for frame in reason.user_stack if frame is not None]
    line = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "unknown line"
    return first_sentences(reason.reason), line


def is_resumed() -> bool:
    """Whether the frame being compiled continues one that a graph break cut."""
    try:
        name = InstructionTranslator.current_tx().f_code.co_name
    except (AttributeError, LookupError):
        return False
    return "torch_dynamo_resume_in" in name


def why(error: BaseException) -> str:
    """Dynamo's reason and the user's line, in one paragraph."""
    message = first_sentences(str(error))
    lines = re.findall(r'File "([^"]+)", line (\d+)', str(error))
    own = [(file, line) for file, line in lines if "/torch/" not in file and "diagpass" not in file]
    if own:
        message += f" ({own[-1][0]}:{own[-1][1]})"
    return message


def changed(error: BaseException) -> str:
    """What differed between two captures, from Dynamo's complaint about a recompilation."""
    reasons = re.findall(r"^\s*-?\s*\d+/\d+: (.*)$", str(error), re.MULTILINE)
    return reasons[0].strip() if reasons else first_sentences(str(error))


def in_library(error: BaseException | None) -> bool:
    """Whether the line that Dynamo stopped at is an installed library's, not torch's or the user's own."""
    lines = re.findall(r'File "([^"]+)", line \d+', str(error))
    own = [file for file in lines if "/torch/" not in file and "diagpass" not in file]
    return bool(own) and ("site-packages" in own[-1] or "dist-packages" in own[-1])


def first_sentences(text: str) -> str:
    """Dynamo's headline, explanation and context without its hints and traces."""
    kept = []
    for line in text.strip().splitlines():
        line = line.strip()
        if line.startswith(("Hint:", "Developer debug context", "For more details", "from user code")):
            if line.startswith("Developer debug context"):
                kept.append(line.partition(":")[2].strip())
            continue
        if line.startswith(("File ", "# File ", "Set TORCH", "Traceback", "Most recent", "^")):
            break
        if line:
            kept.append(line.removeprefix("Explanation:").strip())
    if len(kept) > 1 and kept[0][-1] not in ".:;!?":  # a headline
        kept[0] += ":"
    text = " ".join(kept[:4])[:600]
    if text.endswith(":") and ". " in text:  # what it announces has been left out
        text = text[: text.rindex(". ") + 1]
    return text
