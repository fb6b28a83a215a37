"""What the tests share: running a model both ways, comparing all there is, checking schedules.

`assert_same` is the workhorse. It runs a copy of the model as it stands and another through
`diagpass.transform`, several times in a row, and compares outputs, inputs and *everything* the
modules hold after each call, found by `state_of` from the outside.

`check_schedule` and `true_dependencies` do not believe the library: the first recomputes with
networkx from the reported edges what a schedule must satisfy, the second finds dependencies by
changing the weights of one cell at a time and looking which cells notice.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import diagpass

# ------------------------------------------------------------------------------ looking at things


def leaves(value: Any, path: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (path, leaf) of containers and plain objects; types and lengths are leaves, too."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor) or value is None or isinstance(value, (bool, int, float, str)):
        yield path, value
        return
    if id(value) in seen or isinstance(value, (nn.Module, type)) or callable(value):
        return
    seen = seen | {id(value)}
    if isinstance(value, Mapping):
        yield f"{path}.keys()", (type(value).__name__, tuple(map(str, value)))
        for key in value:
            yield from leaves(value[key], f"{path}[{key!r}]", seen)
    elif isinstance(value, (list, tuple, deque)):
        yield f"{path}.type()", (type(value).__name__, len(value))
        for place, item in enumerate(value):
            yield from leaves(item, f"{path}[{place}]", seen)
    elif isinstance(value, (torch.dtype, torch.device, torch.Size)):
        yield path, str(value)
    elif dataclasses.is_dataclass(value) or hasattr(value, "__dict__"):
        yield f"{path}.type()", type(value).__name__
        names = [field.name for field in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
        for name in sorted({*names, *getattr(value, "__dict__", ())}):
            yield from leaves(getattr(value, name), f"{path}.{name}", seen)


def state_of(module: nn.Module) -> dict[str, Any]:
    """Everything a module holds that a call could change: path -> tensor or Python value.

    Buffers, plain tensor attributes, lists, dicts, deques, plain objects, ints, floats, bools,
    strings and None, of all submodules; parameters, too, since a call must leave them alone.
    """
    found: dict[str, Any] = {}
    for prefix, sub in module.named_modules():
        for name, value in itertools.chain(sub._parameters.items(), sub._buffers.items()):
            found[f"{prefix}.{name}"] = value
        for name, value in vars(sub).items():
            if not name.startswith("_"):
                found.update(leaves(value, f"{prefix}.{name}"))
    return found


def snapshot(module: nn.Module) -> dict[str, Any]:
    """`state_of` with tensors copied, to compare with later."""
    return {path: clone_tree(leaf) for path, leaf in state_of(module).items()}


def distance(got: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest expected value; inf if NaNs sit elsewhere."""
    got, expected = got.detach(), expected.detach()
    if got.numel() == 0:
        return 0.0
    if not (got.is_floating_point() or got.is_complex()):
        return 0.0 if torch.equal(got, expected) else float("inf")
    if not torch.equal(got.isnan(), expected.isnan()):
        return float("inf")
    wide = torch.complex128 if got.is_complex() else torch.float64
    got, expected = got.nan_to_num().to(wide), expected.nan_to_num().to(wide)
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-300))


def _compare_leaf(where: str, got: Any, expected: Any, rtol: float) -> None:
    if not isinstance(expected, Tensor):
        assert type(got) is type(expected) and (got == expected or got != got), (
            f"{where}: got {got!r}, expected {expected!r}"
        )
        return
    assert isinstance(got, Tensor), f"{where}: got {got!r}, expected a tensor"
    assert type(got) is type(expected), f"{where}: got {type(got)}, expected {type(expected)}"
    for what in ("shape", "dtype", "device", "requires_grad"):
        a, b = getattr(got, what), getattr(expected, what)
        assert a == b, f"{where}: {what} is {a}, expected {b}"
    if rtol == 0.0:
        same = torch.equal(got.nan_to_num(), expected.nan_to_num())
        assert same and torch.equal(got.isnan(), expected.isnan()), (
            f"{where}: not bitwise equal, off by {distance(got, expected):.3g}"
        )
    else:
        off = distance(got, expected)
        assert off <= rtol, f"{where}: off by {off:.3g} relative, allowed {rtol:.3g}"


