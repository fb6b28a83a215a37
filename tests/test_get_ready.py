"""Inductor's processes are asked for before the first capture, once, and only where they are of use."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch._inductor import async_compile

import diagpass
from diagpass import backend
from diagpass.rolled import session
from diagpass.runtime import compiled
from tests.rolled_models import ENTRIES, D, T, tokens


class Asked(Exception):
    """Stops a call before anything is captured."""


@pytest.fixture(autouse=True)
def nothing_asked(monkeypatch: Any) -> None:
    monkeypatch.setattr(compiled, "_asked", set())


@pytest.fixture
def asked(monkeypatch: Any) -> list[set[str]]:
    """What calls ask for; the first of them ends there."""
    found: list[set[str]] = []

    def stop(device_types: set[str]) -> None:
        found.append(device_types)
        raise Asked

    for module in (session, backend):
        monkeypatch.setattr(module, "get_ready", stop)
    return found


@pytest.fixture
def compilers(monkeypatch: Any) -> list[threading.Thread]:
    """The threads that try the C++ compiler, which does nothing here."""
    found: list[threading.Thread] = []
    monkeypatch.setattr(compiled, "_compile_nothing", lambda: found.append(threading.current_thread()))
    return found


def test_they_are_asked_for_once(monkeypatch: Any, compilers: list[threading.Thread]) -> None:
    calls: list[int] = []
    monkeypatch.setattr(async_compile, "maybe_warm_pool", lambda: calls.append(1))
    compiled.get_ready({"cpu"})
    assert not calls
    for _ in range(3):
        compiled.get_ready({"cpu", "cuda"})
    assert len(calls) == 1


def test_a_torch_without_the_function_or_where_it_fails(monkeypatch: Any) -> None:
    def fail() -> None:
        raise OSError("no process to be had")

    monkeypatch.setattr(async_compile, "maybe_warm_pool", fail)
    compiled.get_ready({"cuda"})
    monkeypatch.setattr(compiled, "_asked", set())
    monkeypatch.delattr(async_compile, "maybe_warm_pool")
    compiled.get_ready({"cuda"})


def test_none_is_started_where_torch_is_told_not_to(monkeypatch: Any) -> None:
    monkeypatch.setenv("TORCH_WARM_POOL", "0")
    before = async_compile.AsyncCompile.process_pool.cache_info()
    compiled.get_ready({"cuda"})
    assert async_compile.AsyncCompile.process_pool.cache_info() == before


def joined(compilers: list[threading.Thread]) -> list[threading.Thread]:
    for thread in threading.enumerate():
        if thread.name == "diagpass get ready":
            thread.join()
    return compilers


def test_the_compiler_is_tried_once_beside_the_capture(
    monkeypatch: Any, compilers: list[threading.Thread]
) -> None:
    for _ in range(3):
        compiled.get_ready({"cpu"})
    (thread,) = joined(compilers)
    assert thread is not threading.current_thread() and thread.daemon
    monkeypatch.setenv("TORCH_WARM_POOL", "0")
    monkeypatch.setattr(compiled, "_asked", set())
    compiled.get_ready({"cpu"})
    assert len(joined(compilers)) == 1


def test_a_machine_without_a_compiler(monkeypatch: Any, caplog: Any) -> None:
    def fail() -> None:
        raise OSError("no compiler to be had")

    monkeypatch.setattr(compiled, "_compile_nothing", fail)
    with caplog.at_level("INFO", "diagpass"):
        compiled.get_ready({"cpu"})
        joined([])
    assert "no compiler to be had" in caplog.text


def test_the_compiler_really_compiles() -> None:
    """What is asked of Inductor exists in this torch."""
    compiled._compile_nothing()


def test_a_first_call_asks_before_it_captures(asked: list[set[str]]) -> None:
    loop = ENTRIES["gru"].build().double()
    for model in (loop, nn.Sequential(nn.Linear(D, D), nn.Linear(D, D)).double()):
        fast: Any = diagpass.transform(model)
        with torch.no_grad(), pytest.raises(Asked):
            fast(tokens(3 * T))
        assert asked.pop() == {"cpu"}
        assert fast._session.captures == 0


def test_what_compiles_nothing_does_not_ask(asked: list[set[str]]) -> None:
    loop = ENTRIES["gru"].build().double()
    fast: Any = diagpass.transform(loop)
    with torch.no_grad():
        diagpass.explain(loop, tokens(3 * T))
        fast.capture(tokens(3 * T))
        diagpass.transform(loop, options={"compiler": "eager"})(tokens(3 * T))
    assert not asked
