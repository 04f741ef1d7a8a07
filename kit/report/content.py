"""The report's content, free of any format: the blocks that Markdown, HTML and PDF render, in the order of a study."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kit.config import BASE
from kit.report import about, differences, people, sections, study
from kit.report.answers import Results
from kit.report.blocks import Block, Bullets, Cell, Figure, Heading, Paragraph, Table
from kit.report.figures import alike
from kit.report.recommendation import recommendation
from kit.report.references import references
from kit.report.rows import COLUMNS, MISSING, SCORES, Row, cell, duration, number, plain
from kit.report.verdicts import Verdict, best, both_ways, ledger

Shown = Callable[[float | None], str]
# What a run cost beside the comparison's columns: where it stands in the row, and how it is shown.
FURTHER: dict[str, tuple[tuple[str, ...], Shown]] = {
    "load": (("phases", "load", "wall_s"), duration), "first step": (("phases", "warmup", "wall_s"), duration),
    "save": (("phases", "save", "wall_s"), duration), "search": (("phases", "search", "wall_s"), duration),
    "tokens trained on": (("tokens_total",), lambda v: number(v, 0)), "supervised tokens": (("tokens_supervised",), lambda v: number(v, 0)),
    "optimiser state": (("optimizer_state_mib",), lambda v: number(v, 1, " MiB")),
    "energy": (("energy", "wh"), lambda v: MISSING if v is None else f"{v:,.3g} Wh"),
    "its price": (("energy", "cost"), lambda v: MISSING if v is None else f"{v:.2g}"),
    "generation": (("generation", "wall_s"), duration), "memory for it": (("generation", "peak_memory_gib"), lambda v: number(v, 2, " GiB")),
}  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """All that a report is written from."""

    results: Results
    found: Sequence[Verdict]
    notes: Sequence[str]
    figures: Sequence[Figure]
    manifest: Mapping[str, Any] | None
    stats: Mapping[str, Any] | None
    rated: Row | None
    sweeps: Sequence[Row] = ()


def document(given: Inputs) -> list[Block]:
    """The whole report; the headline answer comes first."""
    rows, shown, every = given.results.rows, given.results.shown, given.results.every
    unfair = ledger(given.results)
    n = next((v["n"] for v in given.found), None)
    front, lengths = ([f for f in given.figures if f.name == name] for name in (_foremost(shown), "data_lengths"))
    figures = [f for f in given.figures if f not in (*front, *lengths)]
    return [
        Paragraph(study.headline(shown, given.found), "headline"),
        Heading("Comparison"), comparison(shown, given.found), *(Paragraph(note, "note") for note in given.notes), *front,
        Heading("Recommendation"), *(Paragraph(p) for p in recommendation(shown, given.found)),
        *(Paragraph(p) for p in people.advice(given.rated, given.found)),
        *about.introduction(shown), *about.approach(shown, len(unfair), n), *about.data(given.manifest, rows), *lengths,
        Heading("Results"), Bullets(study.results(shown, given.found)), *differences.against_each_other(given.found), *figures,
        *costs(rows), *differences.verdict_table(given.found), *differences.fairness(unfair),
        *sections.scores(every), *sections.secondary(every), *sections.audit(rows), *sections.forgetting(rows),
        *sections.human(rows, given.rated, given.found), *sections.tasks(rows), *sections.hybrids(rows, shown, given.found),
        Heading("Discussion"), *(Paragraph(p) for p in study.discussion(shown, given.found)),
        *sections.samples(given.results), *sections.gates(rows), *about.published(rows), *about.machine(rows),
        *sections.learning_rates(given.sweeps), *about.settings(rows),
        *about.reproduce(rows, given.manifest), *about.limits(rows), *references(rows, given.found, given.rated),
    ]  # fmt: skip


def _foremost(rows: Sequence[Row]) -> str:
    """The figure that a reader sees first: quality against memory, or against time where methods need the same memory."""
    memory = [r["peak_memory_gib"] for r in rows if r["ranked"] and r["peak_memory_gib"] is not None]
    return "time_vs_performance" if len(memory) > 1 and alike(memory) else "memory_vs_performance"


def comparison(rows: Sequence[Row], found: Sequence[Verdict]) -> Table:
    """One row a method; a score is marked only if its method is shown to be better than every other ranked one."""
    base, said = next((r for r in rows if r["method"] == BASE), None), both_ways(found)
    winners = {m: best(rows, said, m) for m in SCORES}
    body = [[Cell(cell(k, r, base), plain(r, k) if k != "label" else None, k in SCORES and winners[k] == r["method"] and r["ranked"]) for k in COLUMNS]
            for r in rows]  # fmt: skip
    caption = (
        "Scores read base → tuned, from 0 to 100 (perplexity: 1 is perfect). Time is that of the optimiser steps but the first, without compiling; peak "
        "memory is what the GPU reserved while training, on a CPU what the process held; adapter is what was saved, the whole model where that was "
        "trained. A row over seeds is their mean (of perplexities the geometric one)."
    )
    return Table([c.title for c in COLUMNS.values()], body, caption, wide=True)


def costs(rows: Sequence[Row]) -> list[Block]:
    """What else training and evaluation took, as far as it was measured; a column that no run has is left out."""

    def found(row: Any, path: Sequence[str]) -> float | None:
        for key in path:
            row = (row or {}).get(key)
        return None if row is None else float(row)

    done = [r for r in rows if r["status"] == "done"]
    known = {name: column for name, column in FURTHER.items() if any(found(r, column[0]) is not None for r in done)}
    body = [[Cell(r["label"]), *(Cell(shown(value := found(r, path)), value) for path, shown in known.values())] for r in done]
    prices = sorted({p for r in done if (p := (r["energy"] or {}).get("price_per_kwh")) is not None})
    text = "Training time and peak memory stand in the comparison. Each was measured once; a hybrid's include its parts'."
    text += " Energy is that of the GPU over all steps." if "energy" in known else ""
    text += f" Price: at {' or '.join(f'{p:g}' for p in prices)} a kilowatt-hour." if prices else ""
    return [Heading("Further costs", 3), Paragraph(text), Table(["run", *known], body, wide=True)] if known else []
