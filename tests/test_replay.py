"""Waves as replays: the same results when what a wave reads and writes lies at addresses that come again."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diagpass.runtime.buffers import Buffers
from diagpass.runtime.replay import MOST, Replays
from tests import rolled_models as models
from tests.helpers import assert_state_same, assert_tree_same, fast_copy
from tests.rolled_models import T
from tests.tape import check, poisoned, replaying  # noqa: F401

CPU = torch.device("cpu")

NAMES = (
    "armt",
    "gru",
    "mamba",
    "stacked",
    "dict_none",
    "transformer_xl",
    "two_back",
    "hybrid",
    "counter",
    "masked",
)


@pytest.mark.parametrize("name", NAMES)
def test_replayed_waves_compute_the_same(name: str) -> None:
    loop = models.build(name)
    fast: Any = fast_copy(loop)
    rtol = 1e-4 if models.expect(name).float32_inside else 1e-10
    states: list[Any] = [None, None]
    for call, length in enumerate((12 * T, 12 * T, 12 * T, 9 * T, 12 * T - 1)):
        check(loop, fast, models.inputs(name, length, seed=call), states, rtol)
    replays = fast._session.kinds.runner.replays
    assert replays.replayed > 20 or fast._session.scores.followed, (
        replays.launched,
        replays.recorded,
        replays.replayed,
    )


@pytest.mark.parametrize("name", ["armt", "mamba", "two_back"])
def test_after_three_calls_all_is_replayed(name: str) -> None:
    loop = models.build(name)
    fast: Any = fast_copy(loop)
    x = models.inputs(name, 15 * T)
    with torch.no_grad():
        for _ in range(3):
            fast(x)
        replays = fast._session.kinds.runner.replays
        before = replays.launched, replays.recorded, fast._session.kinds.runner.buffers.bytes
        fast(x)
    assert (replays.launched, replays.recorded, fast._session.kinds.runner.buffers.bytes) == before


def test_what_a_call_returned_survives_the_next_ones() -> None:
    loop = models.build("gru")
    fast: Any = fast_copy(loop)
    with torch.no_grad():
        found = [fast(models.inputs("gru", 8 * T, seed=seed)) for seed in range(5)]
        for seed, got in enumerate(found):
            assert_tree_same(got, loop(models.inputs("gru", 8 * T, seed=seed)), 1e-10, "output")


def test_streams_replay_and_hand_out_what_is_never_overwritten() -> None:
    loop = models.build("armt")
    fast: Any = fast_copy(loop)
    for seed in range(3):
        x = models.inputs("armt", 14 * T, seed=seed)
        with torch.no_grad():
            got = list(fast.stream(x.split(T, dim=1)))
            expected = list(loop.stream(x.split(T, dim=1)))
        assert_tree_same(got, expected, 1e-4, "outputs")
        assert_state_same(fast.original, loop, 1e-4, "state")
    assert fast._session.kinds.runner.replays.replayed > 10


def test_weights_edited_in_place_and_replaced_are_seen() -> None:
    loop = models.build("gru")
    fast: Any = fast_copy(loop)
    x = models.inputs("gru", 10 * T)
    states: list[Any] = [None, None]
    for edit in (lambda p: p.mul_(0.9), lambda p: setattr(p, "data", p.data * 0.9)):
        for _ in range(3):
            check(loop, fast, x, states, 1e-10)
        originals: list[Any] = [loop, fast.original]
        for model in originals:
            with torch.no_grad():
                for parameter in model.parameters():
                    edit(parameter)
        check(loop, fast, x, states, 1e-10)


def test_work_that_cannot_be_recorded_is_launched() -> None:
    class Broken:
        def record(self, work: Any) -> Any:
            raise RuntimeError("operation not permitted when stream is capturing")

    replays, done = Replays(Broken()), []
    for _ in range(3):
        replays.run("key", lambda: done.append(1))
    assert len(done) == 3 and replays.replayed == 0


def test_the_number_of_replays_kept_is_bounded() -> None:
    class Every:
        def record(self, work: Any) -> Any:
            work()
            return work

    replays = Replays(Every())
    for key in range(3 * MOST):
        replays.run(key, lambda: None)
    assert len(replays._known) == MOST


def test_a_buffer_is_lent_again_when_no_view_of_it_is_left() -> None:
    buffers = Buffers()
    first = buffers.lend((2, 3), torch.float32, CPU)
    address, view = first.data_ptr(), first[1].narrow(0, 1, 1)
    del first
    other = buffers.lend((2, 3), torch.float32, CPU)
    assert other.data_ptr() != address and buffers.holds(view) and not buffers.holds(torch.ones(2))
    del view
    assert buffers.lend((2, 3), torch.float32, CPU).data_ptr() == address
    assert buffers.bytes == 2 * 2 * 3 * 4
