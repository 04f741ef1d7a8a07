"""The report's files, all from one set of rows: report.md, comparison_table.csv, summary.json and the figures."""

from __future__ import annotations

import contextlib
import csv
import io
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit.config import RunConfig, load_recipe, recipes
from kit.console import counts
from kit.errors import UserError
from kit.files import read_json, read_jsonl, write_json, write_text
from kit.methods import METHODS
from kit.report.figures import draw, draw_lengths
from kit.report.rows import COLUMNS, SCORES, Row, cell, collect, curves, duration, interval, number
from kit.report.verdicts import ledger, safely

SCHEMA = 1
SAMPLES = 2
COSTS = ("peak_memory_gib", "train_wall_s", "tokens_per_s", "trainable_params", "adapter_mib")


def build(config: RunConfig) -> tuple[list[Row], list[str], list[Row]]:
    """Writes the report of one experiment; returns its rows, warnings and verdicts."""
    rows = collect(Path(config.runs_dir) / config.name)
    out = Path(config.report_dir)
    found, problems = safely(rows)
    notes = warnings(rows) + problems
    figures = draw(rows, curves(rows), out / "figures")
    stats = config.data_path / "dataset_stats.json"
    figures += [draw_lengths(read_json(stats), out / "figures" / "data_lengths.png")] if stats.exists() else []
    summary = {"schema": SCHEMA, "recipe": next(iter(used("recipe", rows)), None), "rows": [public(r) for r in rows], "verdicts": found, "warnings": notes}
    write_json(out / "summary.json", summary)
    write_text(out / "comparison_table.csv", table_csv(rows))
    write_text(out / "report.md", "\n".join(markdown(config, rows, notes, found, [f.relative_to(out).as_posix() for f in figures])) + "\n")
    return rows, notes, found


def public(row: Row) -> Row:
    """What summary.json holds of a row."""
    keys = ("method", "seed", "status", "reason", "ranked", "gates", *SCORES, *COSTS, "per_source", "generation", "precision", "provenance", "run")
    return {k: row.get(k) for k in (*keys, "parts", "tried")}


def warnings(rows: Sequence[Row]) -> list[str]:
    """What a reader must know before comparing the rows."""
    notes = [f"{cell('label', r, None)}: {r['reason']}" for r in rows if r["reason"]]
    hashes = {r["provenance"]["data"] for r in rows if r.get("provenance")}
    if len(hashes) > 1:
        notes.append("the runs were made on different data; their scores cannot be compared")
    if not any(r["method"] == "base" for r in rows):
        notes.append("the base model was not evaluated; there is no before to compare with")
    return notes


def table_csv(rows: Sequence[Row]) -> str:
    """One line a run; scores with the ends of their 95% intervals."""
    text = io.StringIO()
    heads = ["method", "seed", "status"] + [f"{m}{end}" for m in SCORES for end in ("", "_low", "_high")] + list(COSTS)
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(heads)
    for row in rows:
        values = [(row[m] or {}).get(end) for m in SCORES for end in ("value", "low", "high")]
        writer.writerow(["" if v is None else v for v in [row["method"], row["seed"], row["status"], *values, *(row[c] for c in COSTS)]])
    return text.getvalue()


def markdown(config: RunConfig, rows: Sequence[Row], notes: Sequence[str], found: Sequence[Row], figures: Sequence[str]) -> list[str]:
    """report.md as lines."""
    base = next((r for r in rows if r["method"] == "base"), None)
    about = [load_recipe(name)["about"] for name in used("recipe", rows) if name in recipes()]
    lines = [f"# Fine-tuning comparison: {config.name}", "", *about, "", *_setting(rows), ""]
    lines += ["## Comparison", "", *grid([c.title for c in COLUMNS.values()], [[cell(k, r, base) for k in COLUMNS] for r in rows]), ""]
    lines += ["Scores read base → tuned, on a scale of 0–100 (perplexity: 1 is perfect). Time is that of the optimiser steps alone.", ""]
    lines += [f"> **Note:** {escape(note)}" for note in notes] + ([""] if notes else [])
    lines += [*_verdicts(found), *_ledger(rows), "## Scores with 95% intervals", "", *_scores(rows), ""]
    lines += [line for name in figures for line in (f"![{Path(name).stem.replace('_', ' ')}]({name})", "")]
    lines += [*_replies(rows), "## Sample generations", "", *samples(rows), *_data(config, rows), *_hybrids(rows), *_gates(rows), *_published(rows)]
    lines += _settings(rows)
    return lines


def _setting(rows: Sequence[Row]) -> list[str]:
    known = next((r for r in rows if r.get("provenance")), None)
    if known is None:
        return []
    where = known["provenance"]
    machine = where["gpu"] or f"CPU ({where['cpu']}; {where['gpu_absent_because']})"
    versions = ", ".join(f"{k} {v}" for k, v in where["versions"].items() if v)
    return [f"Machine: {machine}. Precision: {known['precision']['name']} ({known['precision']['reason']}).", "", f"Versions: {versions}."]


