"""Is a difference real, and is the comparison fair? Paired verdicts over the runs' predictions, and the ledger of what else differs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from kit.config import BASE, TRAINING_FIELDS, load_recipe, recipes
from kit.errors import UserError
from kit.files import read_jsonl
from kit.methods import METHODS
from kit.report.rows import SCORES, Row, cell

# What must be the same in two runs beyond their settings, by the name a reader sees.
ALIKE = {"data": "data", "gpu": "GPU", "cpu": "CPU", "versions": "versions", "git": "code revision"}


def verdicts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """kit.statistics.compare over every pair of methods (seeds together), each with `confounded`: the reasons why it must not be ranked."""
    from kit.metrics import METRICS
    from kit.statistics import compare

    groups = grouped(rows)
    if len(groups) < 2:
        return []
    predictions = {m: [_answers(row) for row in found] for m, found in groups.items()}
    ids = sorted(set.intersection(*(set(p) for found in predictions.values() for p in found)))
    if not ids:
        return []
    metrics = {name: METRICS[name] for name in SCORES}
    sources = [next(iter(predictions.values()))[0][i]["source"] for i in ids]
    statistics = {m: [{name: metric.statistics([p[i] for i in ids]) for name, metric in metrics.items()} for p in found] for m, found in predictions.items()}
    reasons = {pair: confounded(groups[pair[0]], groups[pair[1]]) for pair in combinations(groups, 2)}
    return [found | {"confounded": reasons[found["a"], found["b"]]} for found in compare(statistics, sources, metrics, untrained=[BASE])]


def grouped(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The evaluated runs by method, in the rows' order."""
    out: dict[str, list[Row]] = {}
    for row in rows:
        if row["status"] == "done" and (Path(row["run"]) / "predictions.jsonl").exists():
            out.setdefault(row["method"], []).append(row)
    return out


def _answers(row: Row) -> dict[str, Row]:
    return {p["id"]: p for p in read_jsonl(Path(row["run"]) / "predictions.jsonl")}


def confounded(first: Sequence[Row], second: Sequence[Row]) -> list[str]:
    """Why a difference between two methods' runs may not be the methods': gates that failed, and what differs beyond the methods themselves."""
    reasons = [r["reason"] for r in (*first, *second) if not r["ranked"]]
    a, b = first[0], second[0]
    base = BASE in (a["method"], b["method"])
    allowed = {"method", *own_settings(a), *own_settings(b)} | (set(TRAINING_FIELDS) if base else set())
    for key in sorted(a["config"].keys() | b["config"].keys()):
        if key not in allowed and key != "seed" and (x := a["config"].get(key)) != (y := b["config"].get(key)):
            reasons.append(f"{key} {x!r} and {y!r}")
    if not base and sorted(r["seed"] for r in first) != sorted(r["seed"] for r in second):
        reasons.append("other seeds")
    for key, name in ALIKE.items():
        if (a["provenance"] or {}).get(key) != (b["provenance"] or {}).get(key):
            reasons.append(f"another {name}" if key != "versions" else "other versions of the libraries")
    if (a["precision"] or {}).get("name") != (b["precision"] or {}).get("name"):
        reasons.append("another precision")
    if not base and a["tokens_supervised"] != b["tokens_supervised"]:
        reasons.append(f"{a['tokens_supervised']:,} and {b['tokens_supervised']:,} supervised tokens" if a["tokens_supervised"] and b["tokens_supervised"]
                       else "supervised tokens not known")  # fmt: skip
    return reasons


def own_settings(row: Row) -> set[str]:
    """The settings that belong to a method: its entry's, its parts', and the recipe's block for it. They differ because the methods do."""
    method = METHODS.get(row["method"])
    recipe = row["config"].get("recipe")
    block: Mapping[str, Any] = load_recipe(recipe).get("methods", {}).get(row["method"], {}) if recipe in recipes() else {}
    return set(method.settings if method else {}) | set(block)


def ledger(rows: Sequence[Row]) -> list[tuple[str, str, list[str]]]:
    """(method, method, reasons) of every pair of evaluated methods that is not fair to rank."""
    groups = grouped(rows)
    labels = {m: cell("label", found[0] | {"seed": 0, "status": "done"}, None) for m, found in groups.items()}
    pairs = ((a, b, confounded(groups[a], groups[b])) for a, b in combinations(groups, 2))
    return [(labels[a], labels[b], reasons) for a, b, reasons in pairs if reasons]


def safely(rows: Sequence[Row]) -> tuple[list[dict[str, Any]], list[str]]:
    """The verdicts, or none and the reason: a damaged predictions file never stops the report."""
    try:
        return verdicts(rows), []
    except (UserError, KeyError, TypeError) as error:
        return [], [f"no verdicts: {error}"]
