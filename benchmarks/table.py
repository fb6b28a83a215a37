"""Rows of measurements -> a table for people, on a terminal or in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

COLUMNS = (
    "case", "ms", "tokens/s", "strongest", "compiled", "eager", "full",
    "of rate", "static", "peak MiB", "cold s",
)  # fmt: skip


def _cells(row: dict) -> list[str]:
    def ratio(name: str) -> str:
        return f"{row['ratios'][name]:.2f}x" if name in row["ratios"] else ""

    return [
        row["case"] + (f", head: {row['head']}" if row["head"] else ""),
        f"{row['ms']:.2f}",
        f"{row['tokens_per_s']:,.0f}",
        ratio("strongest"),
        ratio("compiled"),
        ratio("eager"),
        ratio("full"),
        f"{row['fraction_of_rate']:.3f}",
        f"{row['static_bytes'] / row['model_bytes']:.3f}" if row["static_bytes"] else "",
        f"{row['peak_bytes'] / 2**20:.0f}" if row["peak_bytes"] else "",
        f"{row['cold_s']:.1f}" if row["cold_s"] else "",
    ]


def print_rows(rows: Sequence[dict]) -> None:
    """Show rows on the terminal."""
    table = Table(*COLUMNS)
    for row in rows:
        table.add_row(*_cells(row))
    Console(width=160).print(table)


def as_markdown(rows: Sequence[dict]) -> str:
    """A page that says how the rows were measured, and the rows."""
    lines = [
        "# Performance",
        "",
        "Median wall time of a call, all sides in turn in one process. The columns named after baselines",
        "say how many times longer the baseline takes: *strongest* is the sequential loop with each layer",
        "compiled by Inductor, a whole segment in one CUDA graph and the memory written in place;",
        "*compiled* the step under `torch.compile`; *eager* the model as it stands; *full* the same Llama",
        "with causal attention over all tokens, compiled. *of rate* is the model's matrix and attention",
        "operations over the time, as a fraction of the rate of back-to-back 8192 x 8192 products in the",
        "same run. *static* is the device memory allocated between calls over the model's own parameters;",
        "what only lives inside CUDA graphs is not in it. *head* says whether logits were computed, of",
        "*all* positions or of the *last* one of each segment. Rows of one device are those of the version",
        "of their day. [Profiles](profiles.md) says where the time goes. Times of the small model below",
        "some 10 ms are the host's, and moved by a factor of two between machines of one kind and within",
        "minutes on one: rows from a *slower host* are kept beside the others.",
        "",
    ]
    for device in dict.fromkeys((row["device"], row["torch"]) for row in rows):
        days = sorted({row["measured"] for row in rows if (row["device"], row["torch"]) == device})
        lines += [f"## {device[0]}, torch {device[1]}, {', '.join(days)}", ""]
        lines.append("| " + " | ".join(COLUMNS) + " |")
        lines.append("|" + "---|" * len(COLUMNS))
        for row in rows:
            if (row["device"], row["torch"]) == device:
                lines.append("| " + " | ".join(_cells(row)) + " |")
        lines.append("")
    return "\n".join(lines)
