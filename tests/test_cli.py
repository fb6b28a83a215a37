"""The command line: what each command says, its exit codes, its error messages."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from typer.testing import CliRunner, Result

from diagpass.cli.app import app
from diagpass.report import schema
from tests.test_repeat import run_python

MODELS = '''
import torch
from torch import nn

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
    def forward(self, x, state):
        return torch.tanh(self.linear(x) + state)

class Stack(nn.Module):
    """Each layer has a state; with `chain` the first layer's is the last one's."""
    def __init__(self, chain):
        super().__init__()
        self.chain = chain
        self.layers = nn.ModuleList(Layer() for _ in range(3))
    def forward(self, xs):
        states = [xs.new_zeros(2, 4) for _ in self.layers]
        for x in xs.unbind():
            for at, layer in enumerate(self.layers):
                states[at] = x = layer(x, states[at])
            if self.chain:
                states[0] = x
        return x

def good():
    torch.manual_seed(0)
    return Stack(False).eval(), (torch.randn(4, 2, 4),)

def chained():
    return Stack(True).eval(), (torch.randn(4, 2, 4),)

def plain():
    return nn.Linear(4, 4), (torch.randn(2, 4),)

def raises():
    raise RuntimeError("no weights here")

def wrong():
    return nn.Linear(4, 4)

def not_a_tuple():
    return nn.Linear(4, 4), torch.randn(2, 4)

def bad_inputs():
    return Stack(False).eval(), (torch.randn(4, 2, 5),)

class Odd(nn.Module):
    """Another result at each call: no run equals another."""
    def __init__(self):
        super().__init__()
        self.calls = []
        self.layers = nn.ModuleList(Layer() for _ in range(2))
    def forward(self, xs):
        for x in xs.unbind():
            for layer in self.layers:
                x = layer(x, x)
        return x

def fails_in_forward():
    return Odd(), ("text",)

number = 3
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a module ``cli_models``."""
    (tmp_path / "cli_models.py").write_text(MODELS)
    (tmp_path / "cli_broken.py").write_text("import torch\n1 / 0\n")
    (tmp_path / "cli_needs.py").write_text("import no_such_package_anywhere\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert result.exit_code == code, (result.exit_code, result.stdout, result.stderr)
    return result


def test_explain_says_what_will_happen_and_draws_it(folder: Path) -> None:
    result = run(
        "explain", "cli_models:good", "--plot", "grid.png", "--gantt", "gantt.png", "--trace", "t.json"
    )
    assert "verdict: wavefront: the cells run in 6 waves instead of 12 steps" in result.stdout
    assert "trace: t.json" in result.stdout and "capture and analysis" in result.stderr
    for name in ("grid.png", "gantt.png"):
        data = (folder / name).read_bytes()
        assert data[:4] == b"\x89PNG" and int.from_bytes(data[16:20], "big") > 1000
    events = json.loads((folder / "t.json").read_text())["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == 2 * 12
    last = max(event["ts"] for event in events if event["pid"] == 2)
    assert last == 5 * min(event["dur"] for event in events if event["ph"] == "X")


def test_explain_can_run_it_and_trace_the_run(folder: Path) -> None:
    result = run("explain", "cli_models:good", "--run", "--compiler", "eager", "--trace", "t.json")
    assert "measured: one call on cpu by the wall clock" in result.stdout
    assert "of it in 6 waves" in result.stdout and "width 3: 2 waves, median" in result.stdout
    assert "run and measurement" in result.stderr
    events = json.loads((folder / "t.json").read_text())["traceEvents"]
    waves = [event for event in events if event["pid"] == 3 and event.get("cat") == "wave"]
    assert [event["args"]["width"] for event in waves] == [1, 2, 3, 3, 2, 1]


def test_explain_can_estimate_and_write_a_script(folder: Path) -> None:
    result = run("explain", "cli_models:good", "--estimate", "--repro", "repro.py", "--quiet")
    assert "sequential, estimated " in result.stdout and "wavefront, estimated " in result.stdout
    assert "script: repro.py" in result.stdout and "class Graph" in (folder / "repro.py").read_text()


def test_explain_as_json_is_nothing_but_json(folder: Path) -> None:
    result = run("explain", "cli_models:good", "--json")
    told = json.loads(result.stdout)
    jsonschema.validate(told, schema())
    assert (told["cells"], told["waves"], told["verdict"]) == (12, 6, "wavefront")
    assert not run("explain", "cli_models:good", "--json", "--quiet").stderr


def test_a_sequential_verdict_is_no_error_unless_strict(folder: Path) -> None:
    assert "blocking: 3 edges chain, from 2 layers above" in run("explain", "cli_models:chained").stdout
    result = run("explain", "cli_models:chained", "--strict", "--json", code=3)
    assert json.loads(result.stdout)["verdict"] == "sequential"


def test_verify_compares_every_value(folder: Path) -> None:
    result = run("verify", "cli_models:good")
    assert "equal: 1 value compared, the second run was wavefront" in result.stdout
    told = json.loads(run("verify", "cli_models:good", "--json", "--tolerance", "1").stdout)
    assert told["equal"] and told["ran"] == "wavefront"
    assert told["values"][0]["bound"] == 1.0


def test_verify_fails_where_results_differ(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diagpass.cli import checks

    monkeypatch.setattr(checks, "differences", lambda *args: [("output", 0.5, checks.torch.float32)])
    result = run("verify", "cli_models:good", code=1)
    assert "DIFFERS" in result.stdout and "not equal: 1 value" in result.stdout
    run("verify", "cli_models:good", "--tolerance", "0.6")


def test_bench_has_a_row_for_each_baseline(folder: Path) -> None:
    rows = json.loads(
        run("bench", "cli_models:good", "--repeats", "2", "--compiler", "eager", "--json").stdout
    )
    assert [row["name"] for row in rows] == [
        "sequential, eager",
        "sequential, torch.compile (aot_eager)",
        "wavefront (eager)",
    ]
    assert all(row["failed"] is None and row["ms"] > 0 and row["ratio"] > 0 for row in rows)
    result = run("bench", "cli_models:good", "--repeats", "1", "--compiler", "eager")
    assert "sequential / this" in result.stdout and "timing" in result.stderr


def test_demo() -> None:
    result = run("demo")
    assert "verdict: wavefront" in result.stdout and "largest relative error" in result.stdout


@pytest.mark.parametrize(
    "target, words",
    [
        ("nowhere:build", "there is no module 'nowhere', neither in the current folder"),
        ("cli_models", "is not of the form MODULE:FACTORY"),
        ("cli_models:bild", "has no 'bild'; the callables it has: Layer, Stack, good"),
        ("cli_models:number", "is a int, not a callable"),
        ("cli_models:raises", "the factory cli_models:raises raised RuntimeError: no weights here"),
        ("cli_models:wrong", "returned a Linear; it must return (model, inputs_tuple)"),
        ("cli_models:not_a_tuple", "returned its inputs as a Tensor; they must be a tuple"),
        ("cli_broken:build", "importing module 'cli_broken' raised ZeroDivisionError"),
        ("cli_needs:build", "module 'cli_needs' needs 'no_such_package_anywhere', which is not installed"),
    ],
)
def test_a_bad_target_gets_one_paragraph(folder: Path, target: str, words: str) -> None:
    result = run("explain", target, "--quiet", code=1)
    text = " ".join(result.stderr.split())
    assert text.startswith("error: ") and words in text, text
    assert "Traceback" not in result.stderr and "\n\n" not in result.stderr.strip() and not result.stdout


@pytest.mark.parametrize("command", ["explain", "verify", "bench"])
def test_a_model_that_fails_on_its_inputs_is_named(folder: Path, command: str) -> None:
    text = " ".join(run(command, "cli_models:bad_inputs", "--quiet", code=1).stderr.split())
    assert text.startswith("error: the model of cli_models:bad_inputs raised RuntimeError: "), text
    assert "called as it stands with the factory's inputs" in text and "Traceback" not in text


def test_a_file_that_cannot_be_written_is_named(folder: Path) -> None:
    text = run("explain", "cli_models:good", "--trace", "no/such/t.json", "--quiet", code=1).stderr
    assert text.strip() == "error: no/such/t.json: No such file or directory"


def test_a_model_without_layers_says_what_to_do(folder: Path) -> None:
    text = run("explain", "cli_models:plain").stdout
    assert "no repeated module was found" in text
    assert "to change: name the modules that are the layers with options={'cells'" in text


def test_debug_shows_the_traceback(folder: Path) -> None:
    result = run("explain", "cli_models:raises", "--debug", code=1)
    assert "Traceback" in result.stderr and "no weights here" in result.stderr


@pytest.mark.parametrize("command", ["explain", "verify", "bench", "demo"])
def test_help_has_an_example(command: str) -> None:
    assert f"Example: diagpass {command}" in run(command, "--help").stdout


def test_wrong_usage_is_2() -> None:
    run("explain", code=2)
    run("explain", "examples.armt:build", "--no-such-option", code=2)
    run("bench", "examples.armt:build", "--repeats", "0", code=2)


def test_the_examples_are_factories() -> None:
    from diagpass.cli.target import load

    for name in ("armt", "rmt", "rnn_stack", "transformer_xl"):
        model, inputs = load(f"examples.{name}:build")
        assert list(model.parameters()) and inputs


def test_the_library_does_not_import_the_command_line() -> None:
    code = "import sys, diagpass\nassert not {'typer', 'rich', 'matplotlib'} & set(sys.modules)\nprint('ok')"
    assert "ok" in run_python(code)