def assert_tree_same(got: Any, expected: Any, rtol: float, where: str) -> None:
    """Same containers, keys, types and values."""
    assert type(got) is type(expected), f"{where}: got {type(got)}, expected {type(expected)}"
    a, b = dict(leaves(got)), dict(leaves(expected))
    assert list(a) == list(b), f"{where}: got {list(a)}, expected {list(b)}"
    for path in b:
        _compare_leaf(f"{where}{path}", a[path], b[path], rtol)


def assert_state_same(
    got: nn.Module | Mapping[str, Any],
    expected: nn.Module | Mapping[str, Any],
    rtol: float = 0.0,
    where: str = "state",
) -> None:
    """Two modules (or snapshots) hold the same things under the same names."""
    a = got if isinstance(got, Mapping) else state_of(got)
    b = expected if isinstance(expected, Mapping) else state_of(expected)
    assert sorted(a) == sorted(b), (
        f"{where}: only left {sorted(set(a) - set(b))}, only right {sorted(set(b) - set(a))}"
    )
    for path in b:
        _compare_leaf(f"{where} {path}", a[path], b[path], rtol)


def clone_tree(value: Any) -> Any:
    """A copy with tensors detached and cloned (deepcopy refuses tensors with history)."""
    if isinstance(value, nn.Parameter):
        return nn.Parameter(value.detach().clone(), value.requires_grad)
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(clone_tree, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(clone_tree, value))
    if type(value) is dict:
        return {key: clone_tree(item) for key, item in value.items()}
    if isinstance(value, dict):  # a ModelOutput, an OrderedDict
        copied = type(value)()
        for key, item in value.items():
            copied[key] = clone_tree(item)
        return copied
    return copy.deepcopy(value)


# ------------------------------------------------------------------------------------ running


def run_sequential(model: nn.Module, inputs: tuple[Any, ...], **kwargs: Any) -> Any:
    """The sequential reference: the model as it stands, on copied inputs, without autograd."""
    with torch.no_grad():
        return model(*clone_tree(inputs), **clone_tree(kwargs))


def forced(**options: Any) -> dict[str, Any]:
    """Options of an equality test: the wavefront whatever the speed, nothing compiled, nothing timed."""
    return {"compiler": "eager", "schedule": "wavefront", "form": "batched", **options}


def fast_copy(model: nn.Module, **options: Any) -> nn.Module:
    """A transformed deep copy of `model`, wavefront forced, eager compiler by default."""
    return diagpass.transform(copy.deepcopy(model), options=forced(**options))


def assert_same(
    model: nn.Module,
    inputs: tuple[Any, ...],
    options: dict[str, Any] | None = None,
    rtol: float = 1e-12,
    calls: int = 2,
    *,
    ran: str | None = "wavefront",
    kwargs: dict[str, Any] | None = None,
    returns_state: bool = False,
) -> diagpass.Report:
    """A transformed copy does, call after call, exactly what the plain copy does.

    Compared after each call: outputs (containers, keys, types, values), the inputs (a model may
    write to them) and all state. At the end: that no call overwrote what an earlier one returned
    (`returns_state`: unless the model returns its own state), and that no further capture took
    place after the second call.

    Returns the report of the last plan.
    """
    plain = copy.deepcopy(model)
    fast = fast_copy(model, **(options or {}))
    report, kept, captures = None, [], []
    for call in range(calls):
        where = f"call {call}: "
        expected_in = clone_tree((inputs, kwargs or {}))
        got_in = clone_tree((inputs, kwargs or {}))
        with torch.no_grad():
            expected = plain(*expected_in[0], **expected_in[1])
            got = fast(*got_in[0], **got_in[1])
        assert_tree_same(got, expected, rtol, where + "output")
        assert_tree_same(got_in, expected_in, rtol, where + "input")
        assert_state_same(fast.original, plain, rtol, where + "state")
        kept.append((got, clone_tree(got)))
        report = fast.report
        captures.append(report.captures)
        if ran is not None:
            assert report.ran == ran, f"{where}ran {report.ran}: {report.notes}"
    if not returns_state:
        for call, (got, before) in enumerate(kept):
            assert_tree_same(got, before, 0.0, f"result of call {call}, looked at again: ")
    assert captures[1:] == captures[1:2] * len(captures[1:]), f"captured again: {captures}"
    assert report is not None
    return report


def assert_bitwise(
    model: nn.Module,
    inputs: tuple[Any, ...],
    options: dict[str, Any] | None = None,
    calls: int = 2,
    **more: Any,
) -> diagpass.Report:
    """The schedule run unbatched is bitwise equal to the sequential run."""
    options = {**(options or {}), "max_width": 1}
    return assert_same(model, inputs, options, rtol=0.0, calls=calls, **more)


