"""What runs a group of cells: one of several forms, as the option ``form`` says or a measurement shows.

``batched``
    The group in one graph, its matrix products as batched products of the stacked weights; where the choice
    is measured, those products that are faster one by one run so.
``looped``
    The same graph, all matrix products one by one.
``single``
    The graph of one cell, once for each, writing rows of the stacked results: on the CPU a large cell fills
    the machine, and what it computes on the way stays in the cache.

All forms take the same operands and give the same results but for rounding, so that whoever runs groups need
not know which it is.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.fx as fx
from torch.utils._python_dispatch import _disable_current_modes

from diagpass.errors import BatchingError
from diagpass.ir import Kind
from diagpass.kernels.choose import Choice, choose, layout
from diagpass.lowering.accumulate import accumulate, cut
from diagpass.lowering.batch import batch_kind, device_of
from diagpass.lowering.gated import gate
from diagpass.lowering.inplace import Result, results_of, write_results
from diagpass.lowering.products import Product, products, with_loops
from diagpass.lowering.widths import width_of
from diagpass.options import Options
from diagpass.runtime.compiled import InductorKind, InductorWidths, compile_all

log = logging.getLogger(__name__)

FORM_BUDGET = 0.15  # seconds of timing for the forms of a group
PRODUCT_BUDGET = 0.02  # and for the ways of a product
MOST_BYTES = 2**28  # of a product's operands and result; larger ones stay batched
HOPELESS = 1.0  # times as long for its products one by one: more, and the single cell is not even compiled

__all__ = ["Forms", "GroupForm", "compile_ahead", "is_measured", "number_in_turn", "want"]


def is_measured(options: Options, device: torch.device) -> bool:
    """Whether forms are timed: where a compiled batched form is not always the fastest, or on request."""
    by_default = options.compiler == "inductor" and device.type == "cpu"
    return options.form == "measured" or (options.form == "auto" and by_default)


@dataclasses.dataclass(frozen=True)
class Traced:
    """A batched form as it was traced, and per result whether it is stacked."""

    graph: fx.GraphModule
    stacked: tuple[bool, ...]


class GroupForm(torch.nn.Module):
    """Runs groups of one kind and width; which form does it is settled at the first call.

    Attributes
    ----------
    kind, width
        The kind (as its owner numbers it) and the number of cells.
    choice
        What was chosen and the times, None before the first call.
    looped, count
        How many of the batched form's matrix products run one by one, and how many there are.
    """

    def __init__(self, kind: Hashable, width: int, name: str, device: torch.device) -> None:
        super().__init__()
        self.kind, self.width, self.name, self.device = kind, width, name, device
        self.choice: Choice | None = None
        self.looped = self.count = 0
        self.key: Hashable = None
        self.candidates: dict[str, Callable[..., Any]] = {}
        self._run: Callable[..., Any] | None = None

    def forward(self, *operands: Any) -> Any:
        """Run a group; operands and results as those of the batched form."""
        if self._run is None:
            self._settle(operands)
        run: Any = self._run
        return run(*operands)

    def _settle(self, operands: tuple) -> None:
        calls = {name: functools.partial(run, *operands) for name, run in self.candidates.items()}
        key = (self.key, tuple(map(layout, operands)))
        self.choice = choose(key, calls, self.device, f"{self.name}, {self.width} cells", FORM_BUDGET)
        self._run = self.candidates[self.choice.name]
        self.candidates = {}

    def facts(self, kind: int) -> dict[str, Any]:
        """What a report says about it."""
        assert self.choice is not None
        return {
            "kind": kind,
            "width": self.width,
            "form": self.choice.name,
            "products": self.count,
            "looped": self.looped if self.choice.name != "single" else 0,
            "seconds": dict(self.choice.seconds),
        }


class Forms:
    """Makes what runs groups, for one set of options.

    Attributes
    ----------
    made
        Everything for which there is something to say.
    """

    def __init__(self, options: Options) -> None:
        self.options = options
        self.made: list[GroupForm] = []
        self._singles: dict[Hashable, _Single | None] = {}
        self._commons: dict[fx.GraphModule, torch.nn.Module] = {}

    def serves_any_width(self, kind: Kind) -> bool:
        """Whether one form may run groups of any width: one that is chosen, or in pieces, is for one."""
        return self.options.form in ("auto", "batched") and not is_measured(self.options, device_of(kind))

    def group(
        self,
        kind: Kind,
        key: Hashable,
        width: int | None,
        shared: tuple[bool, ...],
        traced: Traced,
        name: str,
        given: bool = False,
        common: fx.GraphModule | None = None,
    ) -> torch.nn.Module:
        """What runs a group.

        Parameters
        ----------
        kind, key
            The kind, and what tells it from others.
        width, shared, traced
            The number of cells (None for any number, where :meth:`serves_any_width`), which operands they
            share, and the batched form.
        name
            What messages call it.
        given
            Whether the results, all stacked, are written to tensors given after the operands; else they are
            returned.
        common
            A graph for any width that is the same program at this one: compiled once, it serves all groups
            whose products all run batched.
        """
        device = device_of(kind)
        measured = is_measured(self.options, device)
        if width is None or width == 1:
            return self._compiled(traced.graph, name, given)
        if self.serves_any_width(kind):
            return self._batched(traced, kind, common, name, given)
        form = GroupForm(key, width, name, device)
        found = products(traced.graph)
        form.count = len(found)
        alone = self.options.form == "single"
        looped = [each.node for each in found] if self.options.form == "looped" else []
        if measured:
            choices = [_measured(each) for each in found]
            looped = [each.node for each, ways in zip(found, choices, strict=True) if ways.name == "looped"]
            alone = _sum(choices, "looped") <= HOPELESS * _sum(choices, "batched")
        form.looped = len(looped)
        single = self._single(kind, key, traced) if alone else None
        if single is None or measured:
            whole = "looped" if self.options.form == "looped" else "batched"
            if looped:
                form.candidates[whole] = self._compiled(with_loops(traced.graph, looped), name, given)
            else:
                form.candidates[whole] = self._batched(traced, kind, common, name, given)
        if single is not None:
            form.candidates["single"] = _OneByOne(single, shared, width, given)
        form.key = (traced.graph.code, shared, len(looped), self.options.compiler, given)
        self.made.append(form)
        return form

    def _batched(
        self, traced: Traced, kind: Kind, common: fx.GraphModule | None, name: str, given: bool
    ) -> torch.nn.Module:
        """The batched form, shared with groups of other widths where there is a graph for all of them."""
        if common is None or self.options.compiler != "inductor":
            return self._compiled(traced.graph, name, given)
        if common not in self._commons:
            self._commons[common] = self._compiled(common, f"kind{kind.index}_any_width", given)
        return self._commons[common]

    def _single(self, kind: Kind, key: Hashable, traced: Traced) -> _Single | None:
        """The graph of one cell, which writes its results; None if the kind has none."""
        if not all(traced.stacked):
            return None
        if key not in self._singles:
            self._singles[key] = None
            numbers = tuple(slot.literal for slot in kind.slots)
            try:
                graph, stacked = batch_kind(kind, 1, [not is_number for is_number in numbers])
            except BatchingError as error:
                log.debug("kind %d has no form for a single cell: %s", kind.index, error)
                return None
            results = results_of(graph)
            graph = with_loops(graph, [each.node for each in products(graph)])
            run = self._wrap(write_results(graph), f"kind{kind.index}_single")
            self._singles[key] = _Single(run, numbers, stacked, results)
        return self._singles[key]

    def _compiled(self, graph: fx.GraphModule, name: str, given: bool) -> torch.nn.Module:
        """A form to run; where it is given memory for its results, products accumulate there.

        Gated products are one operation where that is measured to be faster, so not in a form that is pinned.
        """
        if self.options.compiler == "inductor" and self.options.form in ("auto", "measured"):
            graph = gate(graph)
        written = write_results(graph) if given else graph
        whole = accumulate(written) if given else graph
        if whole is written or self.options.compiler != "inductor":
            return self._wrap(whole, name)
        pieces = cut(whole)
        for place, piece in list(pieces.named_children()):
            setattr(pieces, place, self._wrap(piece, f"{name}_{place}"))  # type: ignore[arg-type]
        return pieces

    def _wrap(self, graph: fx.GraphModule, name: str) -> torch.nn.Module:
        if self.options.compiler != "inductor":
            return graph
        return InductorKind(graph, name) if width_of(graph) is None else InductorWidths(graph, name)

    def facts(self, number: Callable[[Any], int]) -> list[dict[str, Any]]:
        """What a report says about the forms that were settled; ``number`` gives a kind's place in it."""
        settled = [form.facts(number(form.kind)) for form in self.made if form.choice is not None]
        return sorted(settled, key=lambda fact: (fact["kind"], fact["width"]))


