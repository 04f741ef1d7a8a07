"""Which device there is, and what follows from it: the recipe, the precision, and the sentence that says why. No torch needed."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path
from typing import NamedTuple


class Gpu(NamedTuple):
    name: str
    capability: tuple[int, int]
    memory: int = 0  # bytes in all


class Choice(NamedTuple):
    name: str
    reason: str


def cuda_gpu() -> tuple[Gpu | None, str]:
    """The first CUDA GPU that the driver offers (CUDA_VISIBLE_DEVICES respected), or None and the reason."""
    if os.environ.get("UNSLOTH_FORCE_CPU") == "1":
        return None, "UNSLOTH_FORCE_CPU=1"
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None, "no CUDA driver"
    count, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return None, "the CUDA driver shows no GPU"
    label = ctypes.create_string_buffer(128)
    cuda.cuDeviceGetName(label, 128, 0)
    # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, 0)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, 0)
    memory = ctypes.c_size_t()
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), 0)
    return Gpu(label.value.decode(), (major.value, minor.value), memory.value), ""


def total_memory() -> int | None:
    """Bytes a run can hope for: the GPU's memory, or what the system says is available; None where it does not say."""
    gpu, _ = cuda_gpu()
    if gpu is not None:
        return gpu.memory or None
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def choose_recipe() -> Choice:
    """t4 with a GPU that Unsloth supports (compute capability 7.0 or newer), else the built-in tiny recipe on the CPU."""
    gpu, reason = cuda_gpu()
    if gpu is None:
        return Choice("tiny", f"{reason}: the built-in model and data, on the CPU")
    if gpu.capability < (7, 0):
        return Choice("tiny", f"{gpu.name} has compute capability {gpu.capability[0]}.{gpu.capability[1]}, Unsloth needs 7.0")
    return Choice("t4", f"found {gpu.name}")


def choose_precision(model_type: str, *, whole: bool = False) -> Choice:
    """The 16-bit type the hardware computes in, by compute capability and model family; `whole` when the weights themselves are trained.

    `torch.cuda.is_bf16_supported()` says True on a T4 through emulation, so the capability decides.
    """
    gpu, reason = cuda_gpu()
    if gpu is None:
        return Choice("float32", f"{reason}: float32 on the CPU, so that results repeat on any machine")
    if gpu.capability >= (8, 0):
        return Choice("bfloat16", f"{gpu.name} computes in bfloat16")
    if whole:
        partly = "; Unsloth computes parts of Gemma 3 in float16 all the same" if model_type.startswith("gemma3") else ""
        return Choice("float32", f"{gpu.name} has no bfloat16, and float16 loses the small updates of whole weights{partly}")
    if model_type.startswith("gemma3"):
        return Choice("float16", f"{gpu.name} has no bfloat16; Unsloth keeps Gemma 3's residuals in float32, which overflow float16")
    return Choice("float16", f"{gpu.name} has no bfloat16")
