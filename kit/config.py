"""RunConfig: one field is one flag, one help line and one key in config.json; and the recipes that are shipped. kit/settings.py resolves them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import yaml

from kit.errors import UserError, unknown
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
# Where the groups of --help begin.
GROUPS = {"recipe": "experiment", "model": "model", "source": "data", "rank": "method", "epochs": "training", "max_new_tokens": "evaluation"}


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
    rslora: Annotated[bool, "rank-stabilised scale: alpha / sqrt(rank) in place of alpha / rank"] = False
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
    loraplus_lr_ratio: Annotated[float, "LoRA+: the learning rate of the adapter's B (and magnitude) over that of its A, which is --learning-rate"] = 1.0
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
    "seed", "limit_train", "rank", "alpha", "rslora", "dropout", "target_modules", "update_gap", "projection_scale", "train_embeddings", "tuned", "dora_kernel",
    "epochs", "max_steps", "micro_batch", "accumulation",
    "learning_rate", "loraplus_lr_ratio", "schedule", "warmup_ratio", "weight_decay", "max_grad_norm", "optimizer", "gradient_checkpointing", "save_steps",
)  # fmt: skip
# What decides how a run is evaluated and nothing before.
EVALUATION_FIELDS = ("limit_test", "max_new_tokens", "eval_tokens", "engine")
# What the data folder depends on: two configurations that agree here share one data folder.
DATA_FIELDS = ("source", "train_per_source", "test_per_source", "valid_per_source", "data_seed", "model", "revision", "format", "max_length")


def completed(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as a file has them, JSON-ready, with the defaults of those that are newer than it."""
    return RunConfig().identity() | dict(settings)


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