def number_in_turn(modules: Iterable[torch.nn.Module]) -> None:
    """Let the graphs that are to be compiled know how many they are, for whoever watches."""
    found = dict.fromkeys(graph for module in modules for graph, _ in _graphs_of(module))
    for at, graph in enumerate(found):
        graph.place = at, len(found)


def _graphs_of(run: Any) -> Iterator[tuple[InductorKind, bool]]:
    """The graphs that something which runs groups has compiled, and whether each takes what the group takes.

    One whose form is chosen has them no more.
    """
    for form in list(run.candidates.values()) if isinstance(run, GroupForm) else [run]:
        alone = isinstance(form, _OneByOne)
        graph = form.single.run if alone else form
        graph = graph.common if isinstance(graph, InductorWidths) else graph
        if isinstance(graph, InductorKind):
            yield graph, not alone


def compile_ahead(module: fx.GraphModule, inputs: Sequence[Any]) -> None:
    """Have the graphs compiled that a program calls, one while the next is lowered.

    All are there when it returns: forms are timed when they first run, with nothing beside them.

    Parameters
    ----------
    module
        The program.
    inputs
        Its inputs: what a graph reads of them is known, anything else is expected to be laid out as it was
        when the graph was traced.
    """
    known: dict[fx.Node, Any] = dict(zip(module.graph.find_nodes(op="placeholder"), inputs, strict=True))
    wanted: dict[InductorKind, Sequence[Any]] = {}
    for node in module.graph.nodes:
        source = node.args[0] if node.args else None
        if node.target is torch.ops.aten.slice.Tensor and source in known:
            known[node] = node.target(known[source], *node.args[1:])
        elif node.op == "call_module":
            want(module.get_submodule(node.target), [known.get(operand) for operand in node.args], wanted)
    compile_all(wanted)


