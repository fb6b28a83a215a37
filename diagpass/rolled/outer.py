"""A model's own loop, run as it stands while its step is deferred.

The Python around the step runs under :class:`Outer`, a pair of modes that see every operation. One that
reads no *token* (a tensor without contents yet) simply runs. One that does is

* run, if it makes a view: a view of a token has its contents as soon as the token has;
* *deferred*, if it is an ATen operation that only computes new tensors: these are tokens too;
* a *rewrite*, if it writes in place into a token: that stands for another value from then on, and what has
  read it before keeps the value from before;
* *written later*, if it writes a token's values into memory that no step has to do with;
* *forced* otherwise: all that was recorded is run, the tokens get their contents, then it runs. So is what
  reaches a tensor's memory without an operation (NumPy, text, numbers in a list).

What the step has been given must not be written afterwards: a step that waits would read the new values. Such
a write is a :class:`~diagpass.rolled.run.Conflict`, and the call runs sequentially.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode, _get_current_function_mode
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from diagpass.rolled.kinds import Kinds
from diagpass.rolled.program import StepProgram
from diagpass.rolled.run import Conflict, NotAWeight, Run, _fill, as_captured
from diagpass.rolled.values import Box, derived
from diagpass.rolled.writes import is_foreign, memory, writes_weights, written_by

__all__ = ["Outer", "OuterRun"]

_OWN = tuple(os.path.dirname(module.__file__ or "") for module in (torch, sys.modules["diagpass"]))
_FORCING = {
    torch.Tag.nondeterministic_seeded,
    torch.Tag.data_dependent_output,
    torch.Tag.dynamic_output_shape,
}
_RAW = frozenset(
    (
        "__repr__",
        "__format__",
        "__float__",
        "__int__",
        "__index__",
        "__complex__",
        "tensor",
        "as_tensor",
        "asarray",
        "new_tensor",
        "new",
        "nested_tensor",
        "numpy",
        "tolist",
        "data_ptr",
        "untyped_storage",
        "storage",
        "_typed_storage",
        "is_set_to",
        "share_memory_",
        "__array__",
        "__dlpack__",
        "__deepcopy__",
        "__reduce_ex__",
        "__cuda_array_interface__",
    )
)  # reach a tensor's memory without an operation, or may do so for one in a list
_RAW_WRITES = frozenset(("apply_", "map_", "map2_"))  # write to it, element by element in Python
_INDEXING = frozenset(("__getitem__", "__setitem__"))


class OuterRun(Run):
    """A run whose tokens may be viewed, and read by deferred operations, between two steps."""

    def __init__(self, kinds: Kinds, max_width: int | None = None) -> None:
        super().__init__(kinds, max_width)
        self.seen: dict[int, torch.Tensor] = {}  # what steps were given
        self.before_step: Callable[[Sequence[Any]], None] = lambda args: None
        self._made: dict[int, weakref.ref] = {}  # token by its memory

    def step(self, program: StepProgram, args: Sequence[Any]) -> list[Any]:
        """Record one segment; see :meth:`Run.step`."""
        self.before_step(args)
        made = [
            name
            for name, is_weight, value in zip(program.step.names, program.step.weights, args, strict=True)
            if is_weight and id(value) in self._tokens
        ]
        if made:  # all at once: each time is a capture
            raise NotAWeight(made)
        self.seen.update((id(value), value) for value in args if isinstance(value, torch.Tensor))
        return super().step(program, args)

    def token_of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The token whose memory a tensor uses, with or without contents by now."""
        found = self._made.get(memory(tensor))
        return None if found is None else found()

    def waiting(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The token without contents whose memory a tensor uses, or None."""
        token = self.token_of(tensor)
        return token if token is not None and self._box(token) is not None else None

    def shares(self, token: torch.Tensor) -> bool:
        """Whether what the token stands for shares memory with something else."""
        return id(token) in self._families

    def settle(self) -> None:
        """Run all that is recorded, give all tokens their contents and write what steps write in place."""
        self.drain()
        self._floor = max(self._floor, self._done + 1)
        filled = self.put()
        for tensor in filled:
            if id(tensor) in self._tokens:
                self.touch(tensor)

    def writes(self, tensor: torch.Tensor) -> bool:
        """Whether a step writes this memory in place, at the end of the call."""
        return bool(self._written) and tensor.untyped_storage().data_ptr() in self._written

    def touch(self, token: torch.Tensor) -> None:
        """Say that the token was read between two steps: no later step may write it in place."""
        self._handed_out[id(token)] = self._watch(token)

    def token(self, like: torch.Tensor, box: Box) -> torch.Tensor:
        """A new token for ``box``."""
        made = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype, device=like.device)
        self._set(made, box)
        self._tokens.add(id(made))
        return made

    def has_own_memory(self, value: Any) -> bool:
        """Whether no tensor of ``value`` is one that the step has written in place."""
        return not any(id(leaf) in self._rewritten for leaf in tree_leaves(value))

    def view(self, token: torch.Tensor, tensor: torch.Tensor) -> Box:
        """A box for a tensor that is a view of a token."""
        box = self._box(token)
        assert box is not None
        size, stride = tuple(token.shape), token.stride()
        return derived(
            _view, box, size, stride, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
        )

    def rewrite(self, token: torch.Tensor, box: Box) -> None:
        """Give a token that has no contents yet another value."""
        self._write(token, box)
        self.wait_for(token, [(token, box)])

    def force(self, tokens: Sequence[torch.Tensor]) -> None:
        """Run all that is recorded and give these tokens their contents."""
        self.drain()
        self._floor = max(self._floor, self._done + 1)
        for token in tokens:
            box = self._box(token)
            if box is not None:
                _fill(token, box.tensor())
                del self._pending[id(token)]
                self.touch(token)

    def _box(self, token: torch.Tensor) -> Box | None:
        found = self._pending.get(id(token))
        return found[1] if found is not None and found[0]() is token else None

    def _set(self, tensor: torch.Tensor, box: Box) -> None:
        super()._set(tensor, box)
        key = memory(tensor)

        def gone(reference: weakref.ref) -> None:
            if self._made.get(key) is reference:
                del self._made[key]

        self._made[key] = weakref.ref(tensor, gone)

    def value_of(self, value: torch.Tensor) -> Box:
        """The box of a tensor that a segment reads; it may be a view of a token."""
        token = self.waiting(value)
        if token is not None and token is not value:
            self.touch(token)
            return self.view(token, value)
        found = super().value_of(value)
        return Box(value.clone()) if found.is_plain and is_foreign(value) else found


class Outer:
    """The modes under which the Python around the step runs.

    Attributes
    ----------
    run
        Where steps are recorded.
    forced
        How often a result had to be known before the end.
    line
        Where that was last, or None.
    failed
        The conflict that ended the deferral, kept because user code may swallow exceptions.
    """

    def __init__(self, run: OuterRun, model: torch.nn.Module) -> None:
        self.run, self.model = run, model
        self.forced = 0
        self.line: str | None = None
        self.failed: Exception | None = None
        self._late: dict[int, torch.Tensor] = {}  # memory that is written later
        self._writes: list[tuple[Any, tuple, dict, bool]] = []
        self._read: dict[int, torch.Tensor] = {}  # what deferred operations will read
        self._held: dict[int, torch.Tensor] = {}  # tokens that views are made of
        self._fake = FakeTensorMode()
        self._modes = (_Functions(self), _Operations(self))
        run.before_step = self._before_step

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Run the code inside under the modes."""
        with self._modes[0], self._modes[1]:
            yield

    @contextlib.contextmanager
    def suspended(self) -> Iterator[None]:
        """Run the code inside without them."""
        functions = _get_current_function_mode()
        operations = _get_current_dispatch_mode()
        if functions is not self._modes[0] or operations is not self._modes[1]:
            self.fail("the model calls its step under a mode or in a thread of its own")
        self._modes[1].__exit__(None, None, None)
        self._modes[0].__exit__(None, None, None)
        try:
            yield
        finally:
            self._modes[0].__enter__()
            self._modes[1].__enter__()

    def fail(self, reason: str) -> Any:
        """End the deferral.

        Raises
        ------
        Conflict
            Always.
        """
        line = _line()
        self.failed = Conflict(reason + (f" ({line})" if line else ""))
        raise self.failed

    def end(self) -> None:
        """Fill everything; the model's forward has returned."""
        self.run.force(list(self._held.values()))
        self._write_all()
        self.run.finish()

    def force(self, tensors: Sequence[torch.Tensor]) -> None:
        """Make the contents of tensors known."""
        self.forced += 1
        self.line = _line()
        tokens = [token for tensor in tensors if (token := self.run.waiting(tensor)) is not None]
        tokens += [t for _, args, kwargs, _ in self._writes for t in self._tokens((args, kwargs))]
        self.run.force(tokens)
        self._write_all()
        self._read.clear()

    def settle(self) -> None:
        """Make all contents known, and write what steps write in place, as if the call ended here."""
        self.forced += 1
        self.line = _line()
        self.run.settle()
        self._write_all()
        self._read.clear()

    def know_all(self) -> None:
        """Make all contents known: functions are about to run that may read any of them."""
        if self.failed is not None:
            raise self.failed
        if self.run.segments:
            self.settle()

    def operation(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """One operation of the Python around the step."""
        if self.failed is not None:
            raise self.failed
        tensors = _tensors((args, kwargs))
        mutates = bool(written_by(func, args, kwargs))
        if mutates and writes_weights(self.model, func, args, kwargs):
            self.fail("the model writes in place into its own weights")
        if not self.run.segments:
            return func(*args, **kwargs)
        if any(self.run.writes(tensor) for tensor in tensors):
            self.settle()
        if mutates:
            return self._mutation(func, args, kwargs, tensors)
        tokens = self._tokens((args, kwargs))
        late = any(memory(tensor) in self._late for tensor in tensors)
        if not tokens and not late:
            return func(*args, **kwargs)
        if any(value.alias_info is not None for value in func._schema.returns):
            return self._viewing(func, args, kwargs, tensors, tokens)
        if not late and func.namespace in ("aten", "prims") and not _FORCING.intersection(func.tags):
            made = self._deferred(func, args, kwargs, tokens)
            if made is not None:
                return made
        self.force(tensors)
        return func(*args, **kwargs)

    def raw(self, values: Any) -> None:
        """Memory is about to be reached without an operation."""
        if self.failed is not None:
            raise self.failed
        tensors = _tensors(values)
        written = any(self.run.writes(tensor) for tensor in tensors)
        if written or self._tokens(values) or any(memory(tensor) in self._late for tensor in tensors):
            if _get_current_dispatch_mode() is not self._modes[1]:
                self.fail("the model reads a result of its step under a mode of its own")
            self._modes[1].__exit__(None, None, None)  # only that of functions is off at present
            try:
                self.settle() if written else self.force(tensors)
            finally:
                self._modes[1].__enter__()

    def _tokens(self, values: Any) -> list[torch.Tensor]:
        found = (self.run.waiting(tensor) for tensor in _tensors(values))
        return [token for token in found if token is not None]

    def _viewing(
        self, func: Any, args: tuple, kwargs: dict, tensors: list[torch.Tensor], tokens: list[torch.Tensor]
    ) -> Any:
        if any(0 in token.stride() for token in tokens):
            self.force(tensors)
            return func(*args, **kwargs)
        result = func(*args, **kwargs)
        known = {memory(tensor): tensor for tensor in tensors}
        if not all(_is_plain_view(leaf, known.get(memory(leaf))) for leaf in _tensors(result)):
            self.force(tensors)
            return func(*args, **kwargs)
        self._hold(tokens)
        return result

    def _hold(self, tokens: Sequence[torch.Tensor]) -> None:
        for token in tokens:
            self._held[id(token)] = token
            self.run.touch(token)

    def _deferred(self, func: Any, args: tuple, kwargs: dict, tokens: list[torch.Tensor]) -> Any:
        """Tokens for the operation's results, or None if they cannot be foretold."""
        leaves, spec = tree_flatten((args, kwargs))
        if any(type(leaf) not in (torch.Tensor, torch.nn.Parameter) for leaf in _tensors(leaves)):
            return None
        try:
            with as_captured():
                fakes = [
                    self._fake.from_tensor(leaf.detach(), static_shapes=True)
                    if isinstance(leaf, torch.Tensor)
                    else leaf
                    for leaf in leaves
                ]
                fake_args, fake_kwargs = tree_unflatten(fakes, spec)
                with self._fake:
                    foretold = func(*fake_args, **fake_kwargs)
        except Exception:  # what the operation has to say, it will say when it runs
            return None
        outputs, output_spec = tree_flatten(foretold)
        if not outputs or not all(isinstance(value, torch.Tensor) for value in outputs):
            return None
        if any(value.layout is not torch.strided for value in outputs):
            return None
        made = derived(_later, func, spec, *self._operands(leaves, tokens))
        results = [
            self.run.token(value, derived(operator.getitem, made, at)) for at, value in enumerate(outputs)
        ]
        self.run.outputs(results)
        return tree_unflatten(results, output_spec)

    def _operands(self, leaves: Sequence[Any], tokens: Sequence[torch.Tensor]) -> list[Any]:
        """What a deferred operation reads: boxes for tokens and their views, the rest as it is.

        Memory that others than PyTorch may write, such as NumPy, is copied.
        """
        operands: list[Any] = []
        for leaf in leaves:
            token = self.run.waiting(leaf) if isinstance(leaf, torch.Tensor) else None
            if token is not None:
                operands.append(self.run.view(token, leaf))
            elif isinstance(leaf, torch.Tensor) and is_foreign(leaf):
                operands.append(leaf.clone())
            else:
                operands.append(leaf)
                if isinstance(leaf, torch.Tensor):
                    self._read[id(leaf)] = leaf
        for token in tokens:
            self.run.touch(token)
        return operands

    def _mutation(self, func: Any, args: tuple, kwargs: dict, tensors: list[torch.Tensor]) -> Any:
        written = written_by(func, args, kwargs)
        memories = {memory(tensor) for tensor in written}
        made = [token for tensor in written if (token := self.run.token_of(tensor)) is not None]
        if any(self.run.shares(token) for token in made):
            self.fail("the model writes in place into a result of its step that shares memory with another")
        simple = len(written) == 1 and written[0] is next(iter(args), None) and _is_simple(func)
        if any(self.run.waiting(token) is not None for token in made):
            late = any(memory(tensor) in self._late for tensor in tensors)
            late = late or any(memory(tensor) in memories for tensor in self._read.values())
            if simple and not late and _writes_first(func) and self._rewrite(func, args, kwargs, made[0]):
                return args[0]
            self.force(tensors)
        if any(memory(tensor) in memories for tensor in self.run.seen.values()):
            self.fail("the model writes in place into what its step was given, an input or state of it")
        if any(memory(tensor) in memories for tensor in self._read.values()):
            self.force(tensors)
        tokens = self._tokens((args, kwargs))
        if not tokens and not any(memory(tensor) in self._late for tensor in tensors):
            return func(*args, **kwargs)
        if simple and not is_foreign(written[0]):
            self._hold(tokens)
            self._late[memory(written[0])] = written[0]
            self._read.update((id(t), t) for t in tensors if memory(t) not in memories)
            args, kwargs = tree_map(functools.partial(self._kept, memories), (args, kwargs))
            self._writes.append((func, args, kwargs, torch.is_inference_mode_enabled()))
            return args[0]
        self.force(tensors)
        return func(*args, **kwargs)

    def _kept(self, memories: set[int], leaf: Any) -> Any:
        """An operand of a write that is kept for later."""
        foreign = isinstance(leaf, torch.Tensor) and memory(leaf) not in memories and is_foreign(leaf)
        return leaf.clone() if foreign else leaf

    def _rewrite(self, func: Any, args: tuple, kwargs: dict, token: torch.Tensor) -> bool:
        """Give a token that is written before it has contents another value; False if that cannot be done.

        What has read it so far keeps the value from before.
        """
        leaves, spec = tree_flatten((args, kwargs))
        target = args[0]
        if type(target) is not torch.Tensor or 0 in token.stride() or target.requires_grad:
            return False
        if any(type(leaf) not in (torch.Tensor, torch.nn.Parameter) for leaf in _tensors(leaves)):
            return False
        before = self.run.view(token, token)
        place = tuple(target.shape), target.stride(), target.storage_offset()
        operands = self._operands(leaves[1:], self._tokens(leaves[1:]))
        self.run.rewrite(token, derived(_rewritten, func, before, token.stride(), place, spec, *operands))
        return True

    def _before_step(self, args: Sequence[Any]) -> None:
        if self._late and any(memory(tensor) in self._late for tensor in _tensors(args)):
            self.force([])

    def _write_all(self) -> None:
        writes, self._writes = self._writes, []
        self._late.clear()
        with as_captured():
            for func, args, kwargs, inference in writes:
                with torch.inference_mode(inference):
                    func(*args, **kwargs)


def _later(func: Any, spec: Any, *values: Any) -> list[Any]:
    """A deferred operation: runs when the first of its results is read."""
    args, kwargs = tree_unflatten(values, spec)
    with as_captured():
        return tree_leaves(func(*args, **kwargs))


class _Operations(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, outer: Outer) -> None:
        super().__init__()
        self.outer = outer

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):  # such as cond
            with torch._C.DisableTorchFunction():
                self.outer.know_all()
            return func(*args, **kwargs)
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # under inference mode composite operations arrive whole
                made = func.decompose(*args, **kwargs)
            if made is not NotImplemented:
                return made
        with torch._C.DisableTorchFunction():
            return self.outer.operation(func, args, kwargs)


class _Functions(TorchFunctionMode):
    def __init__(self, outer: Outer) -> None:
        super().__init__()
        self.outer = outer

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if not self.outer.run.segments:
            return func(*args, **kwargs)
        if name in _RAW or "sparse_" in name:
            with torch._C.DisableTorchFunction():
                self.outer.raw((args, kwargs))
        elif name in _INDEXING and any(isinstance(index, list) for index in _indices(args[1])):
            with torch._C.DisableTorchFunction():
                self.outer.raw(args[1])
        elif name in _RAW_WRITES:
            self.outer.fail(f"the model writes into a tensor by {name} between two steps")
        elif name == "__set__" and func == torch.Tensor.data.__set__:  # type: ignore[attr-defined]
            self.outer.fail("the model replaces the contents of a tensor (.data) between two steps")
        return func(*args, **kwargs)


_RESIZING = {
    torch.ops.aten.resize_.default,
    torch.ops.aten.set_.source_Tensor,
    torch.ops.aten.set_.default,
    torch.ops.aten.t_.default,
    torch.ops.aten.transpose_.default,
    torch.ops.aten.squeeze_.default,
    torch.ops.aten.unsqueeze_.default,
    torch.ops.aten.as_strided_.default,
}


@functools.cache
def _is_simple(func: Any) -> bool:
    """Whether an operation that writes does no more than compute new values, and returns what it writes."""
    aten = func.namespace == "aten" and func not in _RESIZING
    return aten and len(func._schema.returns) == 1 and not _FORCING.intersection(func.tags)


@functools.cache
def _writes_first(func: Any) -> bool:
    """Whether an operation writes its first argument, and no other such as ``out``."""
    first, *others = func._schema.arguments
    return first.alias_info is not None and all(other.alias_info is None for other in others)


def _indices(index: Any) -> tuple:
    return index if isinstance(index, tuple) else (index,)


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]


