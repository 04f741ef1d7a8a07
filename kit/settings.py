"""Flags, a recipe and a method's own settings -> a RunConfig that can work; with --tuned at the learning rate that a sweep found.

Precedence: dataclass defaults < recipe < the method's own settings < the recipe's block for the method < flags. An explicit flag always wins.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kit.config import BASE, CHOICES, NOTES, RunConfig, completed, fields, load_recipe
from kit.device import choose_recipe
from kit.errors import UserError, unknown
from kit.files import read_json
from kit.methods import METHODS

# A scaled-down recipe takes these from the tiny recipe and keeps its method set-ups; ranks shrink in proportion, the largest to the narrowest built-in layer.
SCALED = ("model", "source", "train_per_source", "test_per_source", "valid_per_source", "max_length",
          "optimizer", "gradient_checkpointing", "save_steps", "max_new_tokens", "eval_tokens", "precision", "forgetting_text")  # fmt: skip
NARROWEST = 48
STAND_INS = {"EleutherAI/gpt-neo-1.3B": "builtin-gptneo"}
BATCH = ("micro_batch", "accumulation")
# On which the best learning rate is not taken to depend. A sweep is made on few rows and few steps, with one seed, to be used on more rows, more steps and
# every seed: whoever asks for --tuned relies on that, so the length of the training (limit_train, epochs, max_steps) is no reason to refuse.
# Recipe, name and scaling are names for settings that are compared one by one; of the batch the product counts; the others change what is held out,
# measured or saved, or how the same numbers are computed.
INDIFFERENT = (
    "recipe", "name", "scale_down", "method", "seed", "learning_rate", "tuned", "limit_train", "epochs", "max_steps", *BATCH,
    "test_per_source", "valid_per_source", "limit_test", "max_new_tokens", "eval_tokens", "engine",
    "save_steps", "gradient_checkpointing", "dora_kernel",
)  # fmt: skip


def resolve(flags: Mapping[str, Any]) -> RunConfig:
    """The configuration that the flags ask for, checked; every problem is reported at once."""
    method = flags.get("method", RunConfig.method)
    if method not in METHODS and method != BASE:
        raise UserError(unknown("method", method, [*METHODS, BASE]))
    name = flags.get("recipe", "auto")
    if name == "auto":
        name = choose_recipe().name
    recipe = load_recipe(name)
    block = recipe.get("methods", {}).get(method, {})
    if flags.get("scale_down", False):
        stand_in = STAND_INS.get(recipe.get("model", ""), "builtin")
        recipe |= {k: v for k, v in load_recipe("tiny").items() if k in SCALED} | {"model": stand_in}
    if "source" in flags:  # The recipe's row counts belong to its own sources.
        recipe = {k: v for k, v in recipe.items() if k not in ("train_per_source", "test_per_source", "valid_per_source")}
    own = METHODS[method].settings if method != BASE else {}
    values = {k: v for k, v in recipe.items() if k not in (*NOTES, "methods")} | dict(own) | block
    if flags.get("scale_down", False):
        values |= narrowed(values | {k: v for k, v in flags.items() if k == "rslora"}, recipe)
    values |= dict(flags) | {"recipe": name}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    values["source"] = tuple(sorted(values.get("source", ())))
    values["name"] = values.get("name") or name + ("-scaled" if flags.get("scale_down", False) else "")
    config = RunConfig(**values, asked=tuple(flags))
    check(config)
    return with_tuned_rate(config)


def narrowed(values: Mapping[str, Any], recipe: dict[str, Any]) -> dict[str, int]:
    """Rank and alpha for the built-in models, whose narrowest layer holds the largest rank of all methods; the adapter's scale stays about the same."""
    rank, alpha = values.get("rank", RunConfig.rank), values.get("alpha", RunConfig.alpha)
    blocks = [recipe | dict(method.settings) | recipe.get("methods", {}).get(name, {}) for name, method in METHODS.items()]
    smaller = max(1, rank * NARROWEST // max(NARROWEST, *(block.get("rank", RunConfig.rank) for block in blocks)))
    shrunk = (smaller / rank) ** (0.5 if values.get("rslora") else 1)  # rank-stabilised, the scale is alpha / √rank
    return {"rank": smaller, "alpha": max(1, round(alpha * shrunk))}


def with_tuned_rate(config: RunConfig) -> RunConfig:
    """With --tuned and no rate asked for, the sweep's; what is built on other methods' runs takes the rates that were found for those."""
    if not config.tuned or "learning_rate" in config.asked or config.method == BASE:
        return config
    if config.technique.parts:
        for part in config.technique.parts:  # one without a sweep is told now, and not after hours of evaluating the base model
            sibling(config, part)
        return config
    return dataclasses.replace(config, learning_rate=tuned_rate(config))


def tuned_rate(config: RunConfig) -> float:
    """The learning rate that the sweep found best for a method; a sweep with other settings, on which the best rate depends, is a UserError."""
    path = Path(config.runs_dir) / config.name / "sweep" / f"{config.method}.json"
    again = f"python scripts/sweep.py --method {config.method} --name {config.name}, and the other flags of this command"
    if not path.exists():
        raise UserError(f"--tuned needs {path}; make it with: {again}")
    found = read_json(path, "best", "budget")
    best, swept = found["best"], found["budget"].get("settings") if isinstance(found["budget"], dict) else None
    if not isinstance(best, int | float) or not 0 < best < math.inf or not isinstance(swept, dict):
        raise UserError(f"{path}: cannot be read (it holds no rate or no settings); remove it and run the stage again")
    if differing := _swept_otherwise(swept, config):
        raise UserError(f"{path} was made with other settings ({differing}): its best rate may not be the best here; sweep anew with: {again}")
    return float(best)


def _swept_otherwise(swept: Mapping[str, Any], config: RunConfig) -> str:
    """What differs between the sweep's settings and this configuration's; one that is newer than the sweep's file had its default."""
    wanted, swept = config.identity(), completed(swept)
    ignored = {*INDIFFERENT, *config.technique.unused}
    pairs = {k: (swept[k], wanted[k]) for k in wanted if k in swept and k not in ignored}
    pairs["effective batch"] = (_effective(swept), _effective(wanted))
    return ", ".join(f"{k} {was!r} -> {now!r}" for k, (was, now) in pairs.items() if was != now)


def _effective(settings: Mapping[str, Any]) -> Any:
    """The rows of an optimiser step."""
    sizes = [settings.get(k) for k in BATCH]
    return math.prod(sizes) if all(isinstance(n, int) for n in sizes) else sizes


def sibling(config: RunConfig, method: str) -> RunConfig:
    """The same experiment with another method: that method's own settings, and whatever the user asked for by flags."""
    common = {"recipe": config.recipe, "scale_down": config.scale_down, "name": config.name, "runs_dir": config.runs_dir}
    standard, other = resolve(common | {"method": config.method}), resolve(common | {"method": method})
    changed = {f: v for f in fields() if f != "method" and ((v := getattr(config, f)) != getattr(standard, f) or f in config.asked)}
    if config.tuned and "learning_rate" not in config.asked:
        changed.pop("learning_rate", None)  # a sweep's, which is the method's own
    made = dataclasses.replace(other, **changed)
    return made if "learning_rate" in config.asked else with_tuned_rate(made)


def check(config: RunConfig) -> None:
    """Raises one UserError with every value that cannot work."""
    numbers = {f: v for f in fields() if isinstance(v := getattr(config, f), float)}
    if unusable := [f"--{f.replace('_', '-')} must be a finite number, got {v}" for f, v in numbers.items() if not math.isfinite(v)]:
        raise UserError(*unusable)
    positive = ("train_per_source", "test_per_source", "max_length", "rank", "alpha", "epochs", "micro_batch", "accumulation",
                "learning_rate", "loraplus_lr_ratio", "save_steps", "max_new_tokens", "eval_tokens", "limit_train", "limit_test", "max_steps",
                "update_gap", "projection_scale", "price_per_kwh")  # fmt: skip
    flag = {f: f"--{f.replace('_', '-')}" for f in fields()}
    problems = [f"{flag[f]} must be greater than 0, got {v}" for f in positive if (v := getattr(config, f)) is not None and v <= 0]
    problems += [f"{flag[f]} must not be negative, got {v}" for f in ("valid_per_source", "weight_decay", "max_grad_norm") if (v := getattr(config, f)) < 0]
    problems += [f"{flag[f]} must be from 0 to {2**32 - 1}, got {v}" for f in ("seed", "data_seed") if not 0 <= (v := getattr(config, f)) < 2**32]
    problems += [f"{flag[f]} must be below 2^63, got {v}" for f in fields() if isinstance(v := getattr(config, f), int) and v >= 2**63]
    shares = ("dropout", "warmup_ratio")
    problems += [f"{flag[f]} must be from 0 to below 1, got {v}" for f in shares if not 0 <= (v := getattr(config, f)) < 1]
    problems += [unknown(f, getattr(config, f), known) for f, known in CHOICES.items() if getattr(config, f) not in known]
    texts = {f: "".join(v) for f in fields() if isinstance(v := getattr(config, f), str | tuple)}
    problems += [f"{flag[f]} must be UTF-8, got {v!r}" for f, v in texts.items() if v.encode(errors="ignore").decode() != v]
    if config.max_length < 32:
        problems.append(f"--max-length must be at least 32 to hold a prompt and a reply, got {config.max_length}")
    if config.method == "combined" and not config.valid_per_source:
        problems.append("combined chooses its weights on validation rows: give --valid-per-source, with a new --name if there are data and runs of this one")
    if config.method != BASE and config.technique.full:
        problems += (
            ["--precision float16 cannot train whole weights (their updates underflow); use float32 or bfloat16"] if config.precision == "float16" else []
        )
        problems += [f"--dropout is for adapters; {config.method} trains the weights themselves"] if config.dropout else []
    own = "; a source of your own is NAME=FILE or NAME=OWNER/DATASET"
    for name, hint in ((config.name, ""), *((s.partition("=")[0], "" if "=" in s else own) for s in config.source)):
        if not name or name in (".", "..") or not all(c.isalnum() or c in "-_." for c in name):
            problems.append(f"{name!r} cannot name a folder or source: use letters, digits, '-', '_' and '.'{hint}")
    if problems:
        raise UserError(*problems)
