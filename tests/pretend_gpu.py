"""python pretend_gpu.py MAJOR.MINOR SCRIPT FLAG... [-- SCRIPT FLAG...]...: scripts as on a GPU of that compute capability, in one process, on a CPU.

Unsloth is imported as on such a GPU: its loader, its compiled modules, its patches of transformers, PEFT and TRL are the real ones, and the
model's arithmetic then runs on the CPU. What this cannot show: Triton and CUDA kernels, bitsandbytes' 8-bit optimisers, speed and memory.
The last line is a JSON list: class, attention, "is Gemma 3 kept in float32" and "is each layer compiled as one" of every model that was loaded.
"""

from __future__ import annotations

import itertools
import json
import os
import runpy
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).parent.parent
os.environ |= {"TORCHDYNAMO_DISABLE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}  # compiling takes minutes; no word to the hub
os.environ.pop("UNSLOTH_FORCE_CPU", None)


def pretend(capability: tuple[int, int]) -> list[Any]:
    """Imports Unsloth as on that GPU; returns the list that is filled with what is loaded."""
    import torch

    cuda: Any = torch.cuda
    properties = SimpleNamespace(name="pretended", total_memory=15 * 2**30, major=capability[0], minor=capability[1], multi_processor_count=40)
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": capability, "get_device_properties": properties,
        "mem_get_info": (14 * 2**30, 15 * 2**30), "synchronize": None,
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    torch._C._cuda_getCurrentRawStream = lambda *_: 0  # type: ignore[attr-defined]
    os.geteuid = lambda: 1000  # else Unsloth, not finding CUDA's libraries, calls ldconfig
    from kit.model import import_unsloth

    import_unsloth()
    import unsloth.models._block_compile as blocks
    import unsloth.models._utils
    import unsloth_zoo.device_type

    # From here on everybody else is to take the CPU, and Unsloth to go on as before.
    cuda.is_available = lambda: False
    compile_blocks = blocks.patch_block_compile

    def on_gpu(model: Any) -> Any:
        with mock.patch.object(cuda, "is_available", return_value=True):
            return compile_blocks(model)

    blocks.patch_block_compile = on_gpu
    newer = capability >= (8, 0)
    unsloth_zoo.device_type.device_is_bf16_supported = lambda: newer
    unsloth.models._utils._flex_attention_gpu_is_supported = lambda: newer
    loaded: list[Any] = []
    load = unsloth.FastModel.from_pretrained

    def watched(*args: Any, **settings: Any) -> Any:
        found = load(*args, device_map={"": "cpu"}, **settings)
        loaded.append(found[0])
        return found

    unsloth.FastModel.from_pretrained = staticmethod(watched)
    return loaded


def as_gpu(capability: tuple[int, int]) -> None:
    """The kit's own questions about the machine."""
    import kit.device
    import kit.model
    import kit.preflight
    import kit.trainer

    gpu = kit.device.Gpu("pretended GPU", capability, 15 * 2**30), ""
    for module in (kit.device, kit.model, kit.preflight):
        module.cuda_gpu = lambda: gpu  # type: ignore[attr-defined]
    arguments = kit.trainer.arguments
    kit.trainer.arguments = lambda *given: arguments(*given) | {"use_cpu": True}


def in_regions(model: Any) -> bool:
    """Whether Unsloth compiles each decoder layer as one region for training."""
    return hasattr(type(model.base_model.layers[0]).forward, "_unsloth_block_compiled")


def main() -> None:
    major, minor = map(int, sys.argv[1].split("."))
    loaded = pretend((major, minor))
    as_gpu((major, minor))
    for separator, words in itertools.groupby(sys.argv[2:], "--".__eq__):
        if not separator:
            name, *flags = words
            sys.argv = [str(ROOT / "scripts" / f"{name}.py"), *flags]
            with suppress(SystemExit):
                runpy.run_path(sys.argv[0], run_name="__main__")
    print(json.dumps([(type(m).__module__, m.config._attn_implementation, bool(m._unsloth_forced_float32), in_regions(m)) for m in loaded]))


if __name__ == "__main__":
    main()
