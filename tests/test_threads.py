"""Two threads, or two inputs in turn, on one transformed model."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import diagpass
from tests.helpers import assert_tree_same, clone_tree, forced, run_sequential
from tests.models import ZOO, tokens


def _in_threads(fast: nn.Module, inputs: list[Tensor], calls: int) -> list[list[Any]]:
    results: list[list[Any]] = [[] for _ in inputs]
    errors: list[BaseException] = []
    gate = threading.Barrier(len(inputs))

    def work(place: int) -> None:
        try:
            gate.wait()
            for _ in range(calls):
                with torch.no_grad():
                    results[place].append(fast(inputs[place].clone()))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
        assert not thread.is_alive(), "a thread hangs"
    if errors:
        raise errors[0]
    return results


@pytest.mark.parametrize("warm", [True, False], ids=["captured", "first_call_in_threads"])
@pytest.mark.parametrize("name", ["list_states", "attribute_none"])
def test_two_threads_get_their_own_results(name: str, warm: bool) -> None:
    """Models that start each call afresh: what a thread computes is no other thread's business."""
    model, _ = ZOO[name]()
    inputs = [tokens() for _ in range(2)]
    expected = [run_sequential(model, (x,)) for x in inputs]
    fast = diagpass.transform(model, options=forced())
    if warm:
        run_sequential(fast, (inputs[0],))
    for results, value in zip(_in_threads(fast, inputs, 10), expected, strict=True):
        assert len(results) == 10
        for result in results:
            assert_tree_same(result, value, 1e-12, "thread")


def test_two_threads_with_inputs_of_other_shapes() -> None:
    model, _ = ZOO["list_states"]()
    inputs = [tokens(4), tokens(6)]
    expected = [run_sequential(model, (x,)) for x in inputs]
    fast = diagpass.transform(model, options=forced())
    for results, value in zip(_in_threads(fast, inputs, 5), expected, strict=True):
        for result in results:
            assert_tree_same(result, value, 1e-12, "thread")


def test_two_transformed_models_in_two_threads() -> None:
    built = [ZOO["attribute"]() for _ in range(2)]
    inputs = [tokens() for _ in range(2)]
    expected = [run_sequential(clone, (x,)) for (clone, _), x in zip(built, inputs, strict=True)]
    fasts = [diagpass.transform(ZOO["attribute"]()[0], options=forced()) for _ in range(2)]
    results: list[Any] = [None, None]

    def work(place: int) -> None:
        results[place] = run_sequential(fasts[place], (inputs[place],))

    threads = [threading.Thread(target=work, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    for result, value in zip(results, expected, strict=True):
        assert_tree_same(result, value, 1e-12, "thread")


def test_two_inputs_in_turn() -> None:
    """Results are not overwritten, whatever runs next, and belong to their input."""
    model, _ = ZOO["first_branch"]()
    inputs = [tokens(), tokens()]
    expected = [run_sequential(model, (x,)) for x in inputs]
    fast = diagpass.transform(model, options=forced())
    kept = [run_sequential(fast, (inputs[i % 2],)) for i in range(6)]
    copies = clone_tree(kept)
    for i, (got, copied) in enumerate(zip(kept, copies, strict=True)):
        assert_tree_same(got, expected[i % 2], 1e-12, f"call {i}")
        assert_tree_same(got, copied, 0.0, f"call {i}")


def test_shapes_in_turn() -> None:
    """Batch sizes and segment counts alternate; each call gets its own results."""
    model, _ = ZOO["list_states"]()
    fast = diagpass.transform(model, options=forced())
    inputs = [tokens(4), tokens(5), tokens(4, batch=3), tokens(2, tail=2), tokens(4)]
    for x in inputs + inputs:
        assert_tree_same(run_sequential(fast, (x,)), run_sequential(model, (x,)), 1e-12, "turn")
        assert fast.report.ran == "wavefront"
    captures = fast.report.captures
    for x in inputs:
        run_sequential(fast, (x,))
    assert fast.report.captures == captures
