"""A configuration and its data -> a trained run: gated, resumable, and honest about how it ended."""

from __future__ import annotations

import math
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit import card, dataset, gates, processes, runs
from kit.checkpoints import last_checkpoint, step_of
from kit.config import BASE, RunConfig
from kit.console import console, say
from kit.errors import UserError, first_line
from kit.files import held, read_json, replaced_folder, write_json
from kit.generation import likelihoods
from kit.memory import OutOfMemory, enough_memory, fitting, largest_that_fits
from kit.model import attach, free_memory, import_unsloth, load_base, ordered, prepare_data, saved_folder
from kit.preflight import check
from kit.progress import Stopped, TrainingProgress
from kit.prompts import Example, Renderer
from kit.resources import Phases, energy, is_memory_error
from kit.trainer import make_trainer

Record = dict[str, Any]


# What an evaluation leaves: of another model than the one that is to be trained.
EVALUATED = ("eval.json", "predictions.jsonl", "samples.json", "tasks.json")


def train(config: RunConfig) -> Record:
    """The run's train.json; trains what is missing, from the last complete checkpoint, and does nothing when the run is done."""
    if config.method == BASE:
        raise UserError("base is the untuned model: it is evaluated, not trained")
    if config.accumulation % processes.count():
        raise UserError(f"--accumulation {config.accumulation} cannot be shared by {processes.count()} processes: make it a multiple of their number")
    if processes.count() > 1 and (config.technique.parts or config.auto_batch):
        raise UserError(f"{config.method if config.technique.parts else '--auto-batch'} runs in one process alone; start one, on one GPU")
    console.quiet = not processes.first()
    prepare_data(config)
    with held(config.run_dir) if processes.first() else nullcontext():
        return _train(config)


def _train(config: RunConfig) -> Record:
    folder = runs.open_run(config)
    result = folder / "train.json"
    if result.exists() and (record := read_json(result, "status"))["status"] == "done":
        if any(saved_folder(config).glob("*.safetensors")):
            say(f"{folder} is trained already")
            shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            return dict(record)
        say(f"{saved_folder(config)} is gone: training again")
    for name in EVALUATED if processes.first() else ():
        (folder / name).unlink(missing_ok=True)
    try:
        record = _method(config, folder)
    except BaseException as error:
        if processes.first():
            _record_failure(config, folder, error)
        raise
    if not processes.first():
        return record
    card.write(config, record)
    write_json(result, record)
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return record


def _method(config: RunConfig, folder: Path) -> Record:
    if not config.technique.parts:
        return run(config, folder)
    from kit import hybrid

    return hybrid.combine(config, folder) if config.method == "combined" else hybrid.sequential(config, folder)


def run(config: RunConfig, folder: Path, *, skip: int = 0, start: Path | None = None) -> Record:
    """Trains once; out of memory with auto_batch: again with the largest micro-batch that fits, at the same effective batch.

    `skip` steps were made by an earlier part, whose adapter in `start` is gone on from.
    """
    if config.auto_batch and (checkpoint := last_checkpoint(folder / "checkpoints")):
        config = fitting(config, read_json(checkpoint / "trainer_state.json").get("train_batch_size") or config.micro_batch)
    while True:
        try:
            return _once(config, folder, skip=skip, start=start)
        except OutOfMemory as error:
            if not config.auto_batch or error.fits is None:
                raise
            config = fitting(config, error.fits)
            say(f"out of memory: going on with micro-batch {config.micro_batch} and accumulation {config.accumulation}, the same effective batch")
        # Outside the handler: the exception's frames hold the model.
        free_memory()


