"""TRL's SFTTrainer as the kit uses it: ready-made tokens and labels, one row order for all methods, counted tokens, the method's optimiser."""

from __future__ import annotations

import importlib.util
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kit import processes
from kit.config import RunConfig
from kit.errors import UserError
from kit.prompts import IGNORE, Example


def make_trainer(config: RunConfig, model: Any, tokenizer: Any, examples: list[Example], folder: Path, *, precision: str, skip: int = 0) -> Any:
    """An SFTTrainer over examples whose tokens and labels are made already, the same rows in the same order for every method.

    `skip`: optimiser steps of the order that an earlier part of the same training has made.
    """
    order = Order([len(e.input_ids) for e in examples], config.micro_batch * config.accumulation, config.seed, skip)
    # accelerate would show some rows twice, so that each process has as many.
    if processes.count() > 1 and len(order) % (config.micro_batch * processes.count()):
        raise UserError(f"{len(examples)} training rows, which fill no batch, cannot be shared by {processes.count()} processes; start one")

    from accelerate.utils import patch_environment
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    # TRL casts a 4-bit model's adapter to bfloat16; every method trains a float32 adapter here, from the same initial values.
    adapter = {} if config.technique.full else {n: p.detach().clone().float() for n, p in model.named_parameters() if p.requires_grad}
    # On a GPU with bfloat16 Unsloth would turn autocast on for weights in float32, but not where this says that they are in 16 bits. So would accelerate on
    # any device, where its launcher says so, as by the settings file that it keeps.
    without_autocast = {"UNSLOTH_MIXED_PRECISION": "bfloat16", "ACCELERATE_MIXED_PRECISION": "no"} if precision == "float32" else {}
    with patch_environment(**without_autocast):
        trainer = type("Trainer", (Kit, SFTTrainer), {})(
            model=model, processing_class=tokenizer, args=SFTConfig(**arguments(config, folder, precision)),
            train_dataset=Dataset.from_list([{"input_ids": e.input_ids, "labels": e.labels} for e in examples]),
            data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id),
        )  # fmt: skip
    trainer.config, trainer.order = config, order
    for name, parameter in model.named_parameters():
        if name in adapter:
            parameter.data = adapter[name]
    return trainer


def steps_per_epoch(rows: int, effective_batch: int) -> int:
    """Optimiser steps an epoch: of whole effective batches alone (the rest would weigh more in its step), or one of all rows where they fill none."""
    return max(rows // effective_batch, 1)


class Order:
    """A sampler: effective batches of random rows, the one with the longest row first, in an order that depends on seed and epoch alone.

    Rows are sorted by length within an effective batch alone: its micro-batches have less padding, and its gradient stays what it was.
    Effective batches of like length would save more, but each would count as much as any other, however few tokens it holds: short rows
    would weigh more than in the loss that is asked for (on the built-in data validation perplexity rose from 1.86 to 2.09).
    Rows that fill no batch are left out of the epoch, others in each. With `skip`, the stream of epochs begins that many steps later.
    """

    def __init__(self, lengths: list[int], effective_batch: int, seed: int, skip: int = 0) -> None:
        self.lengths, self.seed, self.epoch = lengths, seed, 0
        self.steps, self.size = steps_per_epoch(len(lengths), effective_batch), min(effective_batch, len(lengths))
        self.epochs, offset = divmod(skip, self.steps)
        self.offset = offset * self.size

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.size

    def __iter__(self) -> Iterator[int]:
        epoch = self.epoch + self.epochs
        rows = self._rows(epoch)
        return iter(rows[self.offset :] + self._rows(epoch + 1)[: self.offset] if self.offset else rows)

    def _rows(self, epoch: int) -> list[int]:
        rng = random.Random(f"{self.seed} {epoch}")
        rows, size = list(range(len(self.lengths))), self.size
        rng.shuffle(rows)
        batches = [sorted(rows[i : i + size], key=self.lengths.__getitem__, reverse=True) for i in range(0, self.steps * size, size)]
        # Memory runs out at the first step or never. That one alone: many rows are as long as the maximum length, and belong anywhere.
        batches.insert(0, batches.pop(max(range(len(batches)), key=lambda i: self.lengths[batches[i][0]])))
        return [row for batch in batches for row in batch]


class Kit:
    """Mixed into the trainer: the kit's row order, a count of the tokens that were trained on, and the method's optimiser."""

    order: Order
    config: RunConfig
    seen: tuple[Any, Any] = (0, 0)
    optimizer: Any

    def _get_train_sampler(self, *_: Any) -> Order:
        return self.order

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels, mask = inputs["labels"], inputs.get("attention_mask")
        total, supervised = self.seen
        # Not read before the step is logged: a GPU would have to be waited for.
        self.seen = (total + (labels.numel() if mask is None else mask.sum()), supervised + (labels != IGNORE).sum())
        self.state.seen = self.seen  # type: ignore[attr-defined]
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]

    def _load_optimizer_and_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        processes.restore_numbered_cpus()
        return super()._load_optimizer_and_scheduler(*args, **kwargs)  # type: ignore[misc]

    def _run_epoch(self, *args: Any, **kwargs: Any) -> Any:
        """Nothing where the checkpoint has all steps behind it: transformers asks whether training is over after a step, and would make one more."""
        if self.state.global_step < self.state.max_steps:  # type: ignore[attr-defined]
            return super()._run_epoch(*args, **kwargs)  # type: ignore[misc]
        self.control.should_training_stop = True  # type: ignore[attr-defined]
        return None

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        """Warm-up leaves a step at the full rate: its share is rounded up, and of a single step that would be all, at a rate of zero."""
        self.args.warmup_steps = min(self.args.get_warmup_steps(num_training_steps), num_training_steps - 1)  # type: ignore[attr-defined]
        return super().create_scheduler(num_training_steps, *args, **kwargs)  # type: ignore[misc]

    def create_optimizer(self, model: Any = None) -> Any:
        """The trainer's own optimiser, one with a rate of its own for B, or the low-rank one of the methods that project gradients."""
        trained = self.model if model is None else model  # type: ignore[attr-defined]
        if self.optimizer is None and self.config.technique.projection:
            self.optimizer = low_rank_optimizer(self.config, trained)
        elif self.optimizer is None and not self.config.technique.full and self.config.loraplus_lr_ratio != 1:
            from peft.optimizers import create_loraplus_optimizer

            kind, settings = self.get_optimizer_cls_and_kwargs(self.args, trained)  # type: ignore[attr-defined]
            ratio, decay = self.config.loraplus_lr_ratio, self.config.weight_decay
            self.optimizer = create_loraplus_optimizer(trained, kind, **settings, loraplus_lr_ratio=ratio, loraplus_weight_decay=decay)
        return self.optimizer or super().create_optimizer(*([model] if model is not None else []))  # type: ignore[misc]