def assert_closer(reference64: Any, candidate: Any, competitor: Any, factor: float = 1.5) -> None:
    """`candidate` is at most `factor` times as far from the float64 result as `competitor` is.

    The fair way to judge a low-precision result (the idea is lightning-thunder's). Judged by the
    root mean square over all tensors of a leaf, leaf by leaf, and by the largest difference with
    twice the factor, since a maximum over few values scatters.
    """
    triples = zip(leaves(reference64), leaves(candidate), leaves(competitor), strict=True)
    for (path, exact), (_, ours), (_, theirs) in triples:
        if not isinstance(exact, Tensor) or not exact.is_floating_point():
            continue
        ours, theirs = ((t.double() - exact.double()) for t in (ours, theirs))
        floor = torch.finfo(torch.float64).eps * exact.abs().max().item()
        mean = [t.square().mean().sqrt().item() for t in (ours, theirs)]
        most = [t.abs().max().item() for t in (ours, theirs)]
        assert mean[0] <= factor * mean[1] + floor, f"{path}: {mean[0]:.3g} against {mean[1]:.3g}"
        assert most[0] <= 2 * factor * most[1] + floor, f"{path}: {most[0]:.3g}, {most[1]:.3g}"


@contextlib.contextmanager
def no_diagpass_warnings() -> Iterator[None]:
    """Turn every DiagpassWarning into a failure."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", diagpass.DiagpassWarning)
        yield


@contextlib.contextmanager
def collect_warnings() -> Iterator[list[str]]:
    """Collect the texts of every DiagpassWarning raised inside."""
    texts: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield texts
    texts += [str(w.message) for w in caught if issubclass(w.category, diagpass.DiagpassWarning)]


# ---------------------------------------------------------------------------------- counting

#: Leaf operations that multiply matrices, as the dispatcher names them.
MATMULS = ("mm", "addmm", "bmm", "baddbmm", "linear", "mv", "addmv", "dot")
MATMULS += ("_addmm_activation", "mkldnn_linear", "_linear_pointwise")


class MatmulCounter(TorchDispatchMode):
    """Counts matrix products that reach the dispatcher, by operation."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if name in MATMULS:
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def count_matmuls(fn: Callable[[], Any]) -> int:
    """How many matrix products `fn()` sends through the dispatcher (Python dispatch mode)."""
    with MatmulCounter() as counter, torch.no_grad():
        fn()
    return sum(counter.counts.values())


def profile_matmuls(fn: Callable[[], Any]) -> int:
    """The same count by the profiler, which sees compiled code, too, and hinders nobody."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.no_grad(), torch.profiler.profile(activities=activities, acc_events=True) as profile:
        fn()
    products = {f"aten::{name}" for name in MATMULS} - {"aten::linear"}
    products |= {f"mkldnn::{name}" for name in MATMULS}
    return sum(event.name in products for event in profile.events())


# --------------------------------------------------------------------- checking the schedule


def dependency_graph(report: diagpass.Report) -> nx.DiGraph:
    """The reported direct dependencies between cells."""
    told = report.to_dict()
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(told["grid"])))
    graph.add_edges_from((int(i), int(j)) for i, j in told["edges"])
    return graph


def check_schedule(report: diagpass.Report, max_width: int | None = None) -> None:
    """No group holds two dependent cells, dependencies run forward, each cell runs exactly once."""
    told = report.to_dict()
    grid, graph = told["grid"], dependency_graph(report)
    assert nx.is_directed_acyclic_graph(graph), "the reported dependencies have a cycle"
    wave_of: dict[int, int] = {}
    for number, wave in enumerate(told["schedule"]):
        cells = [cell for group in wave for cell in group["cells"]]
        assert cells, f"wave {number} is empty"
        assert max_width is None or len(cells) <= max_width, f"wave {number} holds {len(cells)}"
        for cell in cells:
            assert cell not in wave_of, f"cell {cell} runs in waves {wave_of[cell]} and {number}"
            wave_of[cell] = number
        for cell in cells:
            both = nx.descendants(graph, cell) & set(cells)
            assert not both, f"wave {number} holds {cell} and {sorted(both)}, which depend on it"
        for group in wave:
            kinds = {grid[cell]["kind"] for cell in group["cells"]}
            assert kinds == {group["kind"]}, f"a group of kind {group['kind']} holds kinds {kinds}"
    assert sorted(wave_of) == list(range(len(grid))), "not every cell runs"
    for i, j in graph.edges:
        assert wave_of[i] < wave_of[j], f"edge {i} -> {j}: waves {wave_of[i]} and {wave_of[j]}"
    if max_width is None:
        assert len(told["schedule"]) == report.waves
        longest = nx.dag_longest_path_length(graph) + 1 if grid else 0
        assert report.waves == longest, f"{report.waves} waves, the longest path has {longest}"
        assert [cell["wave"] for cell in grid] == [wave_of[cell] for cell in range(len(grid))]
    assert len(grid) == report.cells


def _modules_of(path: str, modules: Mapping[str, nn.Module]) -> list[nn.Module]:
    """The modules that a cell's path names (several where siblings were joined)."""
    names = [name for name in re.split(r"[\s,+]+", path) if name in modules]
    return [modules[name] for name in names]


