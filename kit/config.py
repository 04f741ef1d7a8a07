"""RunConfig: one field is one flag, one help line and one key in config.json.

Precedence: dataclass defaults < recipe < the method's own settings < the recipe's block for the method < flags. An explicit flag always wins.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml

from kit.errors import UserError, unknown
from kit.files import read_json
from kit.methods import METHODS, Method

RECIPES = Path(__file__).parent / "recipes"
BASE = "base"
CHOICES = {
    "format": ("chat", "alpaca"), "schedule": ("linear", "cosine", "constant", "constant_with_warmup"),
    "precision": ("auto", "float32", "float16", "bfloat16"), "report_to": ("none", "tensorboard", "wandb", "trackio"),
    "dora_kernel": ("kit", "peft"), "engine": ("kit", "vllm"), "score_tokens": ("13a", "intl", "zh", "char"),
}  # fmt: skip
# Where results lie, how they are watched and scored, what they cost and on which text forgetting is measured does not make two runs different.
PLACES = ("data_dir", "runs_dir", "report_dir", "report_to", "price_per_kwh", "preflight", "auto_batch", "forgetting_text", "score_tokens")
# A scaled-down recipe takes these from the tiny recipe and keeps its method set-ups; ranks shrink in proportion, the largest to the narrowest built-in layer.
SCALED = ("model", "source", "train_per_source", "test_per_source", "valid_per_source", "max_length",
          "optimizer", "gradient_checkpointing", "save_steps", "max_new_tokens", "eval_tokens", "precision", "forgetting_text")  # fmt: skip
NARROWEST = 48
# Where the groups of --help begin.
GROUPS = {"recipe": "experiment", "model": "model", "source": "data", "rank": "method", "epochs": "training", "max_new_tokens": "evaluation"}
STAND_INS = {"EleutherAI/gpt-neo-1.3B": "builtin-gptneo"}


@dataclass(frozen=True)
class RunConfig:
    """Everything that decides a run."""

    recipe: Annotated[str, "starting point: auto, or a name in kit/recipes (auto: t4 with a usable CUDA GPU, else tiny)"] = "auto"
    method: Annotated[str, "fine-tuning technique, or base for the untuned model"] = "qlora"
    seed: Annotated[int, "seed of initialisation, row order and dropout"] = 0
    name: Annotated[str, "experiment: names data/NAME and runs/NAME (default: the recipe)"] = ""
    data_dir: Annotated[str, "folder of the built data"] = "data"
    runs_dir: Annotated[str, "folder of the runs"] = "runs"
    report_dir: Annotated[str, "folder the report is written to"] = "report"
    scale_down: Annotated[bool, "the recipe's method set-ups on the built-in model and data, with ranks to match"] = False
    model: Annotated[str, "hub id or folder of the base model; builtin and builtin-gptneo are tiny models shipped with the kit"] = "builtin"
    revision: Annotated[str, "branch, tag or commit of the model on the hub"] = ""
    precision: Annotated[str, "auto, float32, float16 or bfloat16; auto decides from the device and says why"] = "auto"
    source: Annotated[tuple[str, ...], "NAME=ORIGIN, repeatable; ORIGIN is a file, a hub dataset or builtin; replaces the recipe's data"] = ()
    train_per_source: Annotated[int, "training rows drawn from each source"] = 5000
    test_per_source: Annotated[int, "test rows drawn from each source"] = 2000
    valid_per_source: Annotated[int, "validation rows from each source, for tuning, so that test is opened once"] = 0
    data_seed: Annotated[int, "seed of the draw; the same for all compared runs"] = 0
    format: Annotated[str, "chat (the model's template) or alpaca (### Instruction / ### Input / ### Response)"] = "chat"
    max_length: Annotated[int, "longest sequence in tokens; what is cut is counted in the manifest"] = 1024
    limit_train: Annotated[int | None, "use only the first N training rows (a trial)"] = None
    limit_test: Annotated[int | None, "use only the first N test rows (a trial)"] = None
    rank: Annotated[int, "rank of the adapter matrices"] = 16
    alpha: Annotated[int, "adapter scale numerator: the update is scaled by alpha / rank"] = 16
    dropout: Annotated[float, "dropout on the adapter's input"] = 0.0
    target_modules: Annotated[tuple[str, ...], "linear layers that get an adapter, repeatable"] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    dora_kernel: Annotated[str, "dora, qdora: kit (row norms kept between optimiser steps) or peft (computed in every forward)"] = "kit"
    update_gap: Annotated[int, "galore, apollo: optimiser steps between new projections"] = 200
    projection_scale: Annotated[float, "galore, apollo: scale of the update that comes back from the projection"] = 0.25
    train_embeddings: Annotated[bool, "full, galore, apollo: train the embeddings too"] = False
    epochs: Annotated[float, "passes over the training rows"] = 1.0
    max_steps: Annotated[int | None, "stop after N optimiser steps"] = None
    micro_batch: Annotated[int, "rows a forward pass"] = 4
    accumulation: Annotated[int, "forward passes an optimiser step; effective batch = micro-batch x accumulation"] = 2
    auto_batch: Annotated[bool, "out of memory: halve the micro-batch, double the accumulation and go on"] = False
    learning_rate: Annotated[float, "peak learning rate"] = 2e-4
    tuned: Annotated[bool, "take the learning rate that scripts/sweep.py found best for this method"] = False
    schedule: Annotated[str, "learning-rate schedule: linear, cosine, constant or constant_with_warmup"] = "linear"
    warmup_ratio: Annotated[float, "share of the steps that warm up"] = 0.03
    weight_decay: Annotated[float, "decoupled weight decay"] = 0.001
    max_grad_norm: Annotated[float, "gradient norm above which gradients are scaled down"] = 1.0
    optimizer: Annotated[str, "a transformers optimiser name, such as adamw_8bit or adamw_torch_fused"] = "adamw_8bit"
    gradient_checkpointing: Annotated[bool, "recompute activations in the backward pass to save memory"] = True
    save_steps: Annotated[int, "optimiser steps between checkpoints"] = 200
    preflight: Annotated[bool, "predict memory and disk before loading, and refuse what cannot fit"] = True
    report_to: Annotated[str, "also log to tensorboard, wandb or trackio"] = "none"
    price_per_kwh: Annotated[float | None, "price of a kilowatt-hour, for the cost of the energy a GPU reports"] = None
    max_new_tokens: Annotated[int, "longest generated reply in tokens"] = 256
    eval_tokens: Annotated[int, "tokens of prompts and longest replies held at once while generating; the same batches for all compared runs"] = 65_536
    engine: Annotated[str, "what generates: kit, or vllm where it is installed (VLLM_PYTHON: its Python); adapters are merged for it"] = "kit"
    score_tokens: Annotated[
        str, "what BLEU-4 and ROUGE-L count when replies are scored: 13a (words of Latin text), intl (of any script with spaces), zh (Chinese) or char"
    ] = "13a"
    forgetting_text: Annotated[str, "general text to measure forgetting on: builtin, wikitext, a .txt or .jsonl file, or none"] = "builtin"
    # The fields that were asked for by flags, even where that is the default; no setting itself.
    asked: tuple[str, ...] = field(default=(), repr=False, compare=False)

    @property
    def run_name(self) -> str:
        return BASE if self.method == BASE else f"{self.method}-s{self.seed}"

    @property
    def again(self) -> str:
        """The flags that name this run."""
        return f"--method {self.method} --seed {self.seed} --name {self.name}"

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name / self.run_name

    @property
    def data_path(self) -> Path:
        return Path(self.data_dir) / self.name

    @property
    def technique(self) -> Method:
        return METHODS[self.method]

    @property
    def is_local(self) -> bool:
        """Whether model and data all lie on this machine, so that nothing needs the network."""
        origins = [s.partition("=")[2] for s in self.source]
        names = [self.model, *origins, self.forgetting_text]
        return all(name in ("builtin", "builtin-gptneo", "none") or Path(name).expanduser().exists() for name in names)

    def identity(self) -> dict[str, Any]:
        """The fields that must agree for two results to come from the same run, JSON-ready."""
        values = {k: v for k, v in dataclasses.asdict(self).items() if k not in (*PLACES, "asked")}
        if self.method == BASE:  # The untuned model depends on no training setting.
            values = {k: v for k, v in values.items() if k not in TRAINING_FIELDS}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


TRAINING_FIELDS = (
    "seed", "limit_train", "rank", "alpha", "dropout", "target_modules", "update_gap", "projection_scale", "train_embeddings", "tuned", "dora_kernel",
    "epochs", "max_steps", "micro_batch", "accumulation",
    "learning_rate", "schedule", "warmup_ratio", "weight_decay", "max_grad_norm", "optimizer", "gradient_checkpointing", "save_steps",
)  # fmt: skip
# What decides how a run is evaluated and nothing before.
EVALUATION_FIELDS = ("limit_test", "max_new_tokens", "eval_tokens", "engine")
# What the data folder depends on: two configurations that agree here share one data folder.
DATA_FIELDS = ("source", "train_per_source", "test_per_source", "valid_per_source", "data_seed", "model", "revision", "format", "max_length")
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


@dataclass(frozen=True)
class Field:
    """One RunConfig field as the command line and the recipes see it."""

    name: str
    kind: type
    help: str
    repeat: bool
    default: Any = field(compare=False)


@functools.cache
def fields() -> Mapping[str, Field]:
    """RunConfig's fields by name, with plain types unwrapped from their annotations."""
    hints = get_type_hints(RunConfig, include_extras=True)
    out = {}
    for f in (f for f in dataclasses.fields(RunConfig) if f.name != "asked"):
        annotated, text = get_args(hints[f.name])
        repeat = get_origin(annotated) is tuple
        kinds = [k for k in get_args(annotated) if k not in (type(None), Ellipsis)] or [annotated]
        out[f.name] = Field(f.name, kinds[0], text, repeat, f.default)
    return MappingProxyType(out)


