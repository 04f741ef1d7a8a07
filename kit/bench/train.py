"""The kit's training step beside what a plain transformers + TRL + PEFT script makes of the same model, rows, mask, precision and batch.

Packing was looked at and left out. Without padding (TRL's `padding_free`, or its packing) the rows of a batch follow each other in one
sequence; transformers 5.17 finds their borders in the position ids and masks attention also where no flash attention is installed, so on a
CPU logits equal those of single rows to rounding (1e-5 in float32), but only with `use_cache=False`: with a cache rows see each other.
Packing would also change which rows make a batch; `padding_free` would not, but its attention spans the micro-batch, and on a GPU it has not been tried.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit import dataset
from kit.bench.harness import summary
from kit.bench.turns import Job, Step, alternate, sides
from kit.config import BASE, RunConfig
from kit.console import say
from kit.hub import load_tokenizer, loadable
from kit.model import attach, load_base, precision
from kit.prompts import Example, Renderer
from kit.resources import Phases
from kit.settings import sibling
from kit.trainer import make_trainer, steps_per_epoch
from kit.training import add_progress

ROWS = 192
NEVER = 10**9
# Compared where no --method is given; the others have no counterpart or differ from one of these in the rank alone.
COMPARED = ("qlora", "lora", "dora", "full")
NO_COUNTERPART = {
    "galore": "a plain script needs galore-torch, which is not installed", "apollo": "a plain script needs apollo-torch, which is not installed",
    "hybrid": "a plain script has no counterpart", "combined": "a plain script has no counterpart",
}  # fmt: skip


def train(config: RunConfig, rounds: int) -> dict[str, Any]:
    """An epoch a round, steps of both sides in turn. Beside times: unpadded tokens a second, share of padding, loss a token over the last epoch."""
    methods = COMPARED if config.method == BASE else (config.method,)
    skipped = {m: NO_COUNTERPART[m] for m in methods if m in NO_COUNTERPART}
    made: dict[str, list[list[Step]]] = {}
    for method in (m for m in methods if m not in NO_COUNTERPART):
        own = dataclasses.replace(sibling(config, method), limit_train=config.limit_train or ROWS, epochs=rounds + 1, save_steps=NEVER, max_steps=None)
        try:
            made |= compare(own, rounds)
        except MemoryError as error:
            skipped[method] = f"out of memory: {error}"
    for method, reason in skipped.items():
        say(f"{method} is left out: {reason}")
    times = {name: [sum(s.seconds for s in steps) for steps in epochs] for name, epochs in made.items()}
    pairs = [(name, name.replace(" kit", " plain")) for name in made if name.endswith(" kit")]
    found = summary("train", times, {name: epochs[-1][-1].peak_gib for name, epochs in made.items()}, pairs)
    for name, epochs in made.items():
        found["variants"][name] |= rates(epochs[-1], found["variants"][name]["median_s"])
    return found | {"skipped": skipped}


def rates(steps: Sequence[Step], seconds: float) -> dict[str, float | None]:
    """What an epoch's steps were made of; the loss is None where it is not finite (Gemma 3 in float16)."""
    loss = sum(s.loss * s.supervised for s in steps) / sum(s.supervised for s in steps)
    tokens, padded = sum(s.tokens for s in steps), sum(s.padded for s in steps)
    return {"tokens_per_s": tokens / seconds, "padding_share": 1 - tokens / padded, "loss": loss if math.isfinite(loss) else None}


def compare(config: RunConfig, rounds: int) -> dict[str, list[list[Step]]]:
    """{"METHOD kit": steps of every round, "METHOD plain": ...}; the first epoch warms up and is left out."""
    examples, size = training_examples(config), config.micro_batch * config.accumulation
    examples = examples[: steps_per_epoch(len(examples), size) * size]  # the kit leaves the rest out, plain TRL does not
    jobs = {f"{config.method} {name}": [Job(make, config, examples)] for name, make in (("kit", kit_trainer), ("plain", plain_trainer))}
    steps = next(iter(jobs.values()))[0].steps
    made: dict[str, list[list[Step]]] = {name: [] for name in jobs}
    with sides(jobs) as opened:
        for number in range(rounds + 1):
            epoch = alternate(opened, steps)
            counted = {(sum(s.tokens for s in side), sum(s.supervised for s in side)) for side in epoch.values()}
            if len(counted) > 1:
                raise RuntimeError(f"both sides must train on the same tokens and labels, counted {counted}")
            if number:
                for name, side in epoch.items():
                    made[name].append(side)
            say(f"round {number} of {rounds}: " + ", ".join(f"{n} {sum(s.seconds for s in side):.3f} s" for n, side in epoch.items()))
    return made


def training_examples(config: RunConfig) -> list[Example]:
    """The training rows as tokens and labels, made once for all sides."""
    rows = dataset.rows(config, "train")
    return Renderer(load_tokenizer(config.model, config.revision), config.format, config.max_length).examples(rows)


def kit_trainer(config: RunConfig, examples: list[Example], folder: Path) -> Any:
    """The kit's own path, its progress and log included."""
    model, tokenizer, chosen = load_base(config, training=True)
    trainer = make_trainer(config, attach(model, config), tokenizer, examples, folder, precision=chosen.name)
    add_progress(trainer, folder / "log.jsonl", Phases(), 0)
    return trainer


def plain_trainer(config: RunConfig, examples: list[Example], folder: Path) -> Any:
    """SFTTrainer as its documentation shows it, with its default random batches; adapters in float32, as the kit's are."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer
    from trl import SFTConfig, SFTTrainer

    name, whole = precision(config, training=True).name, config.technique.full
    dtype = getattr(torch, name)
    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
    model = AutoModelForCausalLM.from_pretrained(
        loadable(config.model, config.revision), revision=config.revision or None, dtype=torch.float32 if whole else dtype,
        quantization_config=four_bit if config.technique.four_bit else None, device_map={"": 0 if torch.cuda.is_available() else "cpu"},
    )  # fmt: skip
    adapter = LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(config.target_modules),
        use_dora=config.technique.adapter == "dora", task_type="CAUSAL_LM",
    )  # fmt: skip
    if whole and not config.train_embeddings:
        model.get_input_embeddings().requires_grad_(False)
    # The loss head of TRL 1.15 is a Triton kernel, for which a CPU has no driver: transformers' loss stands in there.
    kind = SFTTrainer if torch.cuda.is_available() else type("OnCpu", (SFTTrainer,), {"compute_loss": Trainer.compute_loss})
    trainer = kind(
        model=model, processing_class=load_tokenizer(config.model, config.revision), args=SFTConfig(**plain_arguments(config, folder, name)),
        train_dataset=Dataset.from_list([{"input_ids": e.input_ids, "labels": e.labels} for e in examples]), peft_config=None if whole else adapter,
    )  # fmt: skip
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return trainer


def plain_arguments(config: RunConfig, folder: Path, precision: str) -> dict[str, Any]:
    """The same hyperparameters; everything else is TRL's default."""
    return {
        "output_dir": str(folder), "seed": config.seed, "num_train_epochs": config.epochs, "per_device_train_batch_size": config.micro_batch,
        "gradient_accumulation_steps": config.accumulation, "learning_rate": config.learning_rate, "lr_scheduler_type": config.schedule,
        "warmup_steps": config.warmup_ratio, "weight_decay": config.weight_decay, "max_grad_norm": config.max_grad_norm, "optim": config.optimizer,
        "gradient_checkpointing": config.gradient_checkpointing, "bf16": precision == "bfloat16", "fp16": precision == "float16",
        "max_length": None, "save_strategy": "no", "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
