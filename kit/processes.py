"""Several processes of one training, as torchrun or accelerate start them: the first one writes, and all see the rows that one would see alone."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any


def count() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def first() -> bool:
    return os.environ.get("RANK", "0") == "0"


def together(numbers: Sequence[int], device: Any) -> tuple[int, ...]:
    """The sums over all processes."""
    import torch
    import torch.distributed as dist

    if count() == 1 or not dist.is_initialized():
        return tuple(numbers)
    sums = torch.tensor(numbers, device=device)
    dist.all_reduce(sums)
    return tuple(sums.tolist())


@functools.cache
def restore_numbered_cpus() -> None:
    """Lets torch restore what was saved to "cpu:0" too, where accelerate has each of several processes; by itself it knows "cpu" alone."""
    import torch

    torch.serialization.register_package(30, lambda _: None, lambda storage, location: storage if location.startswith("cpu:") else None)
