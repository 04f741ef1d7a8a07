"""The learning rates that sweeps tried: runs/NAME/sweep/METHOD.json as a section of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kit.methods import METHODS
from kit.report.about import read_optional
from kit.report.blocks import Block, Cell, Heading, Paragraph, Table
from kit.report.rows import Row, number, title
from kit.report.shapes import NUMBER, OPTIONAL

SWEEP = {"method": str, "budget": {"rows": NUMBER}, "curve": [{"learning_rate": NUMBER, "valid_perplexity": OPTIONAL}], "best": NUMBER}


def sweeps(experiment: Path) -> tuple[list[Row], list[str]]:
    """The experiment's sweeps in the order of the methods, and a note on each file that cannot be read."""
    order = list(METHODS)
    paths = sorted((experiment / "sweep").glob("*.json"), key=lambda path: (order.index(path.stem) if path.stem in order else len(order), path.stem))
    found = [read_optional(path, SWEEP) for path in paths]
    return [sweep for sweep, _ in found if sweep], [note for _, notes in found for note in notes]


def learning_rates(found: Sequence[Row]) -> list[Block]:
    """One row for each rate of each method."""
    if not found:
        return []
    text = (
        "Short trainings on as many rows as stated, judged by the perplexity of validation rows; test rows were not opened for it. "
        "A rate without a perplexity diverged or changed nothing. The runs that were made with --tuned use the best one."
    )
    body = [_point(sweep, point) for sweep in found for point in sweep["curve"]]
    return [Heading("Learning rates tried"), Paragraph(text), Table(["method", "best", "learning rate", "validation perplexity", "rows"], body, texts=2)]


def _point(sweep: Row, point: Row) -> list[Cell]:
    rate, perplexity, rows = point["learning_rate"], point["valid_perplexity"], sweep["budget"]["rows"]
    mark = "yes" if rate == sweep["best"] else ""
    return [Cell(title(sweep["method"])), Cell(mark), Cell(f"{rate:g}", rate), Cell(number(perplexity, 3), perplexity), Cell(number(rows, 0), rows)]
