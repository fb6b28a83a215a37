"""Write docs/models.md from what the cases do: ``python -m tests.zoo.table`` (``make models``).

The columns that do not depend on the machine are compared with the committed file by the tests. A case whose
package is not installed keeps the row that it has.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from tests.zoo import CASES
from tests.zoo.case import Case
from tests.zoo.check import Figures, run
from tests.zoo.speed import LAYERS, SEGMENTS, WIDTH, in_process

PATH = Path(__file__).parents[2] / "docs" / "models.md"
COLUMNS = ("model", "from", "how the state flows", "waves", "batched", "speed-up, CPU", "to know")

HEAD = """\
# Models that were tried

Models from elsewhere, as their packages ship them, with the loop that their documentation has users
write. This file is written by `make models`, which runs what the tests run (`tests/zoo`); do not edit it.

*Waves* is given for the layers L and segments S of the test, and was derived on paper from how the state
flows before it was compared. *Batched* is the fraction of cells that ran in groups of two or more; at so
few segments the ramps and the first segment weigh most, with more of them it goes to 100 %. Every
wavefront row gives the bits of the sequential run when its schedule is run unbatched, and agrees to
rounding when batched, in outputs and in the final state. *Speed-up* is the sequential loop's time over
the wavefront's, {segments} segments and {layers} layers of width {width} in float32 on one CPU core, with
`compiler="eager"`: it compares numbers of calls, and says little about a large model. A row without a
speed-up was not run when the file was written, or runs sequentially.

[A worked example](using.md#a-model-from-elsewhere) shows the way from such a model to its wavefront.

"""


def deterministic(case: Case, figures: Figures) -> tuple[str, ...]:
    """The cells of a row that are the same on every machine: all but the speed-up."""
    if not figures.layers:
        waves = "-"
    else:
        waves = f"{figures.waves} (L = {figures.layers}, S = {figures.segments})"
    note = case.note
    if case.refused:
        note = f"Runs sequentially: {case.refused.partition(':')[0]}. Lifted by {case.lifted_by}."
    batched = "-" if case.refused else f"{figures.batched:.0%}"
    return case.name, case.source, case.state, waves, batched, note


def committed_row(name: str) -> tuple[str, ...] | None:
    """The row of a case in docs/models.md, without the speed-up."""
    row = committed().get(name)
    return None if row is None else (*row[:5], row[6])


def committed() -> dict[str, tuple[str, ...]]:
    """All rows of docs/models.md by model."""
    if not PATH.exists():
        return {}
    lines = [line for line in PATH.read_text().splitlines() if line.startswith("| ")]
    rows = [tuple(cell.strip() for cell in line.strip("|").split(" | ")) for line in lines[1:]]
    return {row[0]: row for row in rows if len(row) == len(COLUMNS)}


def main() -> None:
    """Run every case whose package is there and write the file."""
    torch.set_num_threads(1)
    old = committed()
    rows = []
    for name, case in CASES.items():
        if case.missing() is not None:
            if name in old:
                rows.append(old[name])
            sys.stderr.write(f"{name}: {case.missing()} is not installed\n")
            continue
        cells = deterministic(case, run(case))
        gain = "-" if case.refused else in_process(name)
        rows.append((*cells[:5], gain, cells[5]))
        sys.stderr.write(f"{name}: {cells[3]}, {cells[4]}, {gain}\n")
    lines = [COLUMNS, ("---",) * len(COLUMNS), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    PATH.write_text(f"{HEAD.format(segments=SEGMENTS, layers=LAYERS, width=WIDTH)}{table}\n")


if __name__ == "__main__":
    main()
