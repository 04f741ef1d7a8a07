"""The learning rate of each method on the same small budget: short runs on part of the training rows, judged on validation rows, the curve kept."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kit import processes
from kit.config import BASE, RunConfig, completed
from kit.console import say
from kit.errors import UserError
from kit.files import held, read_json, write_json
from kit.gates import SHORTEST
from kit.hybrid import total_steps
from kit.model import free_memory
from kit.runs import load_config
from kit.trainer import steps_per_epoch
from kit.training import train

SCHEMA = 1
# Around the recipe's rate, a factor of 2 apart.
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
# From as many optimiser steps on the gates judge a run by its learning rate. In fewer the weights hardly leave where they began, and of five rates the
# largest looks best whatever it would do to a whole training.
FEWEST = SHORTEST
PARTS = "hybrid and combined are not swept; sweep their parts, qlora and highrank"
Point = dict[str, Any]


def sweep(config: RunConfig, *, share: float) -> dict[str, Any]:
    """runs/NAME/sweep/METHOD.json: {schema, method, budget, curve: [{learning_rate, valid_perplexity, train_wall_s}], best}."""
    _tunable(config)
    folder = Path(config.runs_dir) / config.name / "sweep"
    budget = _budget(config, share)
    rates = [float(f"{config.learning_rate * factor:.3g}") for factor in FACTORS]
    settings = {k: v for k, v in config.identity().items() if k not in ("learning_rate", "limit_train")}
    wanted = {"rows": budget, "learning_rates": rates, "settings": settings}
    path = folder / f"{config.method}.json"
    if path.exists() and _as_wanted((found := read_json(path, "budget", "curve", "best"))["budget"], wanted):
        say(f"{path} is there already")
        return dict(found)
    curve = _curve(config, folder, budget, rates)
    best = _best(curve, config, folder)
    if min(rates) < max(rates) and best in (min(rates), max(rates)):
        say(f"{best:g} is at the end of what was tried: a {'smaller' if best == min(rates) else 'larger'} one may be better; "
            f"sweep around it with --learning-rate {best:g}")  # fmt: skip
    found = {"schema": SCHEMA, "method": config.method, "budget": wanted, "curve": curve, "best": best}
    write_json(path, found)
    return dict(found)


def _as_wanted(budget: Any, wanted: Mapping[str, Any]) -> bool:
    """Whether a sweep was made with the budget that is wanted; a damaged one was not."""
    if not isinstance(budget, dict) or not isinstance(budget.get("settings"), dict):
        return False
    was, now = ({**b, "settings": completed(b["settings"])} for b in (budget, wanted))
    return was == now


def _tunable(config: RunConfig) -> None:
    """Whether there is a learning rate to look for, and rows to judge it on."""
    if processes.count() > 1:
        raise UserError("a sweep runs in one process; start one, on one GPU")
    if config.method == BASE:
        raise UserError("base is the untuned model: it has no learning rate")
    if config.technique.parts:
        raise UserError(PARTS)
    if not config.valid_per_source:
        raise UserError("a sweep is judged on validation rows: give --valid-per-source, with a new --name if there are data and runs of this one")


def _budget(config: RunConfig, share: float) -> int:
    """The training rows of each trial; too few of them for rates to be told apart are a UserError that says how many it takes."""
    rows = config.train_per_source * len(config.source)
    rows = min(rows, config.limit_train or rows)
    budget = max(round(rows * share), 1)
    steps = total_steps(config, budget)
    if steps >= FEWEST:
        return budget
    made = f"{steps} optimiser step{'s' if steps > 1 else ''}"
    told = f"a sweep on {budget:,} of {rows:,} training rows makes {made}, and it takes {FEWEST} to tell learning rates apart"
    if config.max_steps:
        raise UserError(f"{told}: give a larger --max-steps, or none")
    batch = config.micro_batch * config.accumulation
    needed = math.ceil(FEWEST / config.epochs) * batch
    if needed > rows:
        epochs = math.ceil(FEWEST / steps_per_epoch(rows, batch))
        raise UserError(f"{told}: with --share 1 take {needed:,} training rows or more, or make more of them with --epochs {epochs}")
    raise UserError(f"{told}: give a larger share of the rows, --share {math.ceil(100 * needed / rows) / 100:g}")


def _curve(config: RunConfig, folder: Path, budget: int, rates: Sequence[float]) -> list[Point]:
    """A point for each rate, by a training that lies apart from the runs that are compared."""
    curve = []
    for rate in rates:
        trial = replace(config, learning_rate=rate, limit_train=budget, tuned=False, runs_dir=str(folder / f"{rate:g}"))
        _cleared(trial)
        curve.append(_trial(trial))
        free_memory()
    return curve


def _cleared(trial: RunConfig) -> None:
    """Removes what an earlier sweep left in the trial's place, where that was of other settings."""
    if not (trial.run_dir / "config.json").exists() or load_config(trial.run_dir, {}).identity() == trial.identity():
        return
    with held(trial.run_dir):
        for left in trial.run_dir.iterdir():
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()


def _trial(trial: RunConfig) -> Point:
    """One point of the curve; a rate that diverges, or that changes no weight, is a point without a perplexity."""
    say(f"learning rate {trial.learning_rate:g}")
    try:
        record = train(trial)
    except UserError as error:
        if "diverged" not in str(error):
            raise
        say(str(error))
        return {"learning_rate": trial.learning_rate, "valid_perplexity": None, "train_wall_s": None}
    moved = record["gates"]["moved"]
    if moved["passed"] is False:
        say(f"nothing was trained at this rate: {moved['detail']}")
    perplexity = None if moved["passed"] is False else record["valid_perplexity"]
    return {"learning_rate": trial.learning_rate, "valid_perplexity": perplexity, "train_wall_s": record["train_wall_s"]}


def _best(curve: Sequence[Point], config: RunConfig, folder: Path) -> float:
    """The rate with the lowest perplexity, where there is one."""
    judged = [c for c in curve if c["valid_perplexity"] is not None]
    if not judged:
        raise UserError(f"every learning rate of the sweep failed for {config.method}; the reasons are in {folder}/*/{config.name}")
    if len(judged) > 1 and len({c["valid_perplexity"] for c in judged}) == 1:
        raise UserError(
            f"all learning rates of the sweep gave {config.method} the same validation perplexity, {judged[0]['valid_perplexity']:.3f}: none is better; "
            "give a larger --share, more training rows, or other rates (--learning-rate)"
        )
    return float(min(judged, key=lambda c: c["valid_perplexity"])["learning_rate"])
