"""Cells -> dependencies between cells, glue put where it belongs.

In: a proposal. Out: who owns which node, and a networkx graph over cell numbers with an edge i -> j
where cell j reads a value of cell i, directly or through glue. Dependencies are those of functional
dataflow; coordinates (layer, segment) play no part in them.

*Glue* between cells (a residual sum, a slice of the memory) joins the cell that produces it, so that
it is batched with it. Glue before the first cell (embedding, masks) and after the last one (norm,
head) stays outside.
"""

from __future__ import annotations

import operator

import networkx as nx
import torch
import torch.fx as fx

from diagpass.analysis.cells import Proposal, contract, is_operation, same_arguments
from diagpass.analysis.complete import complete
from diagpass.capture.marks import Call, all_calls

Owner = dict[fx.Node, int]
aten = torch.ops.aten

_ABSOLUTE = (aten.as_strided.default, aten.as_strided_scatter.default)
_SELECTIONS = (aten.select.int, aten.slice.Tensor, aten.unbind.int, operator.getitem)


def assign(graph: fx.Graph, proposal: Proposal, absorb: bool = True) -> tuple[Owner, list[Call]]:
    """Number the proposal's calls, close them and give them the glue between them.

    Parameters
    ----------
    graph
        The functional graph; equal glue is merged in place.
    proposal
        Which call each node belongs to.
    absorb
        Whether glue between cells joins the cell that produces it. Where it differs from layer to layer
        (skip connections), joining it would make every layer a kind of its own.

    Returns
    -------
    tuple
        The owner map, and per cell number the call that it came from.
    """
    calls = list(dict.fromkeys(proposal[node] for node in graph.nodes if node in proposal))
    numbers = {call: number for number, call in enumerate(calls)}
    owner: Owner = {
        node: numbers[proposal[node]] for node in graph.nodes if node in proposal and is_operation(node)
    }
    _hoist(graph, owner, calls)
    _peel(graph, owner, calls)
    owner = contract(graph, owner)
    owner, calls = join_siblings(graph, owner, calls)
    _adopt_constants(graph, owner)
    core = dict(owner)
    if absorb:
        _absorb(graph, owner)
        _absorb_alike(graph, core, owner)
        owner = contract(graph, owner)
    _adopt_items(graph, owner)
    _gather_glue(graph, owner)
    owner, calls = _renumber(graph, owner, calls)
    complete(graph, owner, calls)
    return owner, calls


def dependencies(graph: fx.Graph, owner: Owner) -> nx.DiGraph:
    """The graph over cell numbers: an edge i -> j where cell j reads a value of cell i."""
    dag = nx.DiGraph()
    dag.add_nodes_from(sorted(set(owner.values())))
    feeding: dict[fx.Node, set[int]] = {}
    for node in graph.nodes:
        sources: set[int] = set()
        for argument in node.all_input_nodes:
            there = owner.get(argument)
            sources |= feeding[argument] if there is None else {there}
        here = owner.get(node)
        if here is None:
            feeding[node] = sources
        else:
            dag.add_edges_from((there, here) for there in sorted(sources) if there != here)
    return dag


def levels(dag: nx.DiGraph) -> int:
    """The number of waves that the dependencies need: the longest path, in cells."""
    return nx.dag_longest_path_length(dag, default_weight=1, weight="") + 1 if len(dag) else 0


def _hoist(graph: fx.Graph, owner: Owner, calls: list[Call]) -> None:
    """What a cell need not own becomes glue.

    Reads such as ``state[l]`` from a tensor that several layers share: inside a cell the literal index
    would make every layer a kind of its own. Constants (``zeros``): inside, the first segment, which
    makes its state, would be a kind of its own. Reads of the model's memory by absolute strides.
    """
    readers: dict[fx.Node, set[str]] = {}
    for node, cell in owner.items():
        for source in node.all_input_nodes:
            if source not in owner:
                readers.setdefault(source, set()).add(calls[cell].path)
    hoisted: set[fx.Node] = set()
    for node in graph.nodes:
        if node not in owner:
            continue
        if not node.all_input_nodes:  # zeros, arange: the same for every cell
            hoisted.add(node)
            del owner[node]
        elif node.target in _ABSOLUTE:
            if node.args[0] not in owner or node.target is aten.as_strided_scatter.default:
                del owner[node]
        elif node.target in _SELECTIONS:
            source = node.args[0]
            if source in hoisted or (source not in owner and len(readers.get(source, ())) > 1):
                hoisted.add(node)
                del owner[node]


