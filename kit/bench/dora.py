"""A training step and generation of LoRA, of DoRA on the kit's path and on PEFT's, loaded and attached as the kit's training does it.

Layers as wide as gemma-3-1b's, two of them and a small vocabulary, so that the adapted layers are what is timed: on a CPU by the
process's CPU time, which other programs disturb less. On a GPU the same call goes through Unsloth's own LoRA; it has not been run on one yet.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kit.bench.harness import ALONE, ONLY, Peaks, Times, interleave, summary
from kit.bench.shapes import SHAPES, build
from kit.config import RunConfig
from kit.console import say
from kit.device import cuda_gpu
from kit.errors import UserError
from kit.model import attach, import_unsloth, load_base
from kit.resources import clock

SHAPE = SHAPES["gemma-3-1b"] | {"num_hidden_layers": 2, "vocab_size": 2048}
ROWS, LENGTH, NEW_TOKENS = 4, 256, 16
SIDES = {"lora": ("lora", "kit"), "dora-kit": ("dora", "kit"), "dora-peft": ("dora", "peft")}


class Setting(NamedTuple):
    """What the base model is stored in and how it is trained; accumulation 0 stands for generation."""

    four_bit: bool
    sixteen_bit: bool
    autocast: bool = False
    checkpointing: bool = False
    accumulation: int = 0


BASES = {
    "float32": Setting(four_bit=False, sixteen_bit=False), "16-bit": Setting(four_bit=False, sixteen_bit=True),
    "16-bit autocast": Setting(four_bit=False, sixteen_bit=True, autocast=True),
    "NF4": Setting(four_bit=True, sixteen_bit=True), "NF4 autocast": Setting(four_bit=True, sixteen_bit=True, autocast=True),
}  # fmt: skip
# Accumulation spreads the norms over more passes: two settings show by how much.
SETTINGS: dict[str, Setting] = {
    f"train {name}{' checkpointed' * checkpointing} x{n}": base._replace(checkpointing=checkpointing, accumulation=n)
    for name, base in BASES.items() for checkpointing in (False, True) for n in (1, 4)
    if n == 1 or (name, checkpointing) in (("float32", False), ("NF4 autocast", True))
} | {f"generate {name}": base for name, base in BASES.items() if not base.autocast}  # fmt: skip


def dora(config: RunConfig, rounds: int) -> dict[str, Any]:
    """Seconds of every setting and side, and with `saved_mib` what one forward pass keeps for the backward pass."""
    import_unsloth()
    times: Times = {}
    peaks: Peaks = {}
    saved: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        build(SHAPE, Path(folder))
        for name, setting in settings().items():
            if not setting.sixteen_bit and _on_gpu() and _sixteen_bit() == "float16":
                say(f"{name} is left out: on this GPU Unsloth computes Gemma 3 in float16, whatever is asked for")
                continue
            sides = [side for side in SIDES if not ALONE or [f"{name} {side}"] == ALONE]
            if not sides:
                continue
            models = {f"{name} {side}": adapted(config, setting, side, folder) for side in sides}
            steps = {n: partial(step, setting, m) for n, m in models.items()}
            found, alone = interleave(steps, rounds, now=clock if _on_gpu() else time.process_time, turning=True)
            times, peaks = times | found, peaks | alone
            if setting.accumulation and not ALONE:
                saved |= {n: kept_mib(setting, m) for n, m in models.items()}
            del models, steps
            gc.collect()
    made = summary("dora", times, peaks, [(f"{name} {side}", f"{name} lora") for name in SETTINGS for side in SIDES if side != "lora"])
    for name, mib in saved.items():
        made["variants"][name]["saved_mib"] = mib
    return made | {"clock": "wall" if _on_gpu() else "process CPU time"}


def settings() -> dict[str, Setting]:
    """The settings that are asked for; UserError if there is no such."""
    found = {name: setting for name, setting in SETTINGS.items() if not ONLY or any(text in name for text in ONLY)}
    if not found:
        raise UserError(f"no setting has {ONLY[0]!r} in its name; there are {', '.join(SETTINGS)}")
    return found


def _on_gpu() -> bool:
    return cuda_gpu()[0] is not None


def _sixteen_bit() -> str:
    gpu = cuda_gpu()[0]
    return "bfloat16" if gpu is None or gpu.capability >= (8, 0) else "float16"


def adapted(config: RunConfig, setting: Setting, side: str, folder: str) -> Any:
    """The model in training mode, its adapter in float32 as the trainer has it, with an optimiser."""
    import torch

    adapter, kernel = SIDES[side]
    config = dataclasses.replace(
        config, model=folder, method="q" * setting.four_bit + adapter, dora_kernel=kernel, gradient_checkpointing=setting.checkpointing,
        precision=_sixteen_bit() if setting.sixteen_bit else "float32", max_length=LENGTH, max_new_tokens=NEW_TOKENS,
    )  # fmt: skip
    model = attach(load_base(config, training=setting.accumulation > 0)[0], config)
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.float()
    model.bench_optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    return model.train()


def step(setting: Setting, model: Any) -> None:
    """An optimiser step, or the tokens of a batch of replies."""
    if not setting.accumulation:
        decode(model)
        return
    # Memory has its peak in a micro-batch that finds gradients.
    for _ in range(min(setting.accumulation, 2) if ALONE else setting.accumulation):
        (loss(setting, model) / setting.accumulation).backward()
    model.bench_optimizer.step()
    model.bench_optimizer.zero_grad()


def loss(setting: Setting, model: Any) -> Any:
    """Of one micro-batch, always the same."""
    import torch

    ids = torch.randint(0, SHAPE["vocab_size"], (ROWS, LENGTH), generator=torch.Generator().manual_seed(0)).to(model.device)
    with torch.autocast(model.device.type, getattr(torch, _sixteen_bit()), enabled=setting.autocast):
        return model(input_ids=ids, labels=ids).loss


def decode(model: Any) -> None:
    """Forward passes of one token each after a prompt, as generation makes them."""
    import torch

    model.eval()
    with torch.inference_mode():
        made, ids = None, torch.ones(8, 32, dtype=torch.long, device=model.device)
        for _ in range(NEW_TOKENS):
            made = model(input_ids=ids, past_key_values=made.past_key_values if made else None, use_cache=True, logits_to_keep=1)
            ids = made.logits.argmax(-1)


def kept_mib(setting: Setting, model: Any) -> float:
    """MiB of memory, each counted once and the model's own not at all, that a forward pass keeps for the backward pass."""
    import torch

    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = loss(setting, model)  # Alive until all is counted: an address that is free again may be counted once for two.
    del found
    return sum(size for address, size in kept.items() if address not in own) / 2**20