def low_rank_optimizer(config: RunConfig, model: Any) -> Any:
    """GaLore or APOLLO over the target modules, AdamW over the rest; 8-bit states on a GPU where the optimiser's name asks for them."""
    from kit.lowrank import LowRankAdamW, parameter_groups

    groups = parameter_groups(
        model, targets=config.target_modules, rank=config.rank, update_gap=config.update_gap, scale=config.projection_scale,
        projection=config.technique.projection, weight_decay=config.weight_decay,
    )  # fmt: skip
    return LowRankAdamW(groups, lr=config.learning_rate, seed=config.seed, eight_bit="8bit" in config.optimizer and next(model.parameters()).is_cuda)


def arguments(config: RunConfig, folder: Path, precision: str) -> dict[str, Any]:
    """The keyword arguments of TRL's SFTConfig."""
    # Left alone, TRL turns on bfloat16 autocast wherever the processor has it, whatever the model's precision. On a GPU Unsloth sets both.
    mixed = {"bf16": False, "fp16": False} if precision == "float32" else {}
    return {
        "output_dir": str(folder / "checkpoints"), "seed": config.seed, "data_seed": config.seed,
        "num_train_epochs": config.epochs, "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.micro_batch, "gradient_accumulation_steps": config.accumulation // processes.count(),
        "learning_rate": config.learning_rate, "lr_scheduler_type": config.schedule, "warmup_steps": config.warmup_ratio,
        "weight_decay": config.weight_decay, "max_grad_norm": config.max_grad_norm, "optim": config.optimizer,
        "gradient_checkpointing": config.gradient_checkpointing, "save_strategy": "steps", "save_steps": config.save_steps,
        "save_total_limit": 2, "logging_steps": 1, "report_to": tracker(config, folder), "run_name": f"{config.name}/{config.run_name}",
        "disable_tqdm": True, "max_length": None, "dataset_kwargs": {"skip_prepare_dataset": True},
        # The loss of a mixture is that of its replies, as any model's: TRL would add one that balances the experts, and knows not every family's.
        "router_aux_loss_coef": 0.0,
        # The trainer would hide a NaN loss behind the running mean.
        "logging_nan_inf_filter": False, **mixed,
    }  # fmt: skip


def tracker(config: RunConfig, folder: Path) -> str:
    """transformers' name of the tracker, its files beside the run's; one that is not installed is a UserError."""
    packages = {"tensorboard": ("tensorboard", "tensorboardX"), "none": ("transformers",)}.get(config.report_to, (config.report_to,))
    if not any(importlib.util.find_spec(p) for p in packages):
        raise UserError(f"--report-to {config.report_to} needs a package that is not installed; run: .venv/bin/python -m pip install {packages[0]}")
    os.environ.update({"TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard"), "WANDB_DIR": str(folder)})
    return config.report_to
