"""GRU and LSTM stacks and a Transformer-XL: waves equal the longest path of the true DAG."""

from __future__ import annotations

from collections.abc import Callable

import networkx as nx
import pytest
import torch

import diagpass
from examples import rnn_stack, transformer_xl
from tests.helpers import (
    assert_bitwise,
    assert_same,
    check_schedule,
    check_true_dependencies,
    dependency_graph,
)

Cell = tuple[int, int]


def true_dag(layers: int, segments: int, needs: Callable[[int, int], list[Cell]]) -> nx.DiGraph:
    """The dependency graph over (segment, layer) that `needs` describes, by hand."""
    graph = nx.DiGraph()
    for s in range(segments):
        for l in range(layers):
            graph.add_node((s, l))
            for before in needs(s, l):
                if min(before) >= 0:
                    graph.add_edge(before, (s, l))
    return graph


def recurrent(s: int, l: int) -> list[Cell]:
    """A stacked RNN: the input from below, the state from before."""
    return [(s, l - 1), (s - 1, l)]


def cached(s: int, l: int) -> list[Cell]:
    """A Transformer-XL: the input from below, and the *input* that the same layer had before.

    What layer l caches at segment s-1 is its input there, the output of (s-1, l-1). Nothing comes
    from layer l itself, and layer 0 needs embeddings only. So t(s, l) = t(s, l-1) + 1 = l: L waves,
    each as wide as there are segments, against S + L - 1 in a stacked RNN.
    """
    return [(s, l - 1), (s - 1, l - 1)]


def check(report: diagpass.Report, layers: int, segments: int, dag: nx.DiGraph) -> None:
    """Wave count and reachability are those of the true DAG."""
    check_schedule(report)
    assert (report.layers, report.segments) == (layers, segments)
    assert report.waves == nx.dag_longest_path_length(dag) + 1
    grid = report.to_dict()["grid"]
    names = {i: (cell["segment"], cell["layer"]) for i, cell in enumerate(grid)}
    told = nx.transitive_closure_dag(nx.relabel_nodes(dependency_graph(report), names))
    assert set(told.edges) == set(nx.transitive_closure_dag(dag).edges)


@pytest.mark.parametrize("kind", ["gru", "lstm"])
@pytest.mark.parametrize("layers, segments", [(4, 6), (2, 5), (5, 2)])
def test_rnn_stack(kind: str, layers: int, segments: int) -> None:
    model, inputs = rnn_stack.build(
        kind=kind, layers=layers, segments=segments, batch=2, d_model=8, dtype=torch.float64
    )
    dag = true_dag(layers, segments, recurrent)
    assert nx.dag_longest_path_length(dag) + 1 == segments + layers - 1
    report = diagpass.explain(model, *inputs)
    check(report, layers, segments, dag)
    assert check_true_dependencies(model, inputs, report)
    ran = assert_same(model, inputs)
    assert ran.batched_cells >= layers * segments - 4


@pytest.mark.parametrize("kind", ["gru", "lstm"])
def test_rnn_stack_bitwise(kind: str) -> None:
    model, inputs = rnn_stack.build(kind=kind, layers=3, segments=4, batch=2, d_model=8, dtype=torch.float64)
    assert_bitwise(model, inputs)


@pytest.mark.parametrize("layers, segments", [(4, 6), (2, 5)])
def test_transformer_xl(layers: int, segments: int) -> None:
    model, inputs = transformer_xl.build(layers=layers, segments=segments, batch=2, dtype=torch.float64)
    dag = true_dag(layers, segments, cached)
    assert nx.dag_longest_path_length(dag) + 1 == layers < segments + layers - 1
    report = diagpass.explain(model, *inputs)
    check(report, layers, segments, dag)
    assert report.max_width == segments
    assert check_true_dependencies(model, inputs, report)
    ran = assert_same(model, inputs)
    assert ran.batched_cells > 0


def test_transformer_xl_bitwise() -> None:
    model, inputs = transformer_xl.build(layers=3, segments=4, batch=2, dtype=torch.float64)
    assert_bitwise(model, inputs)
