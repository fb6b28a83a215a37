"""Settings for all tests."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo.config

# Two test processes share two cores, and Inductor would start a compile worker per core in each.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
torch.set_num_threads(1)

# pytest (9.1 and newer) listens to loggers that do not propagate, too. torch writes its whole trace, each
# graph as text, as soon as anybody listens to this one, which takes time at every capture.
logging.getLogger("torch.__trace").propagate = True


# Tests with many parameters of which every run takes only some, each test others; DIAGPASS_TESTS=all takes
# all. Every zoo model's results are compared in every run.
SAMPLED = {
    "test_unbatched_schedule_is_bitwise_equal": 4,
    "test_the_next_call_sees_the_edit": 2,
    "test_waves_and_results": 2,
    "test_copies_of_the_transformed_module_work": 3,
    "test_a_call_that_fails_midway_leaves_the_state_as_it_was": 3,
    "test_explain_says_the_same_without_running_anything": 3,
    "test_runs_in_its_dtype_and_segments_are_recurrent": 2,
    "test_another_dtype": 2,
    "test_a_width_cap_is_kept": 2,
    "test_ten_thousand_segments_in_constant_memory": 2,
    "test_inductor_gives_the_same_results": 2,
    "test_loops_of_odd_shapes": 2,
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what this run does not sample."""
    if os.environ.get("DIAGPASS_TESTS") == "all":
        return
    counts: dict[str, int] = {}
    left_out, kept = [], []
    for item in items:
        name = getattr(item, "originalname", item.name)
        at = counts[name] = counts.get(name, -1) + 1
        (left_out if at % SAMPLED.get(name, 1) else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


def pytest_collection_finish() -> None:
    """Tracing allocates much and frees little: let the collector leave alone what imports brought."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 50, 50)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """Same random numbers and settings whatever ran before: the backend changes one setting for good."""
    torch.manual_seed(0)
    before = torch._dynamo.config.allow_unspec_int_on_nn_module
    yield
    torch._dynamo.config.allow_unspec_int_on_nn_module = before