def _verdicts(found: Sequence[Row]) -> list[str]:
    """Each pair of methods on each metric: what can be said about the difference, and how much data would decide what cannot."""
    if not found:
        return []
    heads = ["metric", "a", "b", "a − b", "95% interval", "p (Holm)", "verdict on a", "detectable", "rows to decide"]
    body = [[COLUMNS[v["metric"]].title, title(v["a"]), title(v["b"]), number(v["delta"], 2), f"[{number(v['low'], 2)}, {number(v['high'], 2)}]",
             number(v["p_holm"], 4), v["verdict"] + (" (confounded)" if v["confounded"] else ""), number(v["detectable"], 2), number(v["needed"], 0)]
            for v in found]  # fmt: skip
    margins = ", ".join(f"{COLUMNS[m].title} {margin:g} {unit}" for m, (margin, unit) in {v["metric"]: (v["margin"], v["unit"]) for v in found}.items())
    about = (
        "Paired by test row (bootstrap, 10,000 resamples, Holm-corrected over the whole table). Equivalent: the interval lies within the margin "
        f"({margins}). Perplexity differences are 100 times those of the logarithm. Detectable: the smallest difference found with 80% power."
    )
    return ["## Which differences are real?", "", about, "", *grid(heads, body), ""]


def title(method: str) -> str:
    return METHODS[method].title if method in METHODS else method


def _ledger(rows: Sequence[Row]) -> list[str]:
    """The pairs that are shown but not ranked, with the reasons."""
    lines = [f"- {escape(a)} and {escape(b)}: {escape('; '.join(reasons))}" for a, b, reasons in ledger(rows)]
    heading = ["## Fairness", "", "These pairs differ in more than the method; their differences are shown but must not be ranked.", ""]
    return [*heading, *lines, ""] if lines else []


def _scores(rows: Sequence[Row]) -> list[str]:
    """Every run, overall and by source."""
    body = []
    for row in rows:
        for name, block in {"all": {m: row[m] for m in SCORES}, **(row["per_source"] or {})}.items():
            body.append([cell("label", row, None), name, *(interval(block[m]) for m in SCORES)])
    return grid(["method", "source", *(COLUMNS[m].title for m in SCORES)], body)


def _replies(rows: Sequence[Row]) -> list[str]:
    made = [r for r in rows if r["generation"]]
    heads = ["method", "empty", "unfinished", "tokens a reply"]
    body = [[cell("label", r, None), str(g["empty"]), str(g["unfinished"]), number(g["mean_reply_tokens"], 1)] for r in made if (g := r["generation"])]
    signatures = [f"- {COLUMNS[m].title}: {escape(score['signature'])}" for m in SCORES if (score := made[0][m])] if made else []
    return ["## Replies", "", *grid(heads, body), "", "How the scores are computed:", "", *signatures, ""] if made else []


