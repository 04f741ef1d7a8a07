"""One set of rows, read from the runs' JSON alone; the console, all report formats, CSV, JSON and figures render these."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.config import BASE, RunConfig
from kit.errors import UserError, first_line
from kit.files import read_json, read_jsonl
from kit.gates import failed
from kit.methods import METHODS
from kit.metrics import METRICS
from kit.report.shapes import CONFIG, EVALUATION, SAMPLES, TASKS, TRAINING, check
from kit.runs import load_config, scored_by

Row = dict[str, Any]
SCORES = tuple(m for m, metric in METRICS.items() if not metric.secondary)
SECONDARY = tuple(m for m in METRICS if m not in SCORES)
COSTS = ("peak_memory_gib", "train_wall_s", "tokens_per_s", "trainable_params", "adapter_mib")
TRAINED = (*COSTS, "parts", "tried", "steps", "tokens_total", "tokens_supervised", "rows_left_out", "valid_perplexity", "optimizer_state_mib", "energy",
           "phases")  # fmt: skip
SCORED = ("per_source", "generation", "leaks", "forgetting", "predictions_sha256", "score_tokens")
MISSING = "—"
MEAN = "mean"


@dataclass(frozen=True)
class Column:
    title: str
    digits: int = 0
    unit: str = ""


# The comparison's columns, in order; keys are those of a row.
COLUMNS: dict[str, Column] = {
    "label": Column("method"),
    "bleu4": Column("BLEU-4", 2),
    "rouge_l": Column("ROUGE-L", 2),
    "perplexity": Column("perplexity", 2),
    "peak_memory_gib": Column("peak memory", 2, " GiB"),
    "train_wall_s": Column("train time"),
    "tokens_per_s": Column("tokens/s"),
    "trainable_params": Column("trainable"),
    "adapter_mib": Column("adapter", 1, " MiB"),
}


def title(method: str) -> str:
    return METHODS[method].title if method in METHODS else method


def collect(runs: Path) -> list[Row]:
    """A row for each run folder, base first, then in METHODS' order and by seed; a damaged run has status `damaged` and its reason."""
    folders = [p for p in sorted(runs.glob("*/")) if (p / "config.json").exists() or p.name.partition("-s")[0] in (BASE, *METHODS)]
    if not folders:
        raise UserError(f"no runs in {runs}; make some with: make all METHOD=qlora NAME={runs.name}")
    rows = [_row(folder) for folder in folders]
    count = Counter(r["method"] for r in rows)
    for row in rows:
        several = row["seed"] is not None and (row["seed"] or count[row["method"]] > 1)
        row["label"] = title(row["method"]) + (f" (seed {row['seed']})" if several else "")
    return sorted(rows, key=lambda r: (place(r["method"]), r["seed"] or 0))


def place(method: str) -> tuple[int, str]:
    """Where a method stands: base first, then in METHODS' order, others last by name."""
    order = [BASE, *METHODS]
    return order.index(method) if method in order else len(order), method


def blank(method: str, seed: int | str | None) -> Row:
    """A row of which nothing is known yet."""
    keys = (*METRICS, *TRAINED, *SCORED, "samples", "tasks", "config", "provenance", "evaluated", "precision", "reason", "run")
    return dict.fromkeys(keys) | {"method": method, "seed": seed, "label": title(method), "status": "missing", "ranked": False, "gates": {}, "problems": []}