def true_dependencies(
    model: nn.Module, inputs: tuple[Any, ...], report: diagpass.Report
) -> set[tuple[int, int]] | None:
    """Pairs (i, j) such that cell j is seen to change when the weights of cell i alone do.

    Cell i is the k-th call of the module on its path, where k counts the cells with that path in
    order of (segment, layer). During that one call all its parameters are changed a little; then
    the outputs and the tensors on the module after each later call are compared. What is found is a
    true dependency (never more than there is; a change may vanish by accident, so perhaps less).

    None if the cells cannot be told apart from outside: a path that names no module that is called.
    """
    grid = report.to_dict()["grid"]
    calls: dict[str, list[int]] = {}
    for index in sorted(range(len(grid)), key=lambda i: (grid[i]["segment"], grid[i]["layer"])):
        calls.setdefault(grid[index]["path"], []).append(index)

    def run(changed: int | None) -> dict[int, list[Tensor]] | None:
        copied = copy.deepcopy(model)
        modules = dict(copied.named_modules(remove_duplicate=False))
        seen: dict[int, list[Tensor]] = {}
        handles = []
        for path, cells in calls.items():
            members = _modules_of(path, modules)
            if not members:
                return None
            module, queue = members[0], iter(cells)
            state: dict[str, Any] = {"cell": None}

            def before(module: nn.Module, *_: Any, queue: Any = queue, state: dict[str, Any] = state) -> None:
                state["cell"] = next(queue, None)
                if changed is not None and state["cell"] == changed:
                    state["saved"] = [p.detach().clone() for p in module.parameters()]
                    generator = torch.Generator().manual_seed(changed)
                    for p in module.parameters():
                        noise = torch.rand(p.shape, generator=generator, dtype=torch.float64)
                        p.data.add_((0.01 + 0.01 * noise).to(p.dtype))

            def after(module: nn.Module, args: Any, out: Any, state: dict[str, Any] = state) -> None:
                if changed is not None and state["cell"] == changed:
                    for p, old in zip(module.parameters(), state["saved"], strict=True):
                        p.data.copy_(old)
                tensors = [t for _, t in leaves(out) if isinstance(t, Tensor)]
                tensors += [
                    t
                    for _, t in state_of(module).items()
                    if isinstance(t, Tensor) and not isinstance(t, nn.Parameter)
                ]
                seen[state["cell"]] = [t.detach().clone() for t in tensors]

            handles.append(module.register_forward_pre_hook(before))
            handles.append(module.register_forward_hook(after, always_call=False))
        run_sequential(copied, inputs)
        return seen

    plain = run(None)
    if plain is None or set(plain) != set(range(len(grid))):
        return None
    found: set[tuple[int, int]] = set()
    for i in range(len(grid)):
        seen = run(i)
        assert seen is not None
        for j in range(len(grid)):
            same = len(seen[j]) == len(plain[j]) and all(
                torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(seen[j], plain[j], strict=True)
            )
            if i != j and not same:
                found.add((i, j))
    return found


def check_true_dependencies(model: nn.Module, inputs: tuple[Any, ...], report: diagpass.Report) -> bool:
    """Every dependency found by experiment is a path in the reported graph.

    Returns whether the experiment could be made.
    """
    found = true_dependencies(model, inputs, report)
    if found is None:
        return False
    closure = nx.transitive_closure_dag(dependency_graph(report))
    grid = report.to_dict()["grid"]
    missing = [(grid[i], grid[j]) for i, j in sorted(found) if not closure.has_edge(i, j)]
    assert not missing, f"{len(missing)} true dependencies are not in the graph, first {missing[0]}"
    return True
