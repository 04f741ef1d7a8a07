"""The report's files, all from one set of rows: report.md, report.html, report.pdf, comparison_table.csv, summary.json and the figures."""

from __future__ import annotations

import csv
import errno
import io
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from kit.config import BASE, RunConfig
from kit.console import say
from kit.errors import UserError
from kit.files import sha256, write_bytes, write_json, write_text
from kit.gates import SHORTEST
from kit.report.about import read_optional, values
from kit.report.answers import Results, gather, human
from kit.report.blocks import Block
from kit.report.content import Inputs, document
from kit.report.figures import draw
from kit.report.ranking import contenders, families
from kit.report.rows import COSTS, SCORES, SECONDARY, Row, place
from kit.report.shapes import MANIFEST, STATS, SWEEP
from kit.report.study import standing
from kit.report.verdicts import Verdict, both_ways, verdicts
from kit.report.words import counted, names

SCHEMA = 1
# Scripts that put no spaces between words, by the names of their letters in Unicode.
SPACELESS = ("CJK", "HIRAGANA", "KATAKANA", "THAI", "LAO", "KHMER", "MYANMAR")
# Where a reader is told of it beside the answer.
RESEMBLING, CUT = 0.1, 0.25
FORMATS = {"md": "markdown", "html": "html", "pdf": "pdf"}


def build(config: RunConfig) -> tuple[Results, list[str], list[Verdict]]:
    """Writes the report of one experiment; returns its results, warnings and verdicts."""
    out = Path(config.report_dir)
    given = inputs(config)
    own_folder(out, config.name)
    groups = families(both_ways(given.found), [r["method"] for r in contenders(given.results.shown)]) if given.found else ()
    given = replace(given, figures=draw(given.results, given.rated, given.stats, out / "figures", groups))
    write_json(out / "summary.json", summary(given))
    write_text(out / "comparison_table.csv", table_csv(given.results.every))
    problems = render(f"Fine-tuning comparison: {config.name}", document(given), out)
    return given.results, [*given.notes, *problems], list(given.found)


def own_folder(out: Path, name: str) -> None:
    """A folder with a report that is not the kit's is a UserError; that another experiment's is replaced is said."""
    there = [f"report.{ending}" for ending in FORMATS if (out / f"report.{ending}").exists()]
    if there and not (out / "summary.json").exists():
        raise UserError(f"{out} holds {there[0]} and no summary.json: it is none of the kit's reports; choose another --report-dir")
    before = read_optional(out / "summary.json", {})[0] or {}
    runs = {Path(str(row.get("run"))).parent.name for row in before.get("rows", ()) if isinstance(row, dict) and row.get("run")}
    if runs and runs != {name}:
        say(f"{out} held the report of {', '.join(sorted(runs))}, which this one replaces; --report-dir gives each a folder of its own")


def inputs(config: RunConfig) -> Inputs:
    """All that the report says, but for the figures; what cannot be read is left out and named in the notes."""
    folder = Path(config.runs_dir) / config.name
    results = gather(folder)
    found, notes = verdicts(results)
    manifest, unread = read_optional(config.data_path / "manifest.json", MANIFEST)
    stats, no_stats = read_optional(config.data_path / "dataset_stats.json", STATS)
    if manifest and any(r["provenance"]["data"] != sha256(config.data_path / "manifest.json") for r in results.rows if r["provenance"]):
        manifest = stats = None
        unread.append(f"{config.data_path} was rebuilt after these runs were made: it is not the data they saw, and is not described here")
    swept = [read_optional(path, SWEEP) for path in sorted((folder / "sweep").glob("*.json"), key=lambda path: place(path.stem))]
    no_sweeps = [note for _, lacking in swept for note in lacking]
    notes = [*warnings(results, found), *notes, *unread, *no_stats, *no_sweeps, *unseen(stats, results.rows)]
    try:
        rated = human(folder, results)
    except UserError as error:
        rated, notes = None, [*notes, *error.problems]
    return Inputs(results, found, [*notes, *_cut(manifest)], [], manifest, stats, rated, [sweep for sweep, _ in swept if sweep])


def _cut(manifest: Mapping[str, Any] | None) -> list[str]:
    """Whether the maximum length cuts a good part of the test rows, so that what is scored is not what was asked."""
    fits = manifest["truncated"].get("test") if manifest else None
    if not manifest or not fits or (cut := 1 - fits.get("whole", 0) / sum(fits.values())) <= CUT:
        return []
    length = manifest["inputs"]["max_length"]
    return [f"{cut:.0%} of the test rows are longer than the maximum length of {length:,} tokens: prompts lost turns or text, or references their end"]


