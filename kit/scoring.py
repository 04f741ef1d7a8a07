"""predictions.jsonl -> scores, checked against the data, with the leak audit; no model and no torch (scripts/eval.py RUN --rescore)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

from kit import card, dataset, runs
from kit.config import BASE, RunConfig
from kit.console import say
from kit.errors import UserError
from kit.files import held, read_json, read_jsonl, sha256, write_json
from kit.metrics import scores, scores_by_source
from kit.prompts import plain_prompt

Row = dict[str, Any]
FIELDS: dict[str, type | tuple[type, ...]] = {
    "id": str, "source": str, "prompt": str, "reference": str, "prediction": str, "reply_tokens": int, "finished": bool,
    "nll": (int, float), "nll_tokens": int,
}  # fmt: skip


REMEDY = "restore the file, or remove it to evaluate anew"


def asked(row: Row) -> Row:
    """What a prediction repeats of its test row."""
    return {"id": row["id"], "source": row["source"], "prompt": plain_prompt(row), "reference": row["messages"][-1]["content"]}


def load(path: Path, rows: Sequence[Row], *, partial: bool = False) -> list[Row]:
    """The predictions in the order of the test rows; `partial`: not all need be there.

    A line that is damaged, that answers no test row or one with another prompt or reference, or twice, and a missing one are a UserError.
    """
    if not path.exists():
        raise UserError(f"{path} is missing; without it there is nothing to score: evaluate anew")
    wanted, found = {row["id"]: asked(row) for row in rows}, dict[str, Row]()
    try:
        lines = list(read_jsonl(path))
    except UserError as error:
        raise UserError(f"{error}; {REMEDY}") from None
    for number, made in enumerate(lines, 1):
        wrong = _damage(made) or _foreign(made, wanted.get(made["id"])) or ("it answers a row for the second time" if made["id"] in found else None)
        if wrong:
            raise UserError(f"{path}, row {number}: {wrong}; {REMEDY}")
        found[made["id"]] = made
    missing = [i for i in wanted if i not in found]
    if missing and not partial:
        raise UserError(f"{path} lacks {len(missing)} of {len(rows)} test rows ({', '.join(missing[:3])}); remove eval.json and run the evaluation to add them")
    return [found[i] for i in wanted if i in found]


def _damage(made: Row) -> str | None:
    for name, kind in FIELDS.items():
        value = made.get(name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            return f"{name} is {'missing' if value is None else f'of the wrong kind ({type(value).__name__})'}"
    if not made["reference"]:
        return "its reference is empty"
    return None if made["nll_tokens"] > 0 else f"nll_tokens must be above 0, found {made['nll_tokens']}"


def _foreign(made: Row, wanted: Row | None) -> str | None:
    if wanted is None:
        return f"{made['id']} is no row of this test set"
    differing = [name for name, value in wanted.items() if made[name] != value]
    return f"its {' and '.join(differing)} differ{'s' if len(differing) == 1 else ''} from test row {made['id']}" if differing else None


def summary(rows: Sequence[Row], manifest: Mapping[str, Any], tokens: str = RunConfig.score_tokens, trained_on: int | None = None) -> dict[str, Any]:
    """All of eval.json that follows from the predictions: scores for all rows and for each source, and without the rows flagged as leaks.

    `trained_on`: the number of training rows that were used, the first ones, if that is not all.
    """
    flagged = leaked(manifest, trained_on)
    clean, ids = [row for row in rows if row["id"] not in flagged], [row["id"] for row in rows if row["id"] in flagged]
    without = scores(clean, tokens) if ids and len(clean) > 1 else None
    return {"schema": runs.SCHEMA, "score_tokens": tokens} | scores_by_source(rows, tokens) | {
        "leaks": {"flagged": len(ids), "ids": ids, "trained_on": trained_on, "without": without},
    }  # fmt: skip


def leaked(manifest: Mapping[str, Any], trained_on: int | None) -> set[str]:
    """The test rows that resemble training rows which were used."""
    known = manifest["leaks"].values()
    # Data that were built before these were noted: as if the first training row had it.
    pairs = (pair for found in known for pair in zip(found["test_ids"], found.get("train_rows", repeat(0)), strict=False))
    return {test for test, row in pairs if trained_on is None or row < trained_on}


def to_score_by(config: RunConfig, record: Mapping[str, Any]) -> str:
    """The tokens that a flag asks for, else those that the run was scored by."""
    return config.score_tokens if "score_tokens" in config.asked else runs.scored_by(record)


def reply_counts(rows: Sequence[Row]) -> dict[str, Any]:
    """How the replies came out."""
    return {
        "empty": sum(not r["prediction"] for r in rows), "unfinished": sum(not r["finished"] for r in rows),
        "mean_reply_tokens": sum(r["reply_tokens"] for r in rows) / len(rows),
    }  # fmt: skip


def check_data(folder: Path, config: RunConfig, data: str) -> None:
    """A result in the run's folder that comes from other data than there is now is a UserError."""
    for path in (folder / "train.json", folder / "eval.json"):
        if path.exists() and read_json(path).get("provenance", {}).get("data", data) != data:
            raise UserError(f"{path} comes from other data than {config.data_path} holds now; choose another --name or remove {folder}")


def rows_to_score(config: RunConfig) -> list[Row]:
    """The test rows, at least 2."""
    rows = dataset.rows(config, "test")
    if len(rows) < 2:
        raise UserError(f"there is only {len(rows)} test row; scores with intervals take at least 2: raise --limit-test or --test-per-source")
    return rows


def check_trained(config: RunConfig) -> None:
    """A run that is not trained to its end is a UserError."""
    trained = config.run_dir / "train.json"
    if config.method != BASE and (not trained.exists() or read_json(trained, "status")["status"] != "done"):
        raise UserError(f"{config.run_dir} is not trained yet; run: python scripts/train.py {config.again}")


def rescore(config: RunConfig) -> dict[str, Any]:
    """eval.json with everything that follows from predictions.jsonl computed anew, and all else kept."""
    manifest = dataset.manifest_of(config)
    if manifest is None:
        raise UserError(f"{config.data_path} is not there, and predictions are scored against their data; build it with scripts/data.py")
    if not (config.run_dir / "eval.json").exists():
        raise UserError(f"{config.run_dir} is not evaluated yet; run: python scripts/eval.py --method {config.method} --seed {config.seed}")
    check_trained(config)
    with held(config.run_dir):
        return rescored(config, manifest)


def rescored(config: RunConfig, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The same for who holds the run already."""
    folder = runs.open_run(config)
    result, predictions = folder / "eval.json", folder / "predictions.jsonl"
    check_data(folder, config, dataset.manifest_hash(config))
    record, rows = read_json(result, "all", "generation", "provenance"), load(predictions, rows_to_score(config))
    found = sha256(predictions)
    if record.get("predictions_sha256", found) != found:
        say(f"{predictions} is not the file that was scored before: SHA-256 {record['predictions_sha256'][:12]} then, {found[:12]} now")
    # The base model was trained on nothing; it is looked at without the rows that were flagged when it was evaluated.
    trained_on = config.limit_train if config.method != BASE else (record.get("leaks") or {}).get("trained_on")
    record |= summary(rows, manifest, to_score_by(config, record), trained_on) | {"predictions_sha256": found}
    record["generation"] = record.get("generation", {}) | reply_counts(rows)
    write_json(result, record)
    card.refresh(config)
    say(f"{folder} is scored anew from {len(rows)} predictions")
    return dict(record)
