"""`python -m tests.fuzz`: draw models from the full ranges until the time is up.

Batches of whole-loop models and of steps for the rolled program take turns. The environment variable
DIAGPASS_FUZZ_SECONDS says for how long (60), DIAGPASS_FUZZ_SEED with which seed (a fresh one); both are
printed, and at the end the number of examples that passed. DIAGPASS_FUZZ_ONLY is "loops" or "steps".
"""

from __future__ import annotations

import os
import random
import sys
import time
from collections import Counter
from typing import Any

import torch
from hypothesis import given, seed

from tests import test_fuzz, test_rolled_fuzz
from tests.rolled_strategies import rolled_specs
from tests.strategies import specs
from tests.test_fuzz import fuzz_settings

#: what is drawn, and what is checked of it
WHAT: dict[str, tuple[Any, Any]] = {
    "loops": (specs, test_fuzz.check),
    "steps": (rolled_specs, test_rolled_fuzz.check),
}


def main() -> int:
    """Run batches of examples; return the exit status."""
    seconds = float(os.environ.get("DIAGPASS_FUZZ_SECONDS", "60"))
    start = int(os.environ.get("DIAGPASS_FUZZ_SEED", random.SystemRandom().randrange(10**9)))
    only = os.environ.get("DIAGPASS_FUZZ_ONLY")
    names = [only] if only else list(WHAT)
    print(f"fuzzing {' and '.join(names)} for {seconds:g} s, DIAGPASS_FUZZ_SEED={start}", flush=True)
    torch.set_num_threads(1)
    end = time.monotonic() + seconds
    done: Counter[str] = Counter()
    cells = 0
    batch = 0
    while time.monotonic() < end:
        draw, check = WHAT[names[batch % len(names)]]

        @seed(start + batch)
        @fuzz_settings(10)
        @given(draw())
        def run(spec: Any) -> None:
            nonlocal cells
            if time.monotonic() >= end and done:
                return
            check(spec)  # noqa: B023 (run is called in the round that it is made in)
            done[spec.state] += 1
            cells += spec.cells

        try:
            run()
        except BaseException:
            print(f"failed in batch {batch} after {sum(done.values())} examples", flush=True)
            raise
        batch += 1
        torch._dynamo.reset()  # frees the code of models that are gone
    kinds = ", ".join(f"{name} {count}" for name, count in sorted(done.items()))
    print(f"{sum(done.values())} examples passed, {cells} cells ({kinds})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