def _record_failure(config: RunConfig, folder: Path, error: BaseException) -> None:
    """Leaves a train.json that says how the run ended; the same command tries again."""
    name = type(error).__name__
    status = "oom" if isinstance(error, OutOfMemory) else "cancelled" if isinstance(error, KeyboardInterrupt) else "failed"
    # What is said to the user needs no name of a Python class before it.
    said = first_line(error) if isinstance(error, (UserError, Stopped)) else f"{name}: {str(error).splitlines()[0] if str(error) else ''}"
    if status == "cancelled" and not str(error):
        said = "stopped; the same command goes on where it stopped"
    record: Record = {"schema": runs.SCHEMA, "status": status, "reason": said}
    if not isinstance(error, OutOfMemory):
        write_json(folder / "train.json", record)
        return
    record["reason"] = f"out of memory in phase {error.phase}" + (f"; micro-batch {error.fits} would have fitted" if error.fits else "")
    write_json(folder / "train.json", record | {"phase": error.phase, "peak_memory_gib": error.peak_gib, "largest_micro_batch": error.fits})
    if error.fits is None:
        raise UserError(f"out of memory while training ({error.phase}); lower --micro-batch, --max-length or --rank, or choose a 4-bit method") from None
    fits = f"--micro-batch {error.fits} --accumulation {fitting(config, error.fits).accumulation}"
    raise UserError(f"out of memory while training ({error.phase}); this fits at the same effective batch: {fits}, or let --auto-batch find it") from None


@dataclass
class Loaded:
    """A model ready to train, and what it trains on."""

    config: RunConfig
    model: Any
    renderer: Renderer
    rows: list[dict[str, Any]]
    examples: list[Example]
    precision: Any


def _load(config: RunConfig, start: Path | None) -> Loaded:
    rows = dataset.rows(config, "train")
    model, tokenizer, chosen = load_base(config, training=True)
    model = attach(model, config)
    if start:
        from kit.hybrid import widen

        widen(model, start)
    renderer = Renderer(tokenizer, config.format, config.max_length)
    return Loaded(config, model, renderer, rows, renderer.examples(rows), chosen)


def _once(config: RunConfig, folder: Path, *, skip: int, start: Path | None) -> Record:
    import_unsloth()
    from kit.lowrank import state_bytes

    phases = Phases()
    predicted = check(config)
    with phases("load"), enough_memory("load"):
        loaded = _load(config, start)
    model = loaded.model
    trainer = make_trainer(config, model, loaded.renderer.tokenizer, loaded.examples, folder, precision=loaded.precision.name, skip=skip)
    trainable = [p for p in model.parameters() if p.requires_grad]
    counts = {"trainable_params": sum(p.numel() for p in trainable), "total_params": model_size(model)}
    pad = loaded.renderer.tokenizer.pad_token_id
    with enough_memory("checks before training"):
        start_state = gates.before(model, loaded.examples, pad)
    if left := len(loaded.examples) - len(trainer.order):
        say(f"{left} of {len(loaded.examples)} rows fill no batch of {trainer.order.size} and are left out of each epoch, others each time")
    progress = _steps(config, trainer, folder, phases, skip)
    with phases("save"):
        if processes.first():
            save(config, model, loaded.renderer.tokenizer, folder, loaded.precision.name)
        trainer.accelerator.wait_for_everyone()  # what the first one has written is there for the others
    checks = gates.supervision(loaded.renderer, loaded.rows, loaded.examples)
    with enough_memory("checks after training"):
        end = gates.loss(model, loaded.examples, pad)
        checks |= gates.training(model, start=start_state, end=end, fed=progress.fed, log=progress.rows[skip:], peak_rate=config.learning_rate)
        if processes.first():
            gates.write_probe(model, loaded.examples, pad, folder)
    totals = progress.totals()
    return {
        "schema": runs.SCHEMA, "status": "done", "phases": phases.record, **totals, "epochs": totals["steps"] / trainer.order.steps,
        "rows_left_out": left, "predicted_memory_gib": predicted, **counts, "adapter_mib": folder_mib(folder / saved_folder(config).name),
        "final_loss": progress.final_loss, "valid_perplexity": _validate(config, loaded, phases), "micro_batch": config.micro_batch,
        "accumulation": config.accumulation, "optimizer_state_mib": state_bytes(trainer.optimizer) / 2**20,
        "energy": energy(progress.rows[-1]["energy_j"], config.price_per_kwh),
        "precision": loaded.precision._asdict(), "gates": gates.record(checks), "provenance": runs.provenance(config, dataset.manifest_hash(config)),
    }  # fmt: skip


