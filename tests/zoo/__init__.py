"""Models from elsewhere, unmodified: the cases behind docs/models.md, one file a family."""

from __future__ import annotations

from tests.zoo import armt, memory, recurrent, speech, stacked
from tests.zoo.case import Case

CASES: dict[str, Case] = {
    case.name: case for family in (memory, recurrent, speech, stacked, armt) for case in family.CASES
}