def want(run: Any, known: Sequence[Any], wanted: dict[InductorKind, Sequence[Any]]) -> None:
    """Add the graphs of something that runs groups to those that are to be compiled."""
    for graph, is_whole in _graphs_of(run):
        wanted.setdefault(graph, known if is_whole else [None] * graph.operands)


@dataclasses.dataclass(frozen=True)
class _Single:
    """What runs one cell: takes its operands, then memory for each result.

    A number that differs from cell to cell, and a result that depends on one, has an axis of length 1 first.
    """

    run: Callable[..., Any]
    numbers: tuple[bool, ...]
    stacked: tuple[bool, ...]
    results: tuple[Result, ...]


class _OneByOne(torch.nn.Module):
    """A group's cells one after the other; ``given``: the results' memory comes after the operands."""

    def __init__(self, single: _Single, shared: Sequence[bool], width: int, given: bool) -> None:
        super().__init__()
        self.single, self.shared, self.width, self.given = single, shared, width, given

    def forward(self, *operands: Any) -> tuple:
        single, count = self.single, len(self.shared)
        targets = operands[count:] if self.given else self._empty()
        columns = [
            [operand] * self.width if same else _rows(operand, is_number)
            for operand, same, is_number in zip(operands[:count], self.shared, single.numbers, strict=True)
        ]
        columns += [_rows(target, axis) for target, axis in zip(targets, single.stacked, strict=True)]
        for row in zip(*columns, strict=True):
            single.run(*row)
        return () if self.given else tuple(targets)

    def _empty(self) -> list[torch.Tensor]:
        return [
            torch.empty((self.width, *shape[axis:]), dtype=dtype, device=device)
            for (shape, dtype, device), axis in zip(self.single.results, self.single.stacked, strict=True)
        ]


def _rows(stacked: torch.Tensor, axis: bool) -> Sequence[torch.Tensor]:
    """The rows of a stack, with an axis of length 1 in front if ``axis``."""
    return stacked.split(1) if axis else stacked.unbind(0)


def _sum(choices: Sequence[Choice], way: str) -> float:
    return sum(choice.seconds[way] for choice in choices)


def _measured(product: Product) -> Choice:
    """The faster way of a product; a very large one is not timed, since operands are made up for it."""
    values = (*product.operands, product.node.meta["val"])
    if sum(value.numel() * value.element_size() for value in values) > MOST_BYTES:
        return Choice("batched", {"batched": 0.0, "looped": 0.0})
    described = tuple((tuple(value.shape), value.stride(), value.dtype, value.device) for value in values)
    scale = tuple(sorted(product.node.kwargs.items()))
    with _disable_current_modes():
        return choose(
            (str(product.node.target), described, scale),
            product.ways(),
            values[-1].device,
            f"{product.node.target} {' x '.join(str(tuple(v.shape)) for v in product.operands)}",
            PRODUCT_BUDGET,
        )
