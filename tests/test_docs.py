"""The documentation: examples in README and docs run, links between pages lead somewhere, the site builds."""

from __future__ import annotations

import copy
import doctest
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import diagpass
from diagpass.cli import sample
from diagpass.options import Options

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in PAGES if "_build" not in page.parts]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples mean the default compiler; here it is the one that starts fast."""
    defaults = Options.__init__.__defaults__
    assert defaults and defaults[0] == "inductor"
    monkeypatch.setattr(Options.__init__, "__defaults__", ("eager", *defaults[1:]))


class Step(nn.Module):
    """A step that keeps its state, as the pages speak of one."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.GRUCell(4, 4) for _ in range(2))
        self.zero_mem()

    def zero_mem(self) -> None:
        self.states: list[Any] = [torch.zeros(2, 4) for _ in self.layers]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states = []
        for layer, state in zip(self.layers, self.states, strict=True):
            states.append(x := layer(x[:, -1] if x.dim() == 3 else x, state))
        self.states = states
        return x[:, None]


def names() -> dict[str, Any]:
    """What the examples take for granted."""
    model, inputs = sample.build(layers=2, segments=3, width=4)
    x = torch.randn(2, 2048, 4)
    cells = [lambda h, state: (h + state, h)] * 2
    return {
        **{"torch": torch, "diagpass": diagpass, "rich": pytest.importorskip("rich")},
        **{"model": model, "inputs": inputs, "example_inputs": inputs, "args": inputs, "kwargs": {}},
        **{"x": x, "segments": list(x.split(1024, dim=1)), "step": Step().eval()},
        **{"embed": float, "head": float, "layer": cells, "layers": range(2)},
        **{"state": [0.0, 0.0], "out": {}},
    }


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_doctests(page: Path) -> None:
    failed, _ = doctest.testfile(
        str(page), module_relative=False, globs={"__name__": "docs"}, optionflags=doctest.NORMALIZE_WHITESPACE
    )
    assert not failed


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_blocks_of_python_run(
    page: Path,
    eager: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    blocks = [block for block in BLOCK.findall(page.read_text("utf-8")) if ">>>" not in block]
    if not blocks:
        pytest.skip("no such block")
    for package in re.findall(r"^(?:from|import) (\w+)", "".join(blocks), re.MULTILINE):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    space = names()
    with torch.no_grad():
        for block in blocks:
            if "range(" not in block and "S of them" in block:
                space = {**space, "segments": range(3)}
            elif isinstance(space["segments"], range):
                space = {**names(), "segments": list(space["x"].split(1024, dim=1))}
            exec(compile(block, name(page), "exec"), space)


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=name)
def test_links_within_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text("utf-8")):
        if "://" not in target and not target.startswith(("mailto:", "_generated/")):
            assert (page.parent / target).exists(), target


def test_every_page_is_listed() -> None:
    listed = (ROOT / "docs" / "index.md").read_text("utf-8")
    for page in (ROOT / "docs").glob("*.md"):
        assert page.stem in (*listed.split(), "index", "models", "performance"), page.stem


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    build = pytest.importorskip("sphinx.cmd.build")
    path, modules = copy.copy(sys.path), set(sys.modules)
    try:
        assert build.main(["-W", "--keep-going", "-q", "-b", "html", str(ROOT / "docs"), str(tmp_path)]) == 0
    finally:
        sys.path[:] = path
        for module in set(sys.modules) - modules:
            if module.partition(".")[0] in ("sphinx", "furo", "myst_parser"):
                sys.modules.pop(module)
    assert "verdict" in (tmp_path / "howto" / "read-a-report.html").read_text("utf-8")