def unseen(stats: Mapping[str, Any] | None, rows: Sequence[Row]) -> list[str]:
    """Whether the metrics of words see the test rows' words, as they split text."""
    scripts: dict[str, int] = ((stats or {}).get("splits", {}).get("test") or {}).get("scripts") or {}
    whole = sum(scripts.values()) or 1
    other = sum(n for script, n in scripts.items() if script not in ("LATIN", "none")) / whole
    spaceless = {script: n / whole for script, n in scripts.items() if script in SPACELESS}
    one_word = "in scripts without spaces, whose sentences {} takes for words: score by --score-tokens {}"
    said = {
        "13a": (other, "not in Latin letters: ROUGE-L counts a to z and digits alone, and BLEU-4 takes Chinese or Thai text without spaces for one word; "
                       "there look at perplexity and chrF, or score by --score-tokens zh or char, or intl for scripts with spaces"),
        "intl": (sum(spaceless.values()), one_word.format("intl", "zh (Chinese) or char")),
        "zh": (sum(spaceless.values()) - spaceless.get("CJK", 0), one_word.format("zh", "char")),
    }  # fmt: skip
    done = {r["score_tokens"] for r in rows if r["status"] == "done"}
    return [f"{share:.0%} of the test rows are {text}" for tokens, (share, text) in said.items() if tokens in done and share > RESEMBLING]


def summary(given: Inputs) -> dict[str, Any]:
    """summary.json."""
    rows = given.results.every
    recipe = next(iter(values("recipe", rows)), None)
    return {"schema": SCHEMA, "recipe": recipe, "rows": [public(r) for r in rows], "verdicts": given.found, "human": given.rated, "warnings": given.notes}


def render(title: str, blocks: Sequence[Block], out: Path) -> list[str]:
    """Writes report.md, report.html and report.pdf; one that fails is removed, costs no other and is named in what is returned."""
    problems = []
    for ending, name in FORMATS.items():
        path = out / f"report.{ending}"
        try:
            renderer = import_module(f"kit.report.{name}")
            made = renderer.render(title, blocks) if ending == "md" else renderer.render(title, blocks, out / "figures")
            write_bytes(path, made if isinstance(made, bytes) else made.encode())
        except Exception as error:  # whatever it is: the others hold the same content
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
                raise
            path.unlink(missing_ok=True)
            problems.append(f"{path.name} could not be made ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'})")
    return problems


def public(row: Row) -> Row:
    """What summary.json holds of a row."""
    keys = ("method", "seed", "status", "reason", "ranked", "gates", *SCORES, *SECONDARY, *COSTS, "per_source", "generation", "leaks", "forgetting", "tasks",
            "precision", "provenance", "run", "parts", "tried")  # fmt: skip
    return {k: row.get(k) for k in keys} | ({"runs": row["runs"]} if "runs" in row else {})


def warnings(results: Results, found: Sequence[Verdict]) -> list[str]:
    """What a reader must know before comparing the rows."""
    rows = results.rows
    notes = [f"{r['label']}: {reason}" for r in rows for reason in (r["reason"], *r["problems"]) if reason]
    flagged = max((x["flagged"] / r["bleu4"]["n"] for r in rows if r["method"] != BASE and (x := r["leaks"]) and (r["bleu4"] or {}).get("n")), default=0)
    if flagged > RESEMBLING:
        shown, gone = standing(found)
        left, differences = len(shown) - len(gone), counted(len(shown), "difference", "differences")
        stand = f", and {left} of the {differences} {'stands' if left == 1 else 'stand'} without them" if shown else ""
        notes.append(f"{flagged:.0%} of the test rows resemble training rows: all scores and verdicts count them; Length and leaks has the scores without "
                     f"them{stand}")  # fmt: skip
    done = [r for r in rows if r["status"] == "done"]
    if short := [r for r in rows if r["steps"] is not None and r["steps"] < SHORTEST]:
        made = names([f"{r['label']} {r['steps']}" for r in short])
        notes.append(f"optimiser steps: {made}; too few to judge a method by")
    if len({r["provenance"]["data"] for r in rows if r["provenance"]}) > 1:
        notes.append("the runs were made on different data; their scores cannot be compared")
    if len(by := sorted({r["score_tokens"] for r in done})) > 1:
        notes.append(f"BLEU-4 and ROUGE-L of these runs count different tokens ({', '.join(by)}) and cannot be compared; scripts/eval.py RUN --score-tokens "
                     f"{by[0]} scores a run anew")  # fmt: skip
    if not any(r["method"] == BASE for r in done):
        notes.append("the base model was not evaluated; there is no before to compare with")
    return notes


def table_csv(rows: Sequence[Row]) -> str:
    """One line a run and a mean over seeds; scores with the ends of their 95% intervals."""
    text = io.StringIO()
    metrics = (*SCORES, *SECONDARY)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", "seed", "status", "ranked", "reason"] + [f"{m}{end}" for m in metrics for end in ("", "_low", "_high")] + list(COSTS))
    for row in rows:
        found: list[Any] = [(row[m] or {}).get(end) for m in metrics for end in ("value", "low", "high")]
        about = [row[k] for k in ("method", "seed", "status", "ranked", "reason")]
        writer.writerow(["" if v is None else v for v in [*about, *found, *(row[c] for c in COSTS)]])
    return text.getvalue()
