"""A configuration and its data -> a trained adapter, through Unsloth and TRL's SFTTrainer."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kit import dataset, runs
from kit.config import BASE, RunConfig
from kit.console import say
from kit.errors import UserError
from kit.files import read_json, write_json
from kit.model import attach, load_base, prepare_data
from kit.progress import TrainingProgress
from kit.prompts import IGNORE, Example, Renderer
from kit.resources import Phases

# Batches whose rows are sorted by length together: wide enough to save padding, narrow enough to keep the batches random.
GROUP = 50


def train(config: RunConfig) -> dict[str, Any]:
    """The run's train.json; trains what is missing, from the last complete checkpoint, and does nothing when the run is done."""
    if config.method == BASE:
        raise UserError("base is the untuned model: it is evaluated, not trained")
    prepare_data(config)
    folder = runs.open_run(config)
    result = folder / "train.json"
    if result.exists() and (record := read_json(result))["status"] == "done":
        say(f"{folder} is trained already")
        return dict(record)
    try:
        record = _run(config, folder)
    except BaseException as error:
        _record_failure(folder, error)
        raise
    write_json(result, record)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return record


def _record_failure(folder: Path, error: BaseException) -> None:
    """Leaves a train.json that says how the run ended; the same command tries again."""
    name = type(error).__name__
    memory = name in ("OutOfMemoryError", "MemoryError")
    status = "oom" if memory else "cancelled" if isinstance(error, KeyboardInterrupt) else "failed"
    write_json(folder / "train.json", {"schema": runs.SCHEMA, "status": status, "reason": f"{name}: {str(error).splitlines()[0] if str(error) else ''}"})
    if memory:
        raise UserError("out of memory while training; lower --micro-batch (and raise --accumulation to keep the effective batch) or --max-length") from None


def _run(config: RunConfig, folder: Path) -> dict[str, Any]:
    phases = Phases()
    with phases("load"):
        rows = dataset.rows(config, "train")
        model, tokenizer, chosen = load_base(config)
        model = attach(model, config)
        examples = Renderer(tokenizer, config.format, config.max_length).examples(rows)
    trainer = make_trainer(config, model, tokenizer, examples, folder)
    counts = {"trainable_params": sum(p.numel() for p in model.parameters() if p.requires_grad), "total_params": model_size(model)}
    checkpoint = last_checkpoint(folder / "checkpoints")
    if checkpoint:
        say(f"going on from {checkpoint.name}")
    progress = add_progress(trainer, folder / "log.jsonl", phases, step_of(checkpoint))
    try:
        outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        progress.close()
    with phases("save"):
        save_adapter(model, tokenizer, folder)
    size = sum(f.stat().st_size for f in (folder / "adapter").glob("adapter_model*"))
    return {
        "schema": runs.SCHEMA, "status": "done", "phases": phases.record, "train_wall_s": progress.wall_s,
        "peak_memory_gib": progress.peak_gib, "steps": outcome.global_step, "epochs": trainer.state.epoch, **progress.totals(),
        **counts, "adapter_mib": size / 2**20, "final_loss": progress.final_loss, "precision": chosen._asdict(),
        "provenance": runs.provenance(config, dataset.manifest_hash(config)),
    }  # fmt: skip


def model_size(model: Any) -> int:
    """Parameters of the model, a 4-bit weight counted by the values it stands for and a tied weight once."""
    return sum(p.quant_state.shape.numel() if getattr(p, "quant_state", None) is not None else p.numel() for p in model.parameters())


def save_adapter(model: Any, tokenizer: Any, folder: Path) -> None:
    """PEFT's format with the tokenizer beside it; the folder appears only when complete."""
    beside = folder / ".adapter"
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(str(beside))
    tokenizer.save_pretrained(str(beside))
    shutil.rmtree(folder / "adapter", ignore_errors=True)
    beside.rename(folder / "adapter")


def add_progress(trainer: Any, log: Path, phases: Phases, step: int) -> TrainingProgress:
    """The kit's progress in place of the trainer's own."""
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    made: TrainingProgress = type("Progress", (TrainingProgress, TrainerCallback), {})(log, phases, step)
    trainer.add_callback(made)
    return made