def grid(heads: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; the first column is text, the others are numbers."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return ["| " + " | ".join(escape(c) for c in row) + " |" for row in (heads, rule, *body)]


def escape(text: str) -> str:
    """Text that stays text inside Markdown and a table cell."""
    return re.sub(r"([\\`*<>\[\]|])", r"\\\1", text).replace("\n", " ") if set(text) - set("-:") else text


def fenced(text: str) -> list[str]:
    """A code block that no text can close: its fence is longer than any run of backticks inside."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}text", *text.split("\n"), fence]


def samples(rows: Sequence[Row]) -> list[str]:
    """The same test prompts for every run, side by side: SAMPLES of each source, drawn by a fixed seed."""
    answers: dict[str, dict[str, Row]] = {}
    for row in rows:
        path = Path(row["run"]) / "predictions.jsonl"
        if row["status"] == "done" and path.exists():
            with contextlib.suppress(UserError):  # a damaged file is among the notes already
                answers[cell("label", row, None)] = {p["id"]: p for p in read_jsonl(path)}
    if not answers:
        return ["No run has replies yet.", ""]
    first = next(iter(answers.values()))
    by_source: dict[str, list[str]] = {}
    for key in sorted(first):
        by_source.setdefault(first[key]["source"], []).append(key)
    lines = []
    for source, keys in sorted(by_source.items()):
        for key in random.Random(0).sample(keys, min(SAMPLES, len(keys))):
            lines += [f"### {source}", "", "Prompt:", "", *fenced(first[key]["prompt"]), "", "Reference:", "", *fenced(first[key]["reference"]), ""]
            for label, found in answers.items():
                if key in found:
                    lines += [f"{escape(label)}:", "", *fenced(found[key]["prediction"] or "(empty)"), ""]
    return lines


def used(setting: str, rows: Sequence[Row]) -> list[Any]:
    """The values that the runs were made with, unset ones left out."""
    return sorted({r["config"][setting] for r in rows if r.get("config", {}).get(setting) is not None})


def _data(config: RunConfig, rows: Sequence[Row]) -> list[str]:
    path = config.data_path / "manifest.json"
    if not path.exists():
        return []
    try:
        manifest = read_json(path)
    except UserError as error:
        return [f"> **Note:** {escape(str(error))}", ""]
    heads = ["source", "origin", "rows in", "kept", "train", "test", "dropped"]
    body = [[n, s["origin"] + (f" @ {s['revision'][:12]}" if s["revision"] else ""), *(f"{s[k]:,}" for k in ("rows_in", "kept", "train", "test")),
             counts(s["dropped"])] for n, s in manifest["sources"].items()]  # fmt: skip
    cut = [f"{split}: {counts(c)}." for split, c in manifest["truncated"].items()]
    limits = [f"the first {n:,} {split} rows" for split in ("train", "test") for n in used(f"limit_{split}", rows)]
    limited = [f"These runs used only {' and '.join(limits)}.", ""] if limits else []
    found, left = manifest["duplicates"], manifest["leaks"]
    audit = (
        f"{found['exact']:,} exact duplicates were dropped. {found['near']:,} rows in {found['groups']:,} groups of near duplicates (word 3-gram "
        f"similarity of {found['similarity']} or more, or the same prompt) were kept on one side of the split each. Test rows whose whole prompt is also "
        f"in training: {left['same_prompt']['test_rows']:,}; whose first question is: {left['same_opening']['test_rows']:,}."
    )
    return ["## Data", "", *grid(heads, body), "", *limited, audit, "", f"At {manifest['inputs']['max_length']} tokens a row, {' '.join(cut)}", ""]


def _hybrids(rows: Sequence[Row]) -> list[str]:
    """What the parts of the hybrid runs cost, and every combination that was tried."""
    lines = []
    for row in (r for r in rows if r["parts"]):
        parts = [f"{METHODS[p['method']].title} (rank {p['rank']}, {p['steps']} steps, {duration(p['train_wall_s'])}, validation perplexity "
                 f"{number(p['valid_perplexity'], 3)})" for p in row["parts"]]  # fmt: skip
        lines += [f"{escape(cell('label', row, None))}: built on {escape(', '.join(parts))}; its time and tokens include theirs.", ""]
        names = [p["method"] for p in row["parts"]]
        heads = ["combination", *(METHODS[name].title for name in names), "validation perplexity"]
        tried = [[t["kind"], *(number(t["weights"].get(n, 0.0), 2) for n in names), number(t["valid_perplexity"], 3)] for t in row["tried"] or []]
        lines += [*grid(heads, tried), ""] if tried else []
    return ["## Hybrids", "", *lines] if lines else []


def _gates(rows: Sequence[Row]) -> list[str]:
    """Did it train? Every check of every run."""
    words = {True: "passed", False: "**failed**", None: "not judged"}
    body = [f"- {escape(cell('label', r, None))}, {name.replace('_', ' ')}: {words[gate['passed']]}; {escape(gate['detail'])}"
            for r in rows for name, gate in r["gates"].items()]  # fmt: skip
    return ["## Did it train?", "", *body, ""] if body else []


def _published(rows: Sequence[Row]) -> list[str]:
    """The figures of the set-up that the recipe follows, as printed there and set apart: their protocols are not stated, so they compare with nothing here."""
    recipe = next((load_recipe(name) for name in used("recipe", rows) if name in recipes()), {})
    if not recipe.get("published"):
        return []

    def pair(values: Sequence[float | None]) -> str:
        return " → ".join("—" if v is None else f"{v:g}" for v in values)

    heads = ["method", "BLEU-4", "ROUGE-L", "memory (GB)", "time"]
    body = [[METHODS[p["method"]].title, pair(p["bleu4"]), pair(p["rouge_l"]), pair([p["memory_gb"]]), duration(p["time_s"])] for p in recipe["published"]]
    unstated = f"Not comparable with the figures above: scales and protocols differ. Left unstated there: {', '.join(recipe['unstated'])}."
    return ["## Published figures of this set-up", "", *grid(heads, body), "", escape(unstated), ""]


def _settings(rows: Sequence[Row]) -> list[str]:
    """Every setting of every run, one column a run."""
    known = {cell("label", r, None): r["config"] for r in rows if "config" in r and r["method"] != "base"}
    if not known:
        return []
    keys = list(next(iter(known.values())))
    body = [[k, *(_value(c.get(k)) for c in known.values())] for k in keys]
    return ["## Settings", "", *grid(["setting", *known], body)]


def _value(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return "—" if value in (None, "") else str(value)
