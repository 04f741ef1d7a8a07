"""Memory that runs out while training: in which phase, and the largest micro-batch that would have fitted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from kit.config import RunConfig
from kit.model import free_memory
from kit.resources import is_memory_error


class OutOfMemory(Exception):
    """Training ran out of memory in `phase`; `fits` is the largest micro-batch that went through, or None."""

    def __init__(self, phase: str, peak_gib: float | None, fits: int | None) -> None:
        super().__init__(f"out of memory in phase {phase}")
        self.phase, self.peak_gib, self.fits = phase, peak_gib, fits


@contextmanager
def enough_memory(phase: str) -> Iterator[None]:
    """Memory that runs out inside is OutOfMemory in that phase, which no smaller micro-batch would have helped."""
    try:
        yield
    except Exception as error:
        if is_memory_error(error):
            raise OutOfMemory(phase, None, None) from None
        raise


def fitting(config: RunConfig, micro_batch: int) -> RunConfig:
    """The same effective batch in micro-batches that fit."""
    return replace(config, micro_batch=micro_batch, accumulation=config.micro_batch * config.accumulation // micro_batch)


def largest_that_fits(trainer: Any, config: RunConfig) -> int | None:
    """The largest smaller micro-batch, of those that divide the effective batch, with which an optimiser step on the longest rows goes through.

    Of two micro-batches, since the second finds gradients; the model, whose training has failed, is left changed.
    """
    longest = sorted(range(len(trainer.train_dataset)), key=trainer.order.lengths.__getitem__, reverse=True)
    effective = config.micro_batch * config.accumulation
    for size in (n for n in range(config.micro_batch - 1, 0, -1) if effective % n == 0):
        batch = trainer.data_collator([trainer.train_dataset[i] for i in longest[:size]])
        try:
            for _ in range(min(effective // size, 2)):
                trainer.training_step(trainer.model, trainer._prepare_inputs(dict(batch)))
            trainer.accelerator.gradient_state._set_sync_gradients(True)  # else a step in the middle of an accumulation makes none
            trainer.optimizer.step()
        except Exception as error:
            if not is_memory_error(error):
                raise
        else:
            return size
        finally:
            trainer.model.zero_grad(set_to_none=True)
            free_memory()
    return None