def step_of(checkpoint: Path | None) -> int:
    return int(checkpoint.name.rpartition("-")[2]) if checkpoint else 0


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that was written to its end (the trainer writes trainer_state.json last)."""
    complete = [p for p in folder.glob("checkpoint-*") if (p / "trainer_state.json").exists()]
    return max(complete, key=step_of, default=None)


def make_trainer(config: RunConfig, model: Any, tokenizer: Any, examples: list[Example], folder: Path) -> Any:
    """An SFTTrainer over examples whose tokens and labels are made already, the same rows in the same order for every method."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    # TRL casts a 4-bit model's adapter to bfloat16; every method trains a float32 adapter here, from the same initial values.
    adapter = {n: p.detach().clone().float() for n, p in model.named_parameters() if p.requires_grad}
    trainer = type("Trainer", (Counting, SFTTrainer), {})(
        model=model, processing_class=tokenizer, args=SFTConfig(**arguments(config, folder)),
        train_dataset=Dataset.from_list([{"input_ids": e.input_ids, "labels": e.labels} for e in examples]),
        data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id),
    )  # fmt: skip
    trainer.order = Order([len(e.input_ids) for e in examples], config.micro_batch * config.accumulation, config.seed)
    for name, parameter in model.named_parameters():
        if name in adapter:
            parameter.data = adapter[name]
    return trainer


class Order:
    """A sampler: batches of rows of like length, the longest batch first, in an order that depends on seed and epoch alone.

    transformers' own grouping falls from long to short rows over and over, which the loss follows; here the batches are shuffled.
    """

    def __init__(self, lengths: list[int], effective_batch: int, seed: int) -> None:
        self.lengths, self.effective_batch, self.seed, self.epoch = lengths, effective_batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        rng = random.Random(f"{self.seed} {self.epoch}")
        rows, size = list(range(len(self.lengths))), self.effective_batch
        rng.shuffle(rows)
        full = len(rows) - len(rows) % size
        pools = [sorted(rows[i : min(i + GROUP * size, full)], key=self.lengths.__getitem__) for i in range(0, full, GROUP * size)]
        batches = [pool[i : i + size] for pool in pools for i in range(0, len(pool), size)]
        rng.shuffle(batches)
        # Memory runs out at the first step or never (sort is stable: the others stay shuffled).
        batches.sort(key=lambda batch: self.lengths[batch[-1]] < max(self.lengths))
        return iter([row for batch in [*batches, rows[full:]] for row in batch])


class Counting:
    """Mixed into the trainer: the kit's row order, and a count of the tokens that were trained on."""

    order: Order
    seen = (0, 0)

    def _get_train_sampler(self, *_: Any) -> Order:
        return self.order

    def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        labels, mask = inputs["labels"], inputs.get("attention_mask")
        total, supervised = self.seen
        self.seen = (total + int(labels.numel() if mask is None else mask.sum()), supervised + int((labels != IGNORE).sum()))
        self.state.seen = self.seen  # type: ignore[attr-defined]
        return super().training_step(model, inputs, *args, **kwargs)  # type: ignore[misc]


def arguments(config: RunConfig, folder: Path) -> dict[str, Any]:
    """The keyword arguments of TRL's SFTConfig."""
    return {
        "output_dir": str(folder / "checkpoints"), "seed": config.seed, "data_seed": config.seed,
        "num_train_epochs": config.epochs, "max_steps": config.max_steps or -1,
        "per_device_train_batch_size": config.micro_batch, "gradient_accumulation_steps": config.accumulation,
        "learning_rate": config.learning_rate, "lr_scheduler_type": config.schedule, "warmup_steps": config.warmup_ratio,
        "weight_decay": config.weight_decay, "max_grad_norm": config.max_grad_norm, "optim": config.optimizer,
        "gradient_checkpointing": config.gradient_checkpointing, "save_strategy": "steps", "save_steps": config.save_steps,
        "save_total_limit": 2, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }  # fmt: skip