def _is_plain_view(tensor: torch.Tensor, base: torch.Tensor | None) -> bool:
    """Whether a tensor differs from its base by shape, strides and offset alone; None: it is a copy."""
    same = base is not None and tensor.dtype == base.dtype
    return same and not tensor.is_conj() and not tensor.is_neg()


def _view(value: Any, size: tuple, stride: tuple, shape: tuple, steps: tuple, offset: int) -> torch.Tensor:
    """A view of a token, of the token's value: first in the token's own strides."""
    if value.stride() != stride:
        value = torch.empty_strided(size, stride, dtype=value.dtype, device=value.device).copy_(value)
    return value.as_strided(shape, steps, value.storage_offset() + offset)


def _rewritten(
    func: Any, value: torch.Tensor, stride: tuple, place: tuple, spec: Any, *operands: Any
) -> torch.Tensor:
    """A token's value after an operation has written to a view of it."""
    made = torch.empty_strided(value.shape, stride, dtype=value.dtype, device=value.device).copy_(value)
    args, kwargs = tree_unflatten([made.as_strided(*place), *operands], spec)
    with as_captured():
        func(*args, **kwargs)
    return made


def _line() -> str | None:
    """The line of user code that is running."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_OWN) and "site-packages" not in name and not name.startswith("<"):
            if os.path.basename(name) not in ("contextlib.py", "_pytree.py"):
                return f"{name}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return None