def _row(folder: Path) -> Row:
    method, _, seed = folder.name.partition("-s")
    row = blank(method, None if method == BASE or not seed.isdigit() else int(seed)) | {"run": str(folder)}
    try:
        optional(folder / "config.json", CONFIG)
        config = load_config(folder, {})
        trained = optional(folder / "train.json", TRAINING)
        scored = optional(folder / "eval.json", EVALUATION)
        row |= {k: trained.get(k) for k in TRAINED} | {k: scored.get("all", {}).get(k) for k in METRICS} | {k: scored.get(k) for k in SCORED}
        row["score_tokens"] = scored_by(row)
        row["config"] = config.identity()
        row["provenance"] = trained.get("provenance") or scored.get("provenance")
        row["evaluated"] = scored.get("provenance")
        row["precision"] = scored.get("precision") or trained.get("precision")
        row["gates"] = (trained.get("gates") or {}) | (scored.get("gates") or {})
        row["status"], row["reason"] = _status(config, folder, trained, scored)
        row["ranked"] = row["status"] == "done" and not failed(row["gates"])
        if row["status"] == "done" and not row["ranked"]:
            row["reason"] = f"not ranked; {'; '.join(failed(row['gates']))}"
    except (UserError, TypeError, AttributeError, KeyError) as error:
        return row | {"status": "damaged", "reason": first_line(error), "ranked": False}
    for name, shape in (("samples", SAMPLES), ("tasks", TASKS)):
        try:
            row[name] = optional(folder / f"{name}.json", shape) or None
        except UserError as error:
            row["problems"].append(f"{name}.json is left out: {error}")
    return row


def optional(path: Path, shape: Any) -> dict[str, Any]:
    """A JSON file, or nothing if there is none; UserError if it is not what the report needs."""
    if not path.exists():
        return {}
    found = read_json(path)
    check(found, shape, str(path))
    return dict(found)


def _status(config: RunConfig, folder: Path, trained: Row, scored: Row) -> tuple[str, str | None]:
    """A run's status and the reason if it is not done. Whether a command still works on it cannot be told from its files."""
    if trained and trained["status"] != "done":
        return trained["status"], trained.get("reason")
    if scored and (trained or config.method == BASE):
        return "done", None
    if scored:
        return "damaged", "it has scores but no train.json, so that nobody knows what was trained; train it again"
    if config.method == BASE or trained:
        replies = _lines(folder / "predictions.jsonl")
        stage = "missing" if config.method == BASE else "trained"
        return ("running", f"evaluation is running or was stopped after {replies:,} replies") if replies else (stage, "not evaluated yet")
    steps = _lines(folder / "log.jsonl")
    if steps or (folder / "checkpoints").exists():
        return "running", f"training is running or was stopped after {steps:,} steps; the same command goes on from the last checkpoint"
    return "missing", "not trained yet"


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def number(value: float | None, digits: int, unit: str = "") -> str:
    return MISSING if value is None else f"{value:,.{digits}f}{unit}"


def interval(score: Row | None, digits: int = 2) -> str:
    """A score with the ends of its 95% interval, if it has one."""
    if not score or score["value"] is None:
        return MISSING
    ends = [score.get(end) for end in ("low", "high")]
    return number(score["value"], digits) + ("" if None in ends else f" [{', '.join(number(end, digits) for end in ends)}]")


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: 0.4 s, 42 s, 7 min 05 s, 1 h 12 min."""
    if seconds is None:
        return MISSING
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    if round(seconds) < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def plain(row: Row, key: str) -> float | None:
    """A row's value as a number: a score's value, a cost."""
    value = row.get(key)
    return value["value"] if isinstance(value, dict) else value


def cell(key: str, row: Row, base: Row | None) -> str:
    """A row's value as text; scores read before → after, where the base model's is known."""
    column = COLUMNS[key]
    if key == "label":
        fit = "" if row["ranked"] else ": not ranked"
        return str(row[key]) + (f": {row['status']}" if row["status"] != "done" else fit)
    if key == "train_wall_s":
        return duration(row[key])
    after = number(plain(row, key), column.digits, column.unit)
    before = plain(base, key) if base and base is not row and key in SCORES else None
    return f"{number(before, column.digits)} → {after}" if before is not None and after != MISSING else after


def curves(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The loss log of every run that has one, by label; what is not a log is left out."""
    out: dict[str, list[Row]] = {}
    for row in rows:
        path = Path(row["run"]) / "log.jsonl"
        try:
            log = [r for r in read_jsonl(path) if isinstance(r.get("loss"), int | float)] if path.exists() else []
        except UserError:
            log = []
        out |= {row["label"]: log} if log else {}
    return out
