"""Which differences are real, and which pairs are not ranked: verdicts as blocks, at a glance and one by one."""

from __future__ import annotations

from collections.abc import Sequence

from kit.report import study
from kit.report.blocks import Block, Bullets, Cell, Heading, Paragraph, Table
from kit.report.rows import COLUMNS, MISSING, number, title
from kit.report.sections import amount
from kit.report.verdicts import LEGEND, Verdict, by_reason, matrix
from kit.report.words import percent
from kit.resampling import RESAMPLES


def against_each_other(found: Sequence[Verdict]) -> list[Block]:
    """All verdicts at a glance."""
    rows, metrics = matrix(found), dict.fromkeys(COLUMNS[v["metric"]].title for v in found)
    if len(rows) < 3:
        return []
    caption = f"The row's method against the column's, on {', '.join(metrics)} in this order. {LEGEND}"
    body = [[Cell(text) for text in row] for row in rows]
    return [Table(["method", *(row[0] for row in rows)], body, caption, texts=1 + len(rows), wide=True)]


def verdict_table(found: Sequence[Verdict]) -> list[Block]:
    """Each pair of methods on each metric: what can be said about the difference, and how much data would decide what cannot."""
    if not found:
        return []
    heads = ["metric", "a", "b", "verdict on a", "a − b", "95% interval", "p (Holm)", "detectable", "rows to decide"]
    body = [[Cell(COLUMNS[v["metric"]].title), Cell(title(v["a"])), Cell(title(v["b"])), Cell(_verdict(v)),
             *_difference(v), amount(v["p_holm"], 4), *_power(v)] for v in found]  # fmt: skip
    fair = sum(not v["confounded"] for v in found)
    changed = any("without leaks" in _verdict(v) for v in found)
    leaky = " Without leaks: on the test rows that resemble no training row, where the verdict is another one." if changed else ""
    margins = ", ".join({v["metric"]: f"{COLUMNS[v['metric']].title} {_margin(v)}" for v in found}.values())
    text = (
        f"How verdicts are reached stands under Approach. Equivalent: the interval lies within the margin ({margins}). "
        "Perplexities differ in percent of b's. Detectable: the smallest difference found with 80% power, or none that the scale has. "
        f"With {RESAMPLES:,} resamples and {fair:,} comparisons that count the smallest p possible is {max(fair, 1) / (1 + RESAMPLES):.4f}. "
        "Confounded pairs differ in more than the method, or failed a check, and must not be ranked." + leaky
    )
    return [Heading("Which differences are real?", 3), Paragraph(text), Table(heads, body, texts=4, wide=True)]


def _verdict(v: Verdict) -> str:
    other = f", without leaks {v['clean']['verdict']}" if v["clean"] and v["clean"]["verdict"] != v["verdict"] else ""
    return f"{v['verdict']}{other}{' (confounded)' if v['confounded'] else ''}"


def _in_unit(v: Verdict, key: str) -> str:
    return f"{percent(v[key]):,.1f}%" if v["unit"] == "log %" else number(v[key], 2)


def _margin(v: Verdict) -> str:
    if v["unit"] == "log %":
        return f"{percent(v['margin']):.2g}%"
    return f"{v['margin']:g} point{'' if v['margin'] == 1 else 's'}"


def _difference(v: Verdict) -> list[Cell]:
    """a minus b with its interval; of logarithms in percent of the score itself."""
    ends = [_in_unit(v, k) for k in ("delta", "low", "high")]
    return [Cell(ends[0], v["delta"]), Cell(f"[{ends[1]}, {ends[2]}]")]


def _power(v: Verdict) -> list[Cell]:
    """What could have been found, and how many rows would decide, of a comparison that is open."""
    if v["verdict"] != "cannot tell":
        return [Cell(MISSING), Cell(MISSING)]
    return [Cell(_in_unit(v, "detectable"), v["detectable"]) if study.possible(v) else Cell("none"), amount(v["needed"], 0)]


def fairness(unfair: Sequence[tuple[str, str, list[str]]]) -> list[Block]:
    """The pairs that are shown but not ranked, by their reasons."""
    grouped = by_reason(unfair)
    if not grouped:
        return []
    text = "These pairs differ in more than the method, or one of the runs failed a check; they are not ranked."
    return [Heading("Fairness", 3), Paragraph(text), Bullets(grouped)]
