"""What a run costs: wall time and peak memory by phase, each phase's peak measured apart from the ones before it."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit import processes

GIB = 2**30


def size(count: float) -> str:
    """Bytes as a person says them: 12 MiB, 3.4 GiB."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 2 else f"{count / 2**20:.0f} MiB"


def _cuda() -> Any:
    """torch.cuda when this process already uses a GPU, else None (never imports torch itself)."""
    torch = sys.modules.get("torch")
    return torch.cuda if torch is not None and torch.cuda.is_available() else None


def is_memory_error(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the GPU or the CPU."""
    # "CUDA driver error" is torch's where it loads a compiled kernel or maps memory, "Triton Error [CUDA]" Triton's.
    gpu = ("CUDA error: out of memory", "CUDA driver error: out of memory", "Triton Error [CUDA]: out of memory", "STATUS_ALLOC_FAILED")
    said = ("can't allocate memory", "Cannot allocate memory", *gpu)
    kinds = (RuntimeError, OSError, ImportError)
    return type(error).__name__ in ("OutOfMemoryError", "MemoryError") or (isinstance(error, kinds) and any(s in str(error) for s in said))


def clock() -> float:
    """Seconds, read after the GPU has finished what was asked of it."""
    if cuda := _cuda():
        cuda.synchronize()
    return time.perf_counter()


def reset_peaks() -> bool:
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


@functools.cache
def _nvml() -> Any:
    """NVML and the handle of the GPU this process uses, or None: no GPU, no driver library, or a GPU that does not count its energy."""
    cuda = _cuda()
    if cuda is None:
        return None
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{cuda.get_device_properties(cuda.current_device()).uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except (AttributeError, pynvml.NVMLError):
        return None
    return pynvml, handle


def joules() -> float | None:
    """Energy in J that the GPU has used since its driver was loaded (NVML counts mJ), or None; also where it would be one GPU's of several."""
    found = _nvml() if processes.count() == 1 else None
    return found[0].nvmlDeviceGetTotalEnergyConsumption(found[1]) / 1000 if found else None


def energy(total: float | None, price_per_kwh: float | None) -> dict[str, float | None] | None:
    """An energy of `total` J in J, in Wh, and its cost at the stated price; None where nothing counts it."""
    if total is None:
        return None
    return {"joules": total, "wh": total / 3600, "cost": total / 3.6e6 * price_per_kwh if price_per_kwh else None, "price_per_kwh": price_per_kwh}


class Phases:
    """Named phases of a run; `record` is the JSON that results carry."""

    def __init__(self) -> None:
        self.record: dict[str, dict[str, float | bool | None]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        apart = reset_peaks()
        before, started = joules(), clock()
        yield
        wall, after = clock() - started, joules()
        allocated, reserved = device_gib()
        self.record[name] = {
            "wall_s": wall, "peak_allocated_gib": allocated, "peak_reserved_gib": reserved,
            "peak_process_gib": resident_gib(peak=True), "process_peak_is_apart": apart,
            "energy_j": after - before if after is not None and before is not None else None,
        }  # fmt: skip

    def wall_s(self, name: str) -> float:
        """Seconds of a phase; 0 if there was none."""
        return float(self.record.get(name, {}).get("wall_s") or 0.0)

    def peak_gib(self, name: str) -> float | None:
        """The peak that matters: memory reserved on the GPU, or the process's resident memory on the CPU."""
        phase = self.record[name]
        peak = phase["peak_reserved_gib"]
        return phase["peak_process_gib"] if peak is None else peak