# What a recipe says beside settings; `published` and `unstated` belong to a set-up that somebody else published.
NOTES = ("about", "published", "unstated")


def recipes() -> list[str]:
    return sorted(p.stem for p in RECIPES.glob("*.yaml"))


def load_recipe(name: str) -> dict[str, Any]:
    """A recipe's YAML as a dict; an unknown name or key is a UserError with a suggestion."""
    if name not in recipes():
        raise UserError(unknown("recipe", name, [*recipes(), "auto"]))
    recipe: dict[str, Any] = yaml.safe_load((RECIPES / f"{name}.yaml").read_text(encoding="utf-8"))
    known = {*fields(), *NOTES, "methods"}
    problems = [f"recipe {name}: {unknown('key', k, known)}" for k in recipe if k not in known]
    for method, block in recipe.get("methods", {}).items():
        if method not in METHODS:
            problems.append(f"recipe {name}: {unknown('method', method, METHODS)}")
        problems += [f"recipe {name}, {method}: {unknown('key', k, fields())}" for k in block if k not in fields()]
    if problems:
        raise UserError(*problems)
    return recipe


def resolve(flags: Mapping[str, Any]) -> RunConfig:
    """The configuration that the flags ask for, checked; every problem is reported at once."""
    method = flags.get("method", RunConfig.method)
    if method not in METHODS and method != BASE:
        raise UserError(unknown("method", method, [*METHODS, BASE]))
    name = flags.get("recipe", "auto")
    if name == "auto":
        from kit.device import choose_recipe

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
        values |= narrowed(values, recipe)
    values |= dict(flags) | {"recipe": name}
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    values["source"] = tuple(sorted(values.get("source", ())))
    values["name"] = values.get("name") or name + ("-scaled" if flags.get("scale_down", False) else "")
    config = RunConfig(**values, asked=tuple(flags))
    check(config)
    return with_tuned_rate(config)


