"""report.md: the blocks as GitHub shows them."""

from __future__ import annotations

import re
from collections.abc import Sequence

from kit.console import printable
from kit.report.blocks import BEST, Block, Bullets, Cell, Code, Figure, Heading, Paragraph, Sample, Samples, Table


def render(title: str, blocks: Sequence[Block]) -> str:
    """The whole file; figures are named relative to it, as figures/NAME.png."""
    return "\n\n".join([f"# {escape(title)}", *(part for block in blocks for part in _parts(block))]) + "\n"


def _parts(block: Block) -> list[str]:
    """A block as Markdown paragraphs, tables and lists; a blank line goes between two of them."""
    match block:
        case Heading(text, level):
            return [f"{'#' * level} {escape(text)}"]
        case Paragraph(text, kind):
            return [{"headline": "**{}**", "note": "> **Note:** {}"}.get(kind, "{}").format(escape(text))]
        case Bullets(items):
            return ["\n".join(f"- {escape(item)}" for item in items)]
        case Table():
            return _table(block)
        case Figure(name, caption):
            return [f"![{escape(caption)}](figures/{name}.png)", escape(caption)]
        case Code(text):
            return [fenced(text)]
        case Samples(samples):
            return [part for sample in samples for part in _sample(sample)]


def _table(table: Table) -> list[str]:
    rules = ["---" if i < table.texts else "---:" for i in range(len(table.heads))]
    rows = [[escape(h) for h in table.heads], rules, *([_cell(c) for c in row] for row in table.rows)]
    grid = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    legend = [BEST] if any(c.best for row in table.rows for c in row) else []
    return [*([escape(table.caption)] if table.caption else []), grid, *legend]


def _cell(cell: Cell) -> str:
    return f"**{escape(cell.text)}** ★" if cell.best else escape(cell.text)


def _sample(sample: Sample) -> list[str]:
    parts = [f"### {escape(sample.title)}", "Prompt:", fenced(sample.prompt)]
    parts += ["Reference:", fenced(sample.reference)] if sample.reference is not None else []
    return parts + [part for run, reply in sample.replies for part in (f"{escape(run)}:", fenced(reply or "(empty)"))]


def escape(text: str) -> str:
    """Text that stays text: on one line, with everything spelled out or escaped that Markdown, HTML or a table cell would obey."""
    line = re.sub(r"([\\`*~<>\[\]|$]|&(?=#?\w+;)|\b_|_\b)", r"\\\1", " ".join(printable(text).split()))
    # What starts a list, a heading or a rule at the start of a line.
    return re.sub(r"^([-+=#](?!\w)|\d+(?=[.)](?:\s|$)))", lambda m: f"{m[0]}\\" if m[0].isdigit() else f"\\{m[0]}", line)


def fenced(text: str) -> str:
    """A code block that no text can close: its fence is longer than any run of backticks inside."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 0)
    return f"{fence}text\n{printable(text)}\n{fence}"
