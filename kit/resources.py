"""What a run costs: wall time and peak memory by phase, each phase's peak measured apart from the ones before it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GIB = 2**30


def _cuda() -> Any:
    """torch.cuda when this process already uses a GPU, else None (never imports torch itself)."""
    import sys

    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def clock() -> float:
    """Seconds, read after the GPU has finished what was asked of it."""
    if cuda := _cuda():
        cuda.synchronize()
    return time.perf_counter()


def _reset() -> bool:
    """Starts new peaks; False where the system cannot reset the process's (then it counts from the process's start)."""
    if cuda := _cuda():
        cuda.reset_peak_memory_stats()
    try:
        # 5 resets VmHWM, the peak resident size (Linux: proc_pid_clear_refs(5)).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def resident_gib(peak: bool = False) -> float | None:
    """Resident memory of this process in GiB, now or at its peak since the last reset; None where /proc does not tell."""
    key = "VmHWM:" if peak else "VmRSS:"
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 / GIB for line in lines if line.startswith(key)), None)


def device_gib() -> tuple[float | None, float | None]:
    """Peak GPU memory in GiB since the last reset: (allocated, reserved); None without a GPU."""
    if cuda := _cuda():
        return cuda.max_memory_allocated() / GIB, cuda.max_memory_reserved() / GIB
    return None, None


class Phases:
    """Named phases of a run; `record` is the JSON that results carry."""

    def __init__(self) -> None:
        self.record: dict[str, dict[str, float | bool | None]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        apart = _reset()
        started = clock()
        yield
        wall = clock() - started
        allocated, reserved = device_gib()
        self.record[name] = {
            "wall_s": wall, "peak_allocated_gib": allocated, "peak_reserved_gib": reserved,
            "peak_process_gib": resident_gib(peak=True), "process_peak_is_apart": apart,
        }  # fmt: skip

    def peak_gib(self, name: str) -> float | None:
        """The peak that matters: memory reserved on the GPU, or the process's resident memory on the CPU."""
        phase = self.record[name]
        peak = phase["peak_reserved_gib"]
        return phase["peak_process_gib"] if peak is None else peak
