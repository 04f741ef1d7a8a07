"""Trainings in processes of their own that take turns, optimiser step by optimiser step, so that all meet the same machine.

Unsloth patches transformers, TRL and PEFT for the whole process when it is imported: only a process without it is a plain one.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kit.config import RunConfig
from kit.errors import UserError
from kit.prompts import IGNORE, Example
from kit.resources import clock, device_gib, is_memory_error, reset_peaks, resident_gib
from kit.trainer import steps_per_epoch

Maker = Callable[[RunConfig, list[Example], Path], Any]


@dataclass(frozen=True)
class Job:
    """A training: `make(config, examples, folder)` gives the trainer, which is told nothing of the turns."""

    make: Maker
    config: RunConfig
    examples: list[Example]

    @property
    def steps(self) -> int:
        """Optimiser steps an epoch."""
        return steps_per_epoch(len(self.examples), self.config.micro_batch * self.config.accumulation)


@dataclass(frozen=True)
class Step:
    """One optimiser step: everything between two turns, fetching the batch and logging included. `peak_gib` is the peak since training began."""

    seconds: float
    tokens: int
    supervised: int
    padded: int
    loss: float
    peak_gib: float | None


class Side:
    """The other end of a process that trains one job after another, a step for every call of `step`."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_process, args=(theirs, list(jobs)), daemon=True)
        self.process.start()
        theirs.close()

    def step(self) -> Step:
        """Lets the process make its next step. MemoryError where it ran out of memory."""
        try:
            with suppress(BrokenPipeError):  # it has ended; what it said last still waits
                self.pipe.send(None)
            answer = self.pipe.recv()
        except (EOFError, OSError):
            raise UserError("a training process of the bench was killed, most likely for want of memory") from None
        if isinstance(answer, BaseException):
            raise answer
        step: Step = answer
        return step

    def close(self) -> None:
        self.pipe.close()
        self.process.terminate()
        self.process.join()


@contextmanager
def sides(jobs: Mapping[str, Sequence[Job]]) -> Iterator[dict[str, Side]]:
    """A process for every name, all loading at once; they end with the block."""
    opened = {name: Side(work) for name, work in jobs.items()}
    try:
        yield opened
    finally:
        for side in opened.values():
            side.close()


def alternate(opened: Mapping[str, Side], steps: int) -> dict[str, list[Step]]:
    """That many steps of every side, each in its turn."""
    made: dict[str, list[Step]] = {name: [] for name in opened}
    for _ in range(steps):
        for name, side in opened.items():
            made[name].append(side.step())
    return made


def _process(pipe: Any, jobs: list[Job]) -> None:
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing), redirect_stderr(nothing):
        serve(pipe, jobs)


def serve(pipe: Any, jobs: list[Job]) -> None:
    """Trains the jobs, waiting for a word before every step; an error is sent, not printed."""
    try:
        for job in jobs:
            with tempfile.TemporaryDirectory() as folder:
                trainer = job.make(job.config, job.examples, Path(folder))
                take_turns(trainer, pipe)
                trainer.train()
    except EOFError:  # the bench has ended
        return
    except BaseException as error:
        short = MemoryError(str(error)) if is_memory_error(error) else RuntimeError(traceback.format_exc())
        pipe.send(error if isinstance(error, UserError) else short)


def take_turns(trainer: Any, pipe: Any) -> None:
    """Makes a trainer wait for a word before every optimiser step and answer it with a `Step`."""
    from transformers import TrainerCallback

    batches: list[tuple[Any, Any, int, Any]] = []
    step_of = trainer.training_step

    def counted(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = step_of(model, inputs, *args, **kwargs)
        batches.append((inputs["attention_mask"].sum(), (inputs["labels"] != IGNORE).sum(), inputs["labels"].numel(), loss.detach()))
        return loss

    class Turns(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            reset_peaks()
            self.peak: float | None = None
            self._wait()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds = clock() - self.started
            now = device_gib()[1] or resident_gib(peak=True)
            self.peak = max(filter(None, (self.peak, now)), default=None)
            tokens, supervised, padded, loss = (float(sum(map(float, column))) for column in zip(*batches, strict=True))
            batches.clear()
            pipe.send(Step(seconds, int(tokens), int(supervised), int(padded), loss, self.peak))
            if state.global_step < state.max_steps:
                self._wait()

        def _wait(self) -> None:
            pipe.recv()
            self.started = clock()

    trainer.training_step = counted
    # First of all callbacks, so that what the others do is part of the step.
    trainer.callback_handler.callbacks.insert(0, Turns())