def _steps(config: RunConfig, trainer: Any, folder: Path, phases: Phases, skip: int) -> TrainingProgress:
    """The optimiser steps, from the last complete checkpoint; an earlier part's `skip` steps are in the log already."""
    with trainer.accelerator.main_process_first():  # which removes damaged ones
        checkpoint = last_checkpoint(folder / "checkpoints")
    if processes.first():  # how an earlier attempt ended is not how this one does; by now no process reads it any more
        (folder / "train.json").unlink(missing_ok=True)
    if checkpoint:
        say(f"going on from {checkpoint.name}")
    progress = add_progress(trainer, folder / "log.jsonl", phases, step_of(checkpoint), skip)
    try:
        with progress.stoppable():
            outcome = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        if not is_memory_error(error):
            raise
        phase = "steps" if "warmup" in phases.record else "warmup"
        error.__traceback__ = None  # its frames hold the batch that did not fit
        free_memory()
        raise OutOfMemory(phase, progress.memory_gib(), largest_that_fits(trainer, config)) from None
    finally:
        progress.close()
    if progress.stopped:
        raise Stopped(f"stopped at step {outcome.global_step}, saved as checkpoint-{outcome.global_step}; the same command goes on there")
    return progress


def _validate(config: RunConfig, loaded: Loaded, phases: Phases) -> float | None:
    """Perplexity of the validation rows' replies, or None without such rows: what choices are made on, so that test is opened once."""
    if not config.valid_per_source:
        return None
    with phases("validation"):
        import_unsloth().FastModel.for_inference(loaded.model)
        exams = loaded.renderer.exams(dataset.rows(config, "valid"))
        return perplexity(loaded.model, exams, loaded.renderer.tokenizer.pad_token_id)


def perplexity(model: Any, exams: list[Any], pad: int, size: int = 32) -> float | None:
    """Token-weighted perplexity of the reference replies; None when it is not finite."""
    ordered = sorted(exams, key=lambda e: -len(e.prompt_ids) - len(e.reference_ids))
    total = sum(sum(likelihoods(model, ordered[i : i + size], pad)) for i in range(0, len(ordered), size))
    nats = total / sum(len(e.reference_ids) for e in exams)
    return math.exp(nats) if math.isfinite(nats) and nats < 700 else None


def model_size(model: Any) -> int:
    """Parameters of the model, a 4-bit weight counted by the values it stands for and a tied weight once."""
    return sum(p.quant_state.shape.numel() if getattr(p, "quant_state", None) is not None else p.numel() for p in model.parameters())


def folder_mib(folder: Path) -> float:
    return float(sum(f.stat().st_size for f in folder.glob("*.safetensors")) / 2**20)


def save(config: RunConfig, model: Any, tokenizer: Any, folder: Path, precision: str) -> None:
    """The adapter in PEFT's format, or the whole model in the computing precision, with the tokenizer; appears only when complete."""
    if config.technique.full:
        import torch

        model.to(getattr(torch, precision))
    with replaced_folder(folder / saved_folder(config).name) as beside:
        ordered(model).save_pretrained(str(beside))
        tokenizer.save_pretrained(str(beside))


def add_progress(trainer: Any, log: Path, phases: Phases, step: int, earlier_steps: int = 0) -> TrainingProgress:
    """The kit's progress in place of the trainer's own."""
    from transformers import PrinterCallback, ProgressCallback, TrainerCallback

    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    made: TrainingProgress = type("Progress", (TrainingProgress, TrainerCallback), {})(log, phases, step, earlier_steps)
    trainer.add_callback(made)
    return made
