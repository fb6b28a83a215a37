"""The garbage collector is off inside, and then what it was before: nested, in threads, after errors."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import diagpass
from diagpass import rolled
from diagpass.uncollected import uncollected
from tests.rolled_models import ENTRIES, T, tokens


@pytest.fixture(autouse=True)
def collector() -> Iterator[None]:
    """On before and after each test."""
    gc.enable()
    yield
    gc.enable()


def test_it_nests_and_survives_errors() -> None:
    with uncollected():
        with pytest.raises(KeyError), uncollected():
            raise KeyError
        assert not gc.isenabled()
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off() -> None:
    gc.disable()
    with uncollected():
        pass
    assert not gc.isenabled()


def test_threads_that_overlap_leave_it_on() -> None:
    entered, leave = threading.Event(), threading.Event()

    def second() -> None:
        with uncollected():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=second)
    with uncollected():
        thread.start()
        assert entered.wait(10)
    assert not gc.isenabled()  # the second is still inside
    leave.set()
    thread.join()
    assert gc.isenabled()


def test_many_threads_leave_it_on() -> None:
    def work() -> None:
        for _ in range(2000):
            with uncollected():
                assert not gc.isenabled()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gc.isenabled()


def test_captures_are_made_without_it(monkeypatch: Any) -> None:
    found: list[bool] = []
    capture = rolled.session.capture

    def watched(*args: Any) -> Any:
        found.append(gc.isenabled())
        return capture(*args)

    monkeypatch.setattr(rolled.session, "capture", watched)
    fast = diagpass.transform(ENTRIES["gru"].build().double(), options={"compiler": "eager"})
    with torch.no_grad():
        fast(tokens(3 * T))
    assert found and not any(found)
    assert gc.isenabled()
