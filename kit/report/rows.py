"""One set of rows, read from the runs' JSON alone; the console, Markdown, CSV, JSON and figures all render these."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.config import BASE, RunConfig
from kit.errors import UserError
from kit.files import read_json, read_jsonl
from kit.gates import failed
from kit.methods import METHODS
from kit.runs import load_config

Row = dict[str, Any]
SCORES = ("bleu4", "rouge_l", "perplexity")
MISSING = "—"


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


def collect(runs: Path) -> list[Row]:
    """A row for each run folder, base first, then in METHODS' order and by seed; a damaged run has status `damaged` and its reason."""
    if not runs.is_dir():
        raise UserError(f"no runs in {runs}; make some with: make all METHOD=qlora")
    folders = sorted(p.parent for p in runs.glob("*/config.json"))
    order = [BASE, *METHODS]
    rows = [_row(folder) for folder in folders]
    if not rows:
        raise UserError(f"no runs in {runs}; make some with: make all METHOD=qlora")
    return sorted(rows, key=lambda r: (order.index(r["method"]) if r["method"] in order else len(order), r["seed"] or 0))


def _row(folder: Path) -> Row:
    method, _, seed = folder.name.partition("-s")
    number = None if method == BASE or not seed.isdigit() else int(seed)
    row: Row = {"method": method, "seed": number, "run": str(folder), "reason": None, "ranked": False, "gates": {}}
    row |= dict.fromkeys([*SCORES, "per_source", "generation", "parts", "tried", "tokens_supervised", "provenance", "precision", *list(COLUMNS)[4:]])
    row["label"] = METHODS[method].title if method in METHODS else method
    try:
        config = load_config(folder, {})
        trained = read_json(folder / "train.json") if (folder / "train.json").exists() else {}
        scored = read_json(folder / "eval.json") if (folder / "eval.json").exists() else {}
        row |= {k: trained.get(k) for k in ("train_wall_s", "peak_memory_gib", "tokens_per_s", "trainable_params", "adapter_mib")}
        row |= {k: scored.get("all", {}).get(k) for k in SCORES} | {k: scored.get(k) for k in ("per_source", "generation")}
        row["config"] = config.identity()
        row["provenance"] = trained.get("provenance") or scored.get("provenance")
        row["precision"] = scored.get("precision") or trained.get("precision")
        row["status"], row["reason"] = _status(config, trained, scored)
        row |= {k: trained.get(k) for k in ("parts", "tried", "tokens_total", "tokens_supervised", "valid_perplexity", "optimizer_state_mib", "energy")}
        row["gates"] = trained.get("gates", {}) | scored.get("gates", {})
        row["ranked"] = row["status"] == "done" and not failed(row["gates"])
        if row["status"] == "done" and not row["ranked"]:
            row["reason"] = f"not ranked; {'; '.join(failed(row['gates']))}"
    except (UserError, TypeError, AttributeError) as error:
        row["status"], row["reason"] = "damaged", str(error).splitlines()[0]
    return row


def _status(config: RunConfig, trained: dict[str, Any], scored: dict[str, Any]) -> tuple[str, str | None]:
    if scored:
        return "done", None
    if config.method == BASE:
        return "missing", "not evaluated yet"
    if not trained:
        return "missing", "not trained yet"
    if trained["status"] != "done":
        return trained["status"], trained.get("reason")
    return "trained", "not evaluated yet"


def number(value: float | None, digits: int, unit: str = "") -> str:
    return MISSING if value is None else f"{value:,.{digits}f}{unit}"


def interval(score: dict[str, Any] | None, digits: int = 2) -> str:
    """A score with the ends of its 95% interval."""
    return f"{number(score['value'], digits)} [{number(score['low'], digits)}, {number(score['high'], digits)}]" if score else MISSING


def duration(seconds: float | None) -> str:
    """Seconds as a person says them: 42 s, 7 min 05 s, 1 h 12 min."""
    if seconds is None:
        return MISSING
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def cell(key: str, row: Row, base: Row | None) -> str:
    """A row's value as text; scores read before → after, where the base model's is known."""
    value = row.get(key)
    column = COLUMNS[key]
    if key == "label":
        many = row["seed"] not in (None, 0)
        return str(value) + (f" (seed {row['seed']})" if many else "") + (f": {row['status']}" if row["status"] != "done" else "")
    if key in SCORES:
        after = number(value and value["value"], column.digits)
        before = base and base is not row and base.get(key)
        return f"{number(before['value'], column.digits)} → {after}" if before and value else after
    if key == "train_wall_s":
        return duration(value)
    return number(value, column.digits, column.unit)


def curves(rows: list[Row]) -> dict[str, list[Row]]:
    """The loss log of every run that has one, by label."""
    logs = {cell("label", r, None): Path(r["run"]) / "log.jsonl" for r in rows if r["status"] != "damaged"}
    return {label: list(read_jsonl(path)) for label, path in logs.items() if path.exists()}
