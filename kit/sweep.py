"""The learning rate of each method on the same small budget: short runs on part of the training rows, judged on validation rows, the curve kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from kit.config import BASE, RunConfig
from kit.console import say
from kit.errors import UserError
from kit.files import read_json, write_json
from kit.model import free_memory

SCHEMA = 1
# Around the recipe's rate, a factor of 2 apart.
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)


def sweep(config: RunConfig, *, share: float) -> dict[str, Any]:
    """runs/NAME/sweep/METHOD.json: {schema, method, budget, curve: [{learning_rate, valid_perplexity, train_wall_s}], best}."""
    from kit.training import train

    if config.method == BASE:
        raise UserError("base is the untuned model: it has no learning rate")
    if not config.valid_per_source:
        raise UserError("a sweep is judged on validation rows: give --valid-per-source (and rebuild the data with scripts/data.py --overwrite)")
    folder = Path(config.runs_dir) / config.name / "sweep"
    rows = config.limit_train or config.train_per_source * len(config.source)
    budget = max(round(rows * share), 1)
    rates = [float(f"{config.learning_rate * factor:.3g}") for factor in FACTORS]
    settings = {k: v for k, v in config.identity().items() if k not in ("learning_rate", "limit_train")}
    wanted = {"rows": budget, "learning_rates": rates, "settings": settings}
    path = folder / f"{config.method}.json"
    if path.exists() and (found := read_json(path))["budget"] == wanted:
        say(f"{path} is there already")
        return dict(found)
    curve = []
    for rate in rates:
        trial = replace(config, learning_rate=rate, limit_train=budget, tuned=False, runs_dir=str(folder / f"{rate:g}"))
        curve.append(_trial(trial, train))
        free_memory()
    judged = [c for c in curve if c["valid_perplexity"] is not None]
    if not judged:
        raise UserError(f"every learning rate of the sweep failed for {config.method}; the reasons are in {folder}/*/{config.name}")
    best = min(judged, key=lambda c: c["valid_perplexity"])["learning_rate"]
    if min(rates) < max(rates) and best in (min(rates), max(rates)):
        say(f"{best:g} is at the end of what was tried: a {'smaller' if best == min(rates) else 'larger'} one may be better; "
            f"sweep around it with --learning-rate {best:g}")  # fmt: skip
    found = {"schema": SCHEMA, "method": config.method, "budget": wanted, "curve": curve, "best": best}
    write_json(path, found)
    return dict(found)


def _trial(trial: RunConfig, train: Any) -> dict[str, Any]:
    """One point of the curve; a rate that diverges is a point without a perplexity."""
    say(f"learning rate {trial.learning_rate:g}")
    try:
        record = train(trial)
    except UserError as error:
        if "diverged" not in str(error):
            raise
        say(str(error))
        return {"learning_rate": trial.learning_rate, "valid_perplexity": None, "train_wall_s": None}
    return {"learning_rate": trial.learning_rate} | {k: record[k] for k in ("valid_perplexity", "train_wall_s")}
