"""A report as text: plain, for rich, and as HTML, all from the same sections.

A *section* is a title and its lines. The first line of a title stands behind it, further ones below.
"""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from diagpass.describe.advice import is_narrow
from diagpass.describe.estimate import total_flops
from diagpass.describe.figures import count, letter, ranges, size, work
from diagpass.describe.places import short_lines

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["as_html", "as_rich", "as_text", "sections"]

MOST_WIDTHS = 6
MOST_KINDS = MOST_FORMS = 12  # more are counted, not listed


def sections(report: Any) -> Iterator[tuple[str, list[str]]]:
    """The parts of a report, in the order in which they are read."""
    r = report
    yield "verdict", list(_verdict(r))
    if r.cells:
        yield "coverage", list(_coverage(r))
        yield (
            "grid",
            [
                f"{count(r.layers, 'layer')} x {count(r.segments, 'segment')}, {count(r.cells, 'cell')} "
                "(a cell is one layer applied to one segment; a wave is cells that run together)"
            ],
        )
        yield "kinds", list(_kinds(r.kinds))
        yield "critical path", list(_path(r))
        yield "blocking", list(_blocking(r))
    if r.chain is not None:
        about = (
            "a chain is an edge from a layer to a lower one at a later segment, which so cannot begin before"
        )
        yield "chain", [str(r.chain), about]
    if r.refusals:
        yield "refused", [_refusal(each, r.ran) for each in r.refusals]
    if r.cells:
        yield "memory", [_memory(r)]
    if r.forms:
        yield "forms", list(_forms(r.forms))
    if r.times:
        yield "times", list(_times(r))
    if r.measured is not None:
        yield "measured", list(_measured(r.measured))
    if r.ran is not None:
        yield (
            "ran",
            [
                f"{r.ran}, {r.batched_cells:,} of {r.cells:,} cells batched, "
                f"{count(r.captures, 'capture')}, {count(r.plans, 'plan')}"
            ],
        )
    yield "to change", r.advice or ["nothing"]
    for note in r.notes:
        yield "note", [note]


def _verdict(r: Any) -> Iterator[str]:
    if r.reason is None:
        yield f"{r.verdict}: {_outcome(r)}"
        return
    yield f"{r.verdict} ({short_lines(r.reason)})"
    if r.ran == "wavefront":
        yield "so its cells run one after the other"
    elif r.ran is None and is_narrow(r.reason):
        yield (
            "so diagpass runs the model as it stands: same results, same speed; on CUDA under Inductor its "
            "cells one after the other, compiled and recorded"
        )
    else:
        yield "so diagpass runs the model as it stands: same results, same speed"


def _coverage(r: Any) -> Iterator[str]:
    batched = r.coverage["batched_cells"]
    yield (
        f"{batched:,} of {r.cells:,} cells batched, {count(r.waves, 'wave')}, "
        f"mean width {r.mean_width:.2f}, max width {r.max_width}"
    )
    if r.verdict == "wavefront" and batched < r.cells:
        refused = sum(kind["cells"] for kind in r.kinds if kind["unbatchable"])
        alone = r.cells - batched - refused
        if alone > 0:
            yield f"{count(alone, 'cell')} run alone: the wave has no other cell to batch them with"


def _outcome(r: Any) -> str:
    narrow = "" if r.waves >= r.cells else f" instead of {r.cells:,} steps one after the other"
    return f"the cells run in {count(r.waves, 'wave')}{narrow}, with the results of the model as it stands"


def _times(r: Any) -> Iterator[str]:
    flops = total_flops(r.kinds)
    yield f"measured unless it says estimated; the cells have {work(flops)} of matrix products"
    for name, seconds in r.times.items():
        rate = f", {work(flops / seconds)}/s" if seconds and flops else ""
        yield f"{name} {1e3 * seconds:,.2f} ms{rate}"
    sequential, wavefront = r.times.get("sequential"), r.times.get("wavefront")
    if sequential and wavefront:
        yield f"sequential / wavefront: x{sequential / wavefront:.2f} (above 1 the wavefront is faster)"


def _measured(found: dict[str, Any]) -> Iterator[str]:
    clock = "events" if found["clock"] == "events" else "the wall clock"
    waves = found["waves"]
    inside = sum(wave["end"] - wave["begin"] for wave in waves)
    rest = max(found["seconds"] - inside, 0.0)
    yield (
        f"one call on {found['device']} by {clock}: {1e3 * found['seconds']:,.2f} ms, "
        f"{1e3 * inside:,.2f} ms of it in {count(len(waves), 'wave')}, {1e3 * rest:,.2f} ms around them"
    )
    if found["matmul_rate"] and found["fraction"] is not None:
        yield (
            f"{100 * found['fraction']:.3g} % of the {work(found['matmul_rate'])}/s that large "
            f"{found['matmul_dtype']} matrix products sustain here"
        )
    shown = sorted(found["widths"], key=lambda each: -each["waves"] * each["median_seconds"])[:MOST_WIDTHS]
    for each in sorted(shown, key=lambda each: each["width"]):
        rate = "" if each["fraction"] is None else f", {100 * each['fraction']:.3g} % of that rate"
        yield (
            f"width {each['width']}: {count(each['waves'], 'wave')}, median "
            f"{1e3 * each['median_seconds']:,.3f} ms{rate}"
        )
    if len(found["widths"]) > len(shown):
        yield f"and {count(len(found['widths']) - len(shown), 'width')} more that take less"