def narrowed(values: Mapping[str, Any], recipe: dict[str, Any]) -> dict[str, int]:
    """Rank and alpha for the built-in models, whose narrowest layer holds the largest rank of all methods; alpha / rank stays about the same."""
    rank, alpha = values.get("rank", RunConfig.rank), values.get("alpha", RunConfig.alpha)
    blocks = [recipe | dict(method.settings) | recipe.get("methods", {}).get(name, {}) for name, method in METHODS.items()]
    smaller = max(1, rank * NARROWEST // max(NARROWEST, *(block.get("rank", RunConfig.rank) for block in blocks)))
    return {"rank": smaller, "alpha": max(1, round(alpha * smaller / rank))}


def with_tuned_rate(config: RunConfig) -> RunConfig:
    """With --tuned and no rate asked for, the sweep's; what is built on other methods' runs takes the rates that were found for those."""
    if not config.tuned or "learning_rate" in config.asked or config.method == BASE or config.technique.parts:
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
    """What differs between the sweep's settings and this configuration's; a setting that is newer than the sweep's file is not judged."""
    wanted = config.identity()
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
                "learning_rate", "save_steps", "max_new_tokens", "eval_tokens", "limit_train", "limit_test", "max_steps", "update_gap", "projection_scale",
                "price_per_kwh")  # fmt: skip
    flag = {f: f"--{f.replace('_', '-')}" for f in fields()}
    problems = [f"{flag[f]} must be greater than 0, got {v}" for f in positive if (v := getattr(config, f)) is not None and v <= 0]
    problems += [f"{flag[f]} must not be negative, got {v}" for f in ("valid_per_source", "weight_decay", "max_grad_norm") if (v := getattr(config, f)) < 0]
    problems += [f"{flag[f]} must be from 0 to {2**32 - 1}, got {v}" for f in ("seed", "data_seed") if not 0 <= (v := getattr(config, f)) < 2**32]
    shares = ("dropout", "warmup_ratio")
    problems += [f"{flag[f]} must be from 0 to below 1, got {v}" for f in shares if not 0 <= (v := getattr(config, f)) < 1]
    problems += [unknown(f, getattr(config, f), known) for f, known in CHOICES.items() if getattr(config, f) not in known]
    if config.max_length < 32:
        problems.append(f"--max-length must be at least 32 to hold a prompt and a reply, got {config.max_length}")
    if config.method == "combined" and not config.valid_per_source:
        problems.append("combined chooses its weights on validation rows: give --valid-per-source, with a new --name if there are data and runs of this one")
    if config.method != BASE and config.technique.full:
        problems += (
            ["--precision float16 cannot train whole weights (their updates underflow); use float32 or bfloat16"] if config.precision == "float16" else []
        )
        problems += [f"--dropout is for adapters; {config.method} trains the weights themselves"] if config.dropout else []
    for name in (config.name, *(s.partition("=")[0] for s in config.source)):
        if not name or name in (".", "..") or not all(c.isalnum() or c in "-_." for c in name):
            problems.append(f"{name!r} cannot name a folder or source: use letters, digits, '-', '_' and '.'")
    if problems:
        raise UserError(*problems)