def _peel(graph: fx.Graph, owner: Owner, calls: list[Call]) -> None:
    """What one module begins with and most of its siblings lack becomes glue, where no cell comes before it.

    A norm of the embedding inside the first block would make that block a kind of its own.
    """
    stacks = all_calls(graph)
    inner: dict[fx.Node, tuple] = {}
    members: dict[tuple, set[str]] = {}
    for node, cell in owner.items():
        call, stack = calls[cell], stacks[node]
        within = stack[stack.index(call) + 1 :] if call in stack else ()
        inner[node] = (call.family, within[0].path.removeprefix(call.path) if within else "")
        for key in (call.family, inner[node]):
            members.setdefault(key, set()).add(call.path)
    behind: set[fx.Node] = set()  # nodes with a cell before them
    for node in graph.nodes:
        after = any(source in behind for source in node.all_input_nodes)
        if node in owner and not after:
            family, _ = inner[node]
            if 2 * len(members[inner[node]]) < len(members[family]):
                del owner[node]
                continue
        if node in owner or after:
            behind.add(node)


def _gather_glue(graph: fx.Graph, owner: Owner) -> None:
    """Glue that no cell has a part in goes before all cells, and equal glue is computed once.

    Masks, rotary tables and initial states are the same for every segment: cells that read one value
    need no stacking.
    """
    first: dict[tuple, fx.Node] = {}
    behind_cell: set[fx.Node] = set()
    start = next((node for node in graph.nodes if node in owner), None)
    for node in list(graph.nodes):
        if node in owner or any(source in behind_cell for source in node.all_input_nodes):
            behind_cell.add(node)
            continue
        if node.op not in ("call_function", "get_attr"):
            continue
        key = (node.op, node.target, repr(node.args), repr(sorted(node.kwargs.items())))
        same = first.setdefault(key, node)
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
        elif start is not None:
            start.prepend(node)


def _adopt_constants(graph: fx.Graph, owner: Owner) -> None:
    """Glue that only prepares weights for one cell (a transpose, a cast) joins that cell."""
    for node in reversed(graph.nodes):
        if node in owner or not is_operation(node) or not node.users:
            continue
        if not node.all_input_nodes or any(s.op != "placeholder" for s in node.all_input_nodes):
            continue
        if any(s.meta.get("segment_input") for s in node.all_input_nodes):  # the embedding of the tokens
            continue
        if node.target in _SELECTIONS:
            continue
        users = {owner.get(user) for user in node.users}
        if len(users) == 1 and None not in users:
            owner[node] = users.pop()  # type: ignore[assignment]


def _adopt_items(graph: fx.Graph, owner: Owner) -> None:
    """The items of an operation with several results are where it is: only tensors leave a cell.

    Indices that ``sort`` gives beside the values that go on, or what a norm saves for the backward pass, lead
    to no other cell and would be left outside.
    """
    for node in graph.nodes:
        if node.target is operator.getitem and node not in owner and node.args[0] in owner:
            owner[node] = owner[node.args[0]]


def _ancestors(graph: fx.Graph, owner: Owner) -> tuple[dict[fx.Node, int], dict[int, int]]:
    """Per glue node, and per cell, the cells that it depends on, as bit sets."""
    dag = dependencies(graph, owner)
    of_cell: dict[int, int] = {}
    for cell in nx.topological_sort(dag):
        bits = 0
        for before in dag.predecessors(cell):
            bits |= of_cell[before] | (1 << before)
        of_cell[cell] = bits
    of_node: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node in owner:
            continue
        of_node[node] = _behind(node, owner, of_node, of_cell)
    return of_node, of_cell


def _behind(node: fx.Node, owner: Owner, of_node: dict[fx.Node, int], of_cell: dict[int, int]) -> int:
    bits = 0
    for source in node.all_input_nodes:
        cell = owner.get(source)
        bits |= of_node.get(source, 0) if cell is None else of_cell[cell] | (1 << cell)
    return bits


def _producer(node: fx.Node, owner: Owner, behind: int, of_cell: dict[int, int]) -> int | None:
    """The cell that ``node`` may join: it feeds the node and all else behind the node is behind it."""
    for source in node.all_input_nodes:
        cell = owner.get(source)
        if cell is not None and behind & ~(of_cell[cell] | (1 << cell)) == 0:
            return cell
    return None


def _absorb(graph: fx.Graph, owner: Owner) -> None:
    """Glue that lies between cells joins the cell that produces it."""
    leads_on: set[fx.Node] = set()  # glue with a cell after it
    for node in reversed(graph.nodes):
        if node not in owner and any(user in owner or user in leads_on for user in node.users):
            leads_on.add(node)
    of_node, of_cell = _ancestors(graph, owner)
    for node in graph.nodes:
        if node in owner or node not in leads_on or not is_operation(node):
            continue
        behind = _behind(node, owner, of_node, of_cell)
        cell = _producer(node, owner, behind, of_cell)
        if cell is None:
            of_node[node] = behind
        else:
            owner[node] = cell