def _forms(forms: list[dict[str, Any]]) -> Iterator[str]:
    yield f"how groups of cells ran, {count(len(forms), 'choice')}"
    for form in forms[:MOST_FORMS]:
        times = ", ".join(f"{name} {1e3 * seconds:,.3f} ms" for name, seconds in form["seconds"].items())
        looped = f", {form['looped']} of {count(form['products'], 'product')} cell by cell"
        yield (
            f"{letter(form['kind'])}, {count(form['width'], 'cell')}: {form['form']}"
            f"{looped if form['looped'] else ''}{f' (measured: {times})' if times else ''}"
        )
    if len(forms) > MOST_FORMS:
        yield f"and {len(forms) - MOST_FORMS} more"


def _kinds(kinds: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{count(len(kinds), 'kind')}; cells of one kind run the same code and can be batched"
    for kind in kinds[:MOST_KINDS]:
        yield (
            f"{letter(kind['index'])}: {count(kind['cells'], 'cell')}, "
            f"{_of('layer', ranges(kind['layers']))}, {_of('segment', kind['segments'])}; "
            f"each {count(kind['operations'], 'operation')}, "
            f"{work(kind['flops'])}, {size(kind['bytes'])} ({size(kind['weight_bytes'])} of weights), "
            f"first {kind['first']}"
        )
        if kind["unbatchable"]:
            yield f"   runs unbatched: {kind['unbatchable']}"
        if kind["differs"]:
            yield f"   not of kind {letter(kind['differs']['kind'])}: {kind['differs']['text']}"
    if len(kinds) > MOST_KINDS:
        rest = kinds[MOST_KINDS:]
        yield f"and {count(len(rest), 'kind')} more with {sum(k['cells'] for k in rest):,} cells"


def _of(word: str, numbers: str) -> str:
    return f"{word} {numbers}" if numbers.isdigit() else f"{word}s {numbers}"


def _path(r: Any) -> Iterator[str]:
    path = r.critical_path
    if not path["cells"]:
        return
    first, last = r.grid[path["cells"][0]], r.grid[path["cells"][-1]]
    yield (
        f"{count(path['length'], 'cell')}, each needing the one before, so no schedule has fewer waves; "
        f"from {_cell(first)} to {_cell(last)}"
    )
    for step in path["steps"]:
        yield f"{count(step['count'], 'step')} {step['text']}"


def _blocking(r: Any) -> Iterator[str]:
    block = r.blocking
    if block is None:
        yield (
            "no edge: nothing makes the path longer but what every recurrent stack has, the layer below and "
            "a layer's own state"
        )
        return
    yield (
        f"{count(block['count'], 'edge')} {block['reach']}; without them {block['waves_without']:,} waves "
        f"would do instead of {block['waves']:,}. The first:"
    )
    yield f"made by {_cell(block['source'])}{_operation(block['source'])}"
    if block["through"]:
        yield f"handed on by glue{_operation(block['through'])}"
    yield f"read by {_cell(block['target'])}{_operation(block['target'])}"


def _operation(found: dict[str, Any]) -> str:
    where = f": {found['operation']} in {found['module']}" if found["operation"] else ""
    return where + (f" ({found['line']})" if found["line"] else "")


def _cell(cell: dict[str, Any]) -> str:
    return f"{cell['path']} at segment {cell['segment']}"


def _refusal(refusal: dict[str, Any], ran: str | None) -> str:
    where = [f"module {refusal['module']}"] if refusal["module"] else []
    where += [refusal["line"]] if refusal["line"] else []
    place = f" [{', '.join(where)}]" if where else ""
    if refusal["effect"] == "sequential":  # the verdict has the reason already
        effect = "no cell runs beside another" if ran == "wavefront" else "the whole model runs as it stands"
        return f"{effect}{place}"
    return f"cells run one by one: {refusal['what']}{place}"


def _memory(r: Any) -> str:
    memory = r.memory
    copied = f"{size(memory['copied'])} of it a second copy" if memory["copied"] else "no second copy"
    return (
        f"stacked weights {size(memory['weights'])} ({copied}), state {size(memory['state'])} from "
        f"segment to segment, results of the largest wave {size(memory['wave'])}"
    )


def as_text(report: Any) -> str:
    """Plain text, for any terminal."""
    lines = []
    for title, (first, *rest) in sections(report):
        lines.append(f"{title}: {first}")
        lines += [f"  {line}" for line in rest]
    return "\n".join(lines)


def as_rich(report: Any) -> Text:
    """The same text with titles in bold and the verdict in colour."""
    from rich.text import Text

    text = Text()
    for title, (first, *rest) in sections(report):
        style = "bold"
        if title == "verdict":
            style = "bold green" if report.verdict == "wavefront" else "bold yellow"
        elif title in ("refused", "chain", "blocking") and (title != "blocking" or report.blocking):
            style = "bold red"
        text.append(f"{title}: ", style=style)
        text.append("\n".join([first, *(f"  {line}" for line in rest)]) + "\n")
    text.rstrip()
    return text


def as_html(report: Any) -> str:
    """The same text as a table, for notebooks."""
    rows = []
    for title, lines in sections(report):
        body = "<br>".join(html.escape(line) for line in lines)
        rows.append(
            f'<tr><th style="text-align:left;vertical-align:top">{html.escape(title)}</th>'
            f'<td style="text-align:left">{body}</td></tr>'
        )
    return f"<table>{''.join(rows)}</table>"