def _absorb_alike(graph: fx.Graph, core: Owner, owner: Owner) -> None:
    """Where most cells of one code absorbed the same glue, the others do so too where it exists.

    The last layer's residual sum leads to no further cell and would be left outside, so that the last
    layer would be a kind of its own.
    """
    position = {node: at for at, node in enumerate(graph.nodes)}
    inner: dict[int, list[fx.Node]] = {}
    extra: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        if node in core:
            inner.setdefault(core[node], []).append(node)
        elif node in owner:
            extra.setdefault(owner[node], []).append(node)
    if not extra:
        return
    of_node, of_cell = _ancestors(graph, owner)
    alike: dict[tuple, list[int]] = {}
    for cell, nodes in inner.items():
        alike.setdefault(tuple(node.target for node in nodes), []).append(cell)
    for cells in alike.values():
        template = max(cells, key=lambda cell: len(extra.get(cell, ())))
        wanted = extra.get(template, [])
        if not wanted:
            continue
        for cell in cells:
            have = extra.get(cell, [])
            if len(have) >= len(wanted):
                continue
            match = _match(inner[template], wanted, inner[cell], owner, cell, position)
            allowed = of_cell[cell] | (1 << cell)
            if match is not None and all(of_node[node] & ~allowed == 0 for node in match):
                owner.update((node, cell) for node in match)


def _match(
    template: list[fx.Node],
    wanted: list[fx.Node],
    inner: list[fx.Node],
    owner: Owner,
    cell: int,
    position: dict[fx.Node, int],
) -> list[fx.Node] | None:
    """The nodes that stand to ``inner`` as ``wanted`` stand to ``template``, or None."""
    image = dict(zip(template, inner, strict=True))
    found = []
    for node in wanted:
        known = [source for source in node.all_input_nodes if source in image]
        if not known:
            return None
        candidates = [
            user
            for user in sorted(image[known[0]].users, key=position.__getitem__)
            if user.target == node.target
            and owner.get(user, cell) == cell
            and user not in image.values()
            and same_arguments(node, user, lambda a, b: image.get(a, b) is b)
        ]
        if not candidates:
            return None
        image[node] = candidates[0]
        if candidates[0] not in owner:
            found.append(candidates[0])
    return found


def join_siblings(graph: fx.Graph, owner: Owner, calls: list[Call]) -> tuple[Owner, list[Call]]:
    """Blocks made of several sibling modules become one cell where that shortens the schedule.

    Two families are siblings if their members carry the same varying numbers: ``attns.3`` and
    ``ffs.3``, or ``layers.3.0`` and ``layers.3.1``.
    """
    families: dict[tuple[str, str], list[int]] = {}
    for cell in sorted(set(owner.values())):
        families.setdefault(calls[cell].family, []).append(cell)
    names = list(families)
    keys = {name: _varying([calls[cell] for cell in families[name]]) for name in names}
    here = levels(dependencies(graph, owner))
    at = 0
    while at + 1 < len(names):
        first, second = names[at], names[at + 1]
        left = dict(zip(keys[first], families[first], strict=True))
        right = dict(zip(keys[second], families[second], strict=True))
        joined = _join(graph, owner, left, right) if len(left) > 1 and left.keys() == right.keys() else None
        if joined is not None:
            there = levels(dependencies(graph, joined))
            if there < here:
                owner, here = joined, there
                names.pop(at + 1)
                continue
        at += 1
    return owner, calls


def _varying(calls: list[Call]) -> list[tuple]:
    """Per call, the numbers in its path that vary within the family, and the call count."""
    columns = list(zip(*(call.digits for call in calls), strict=True))
    keep = [at for at, column in enumerate(columns) if len(set(column)) > 1]
    return [(tuple(call.digits[at] for at in keep), call.count) for call in calls]


def _join(graph: fx.Graph, owner: Owner, left: dict[tuple, int], right: dict[tuple, int]) -> Owner | None:
    """The owner map with ``right[key]`` joined to ``left[key]``, or None if that makes a cycle."""
    renamed = {right[key]: left[key] for key in left}
    trial = {node: renamed.get(cell, cell) for node, cell in owner.items()}
    closed = contract(graph, trial)
    return closed if len(set(closed.values())) == len(set(trial.values())) else None


def _renumber(graph: fx.Graph, owner: Owner, calls: list[Call]) -> tuple[Owner, list[Call]]:
    """Number the cells from 0 in program order."""
    order = list(dict.fromkeys(owner[node] for node in graph.nodes if node in owner))
    new = {old: number for number, old in enumerate(order)}
    return {node: new[cell] for node, cell in owner.items()}, [calls[old] for old in order]
