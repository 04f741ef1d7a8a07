"""Is this machine ready for the comparison? Each check says what was found and, where something is wrong, what to do."""

from __future__ import annotations

import os
import platform
import shutil
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from kit import runs
from kit.config import RunConfig
from kit.device import cuda_gpu, total_memory
from kit.errors import UserError
from kit.hub import Unreachable, hub_errors, loadable
from kit.layers import check_targets, linear_layers
from kit.methods import METHODS
from kit.model import import_unsloth, precision
from kit.preflight import count, existing, skeleton
from kit.resources import size
from kit.settings import check, sibling
from kit.sources import Stream

LOCK = Path(__file__).parent.parent / "requirements.lock"


class Check(NamedTuple):
    """`ok` is None for what is worth knowing but stops nothing; `fix` says what to do."""

    name: str
    ok: bool | None
    detail: str
    fix: str = ""


def checks(config: RunConfig) -> list[Check]:
    """Every check for a configuration; one that breaks is a failed check and not the end of the others."""
    first = {"machine": machine(), "compiler": compiler(), "packages": packages(), "libraries": libraries(), "4-bit": four_bit(), "hub": hub(config)}
    found = [each for name, part in first.items() for each in _guarded(name, part)]
    if any(c.name == "model" and c.ok is False for c in found):  # what follows reads the model's configuration
        return found
    return [*found, *_guarded("precision", computing(config)), *_guarded("memory", fits(config))]


def _guarded(name: str, found: Iterator[Check]) -> Iterator[Check]:
    try:
        yield from found
    except UserError as error:
        yield Check(name, False, error.problems[0], "; ".join(error.problems))
    except Exception as error:
        yield Check(name, False, f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}", "run: make setup")


def machine() -> Iterator[Check]:
    gpu, reason = cuda_gpu()
    info = runs.machine()
    yield Check("system", None, f"{platform.system()} {platform.machine()}, {info['cpu'] or 'unknown processor'}, {os.cpu_count()} cores")
    if gpu is None:
        yield Check("gpu", None, f"{reason}: everything runs on the CPU, which is slow for models beyond the built-in one")
    else:
        found = f"{gpu.name}, capability {gpu.capability[0]}.{gpu.capability[1]}, {gpu.memory / 2**30:.1f} GiB, driver {info['driver'] or 'unknown'}"
        yield Check("gpu", gpu.capability >= (7, 0), found, "Unsloth needs compute capability 7.0; UNSLOTH_FORCE_CPU=1 runs on the CPU")


def compiler() -> Iterator[Check]:
    """Triton, and with it Unsloth's kernels, builds its launcher at run time; without a GPU nothing does."""
    if cuda_gpu()[0] is None:
        return
    missing = [] if any(map(shutil.which, ("cc", "gcc", "clang"))) else ["no C compiler"]
    missing += [] if Path(sysconfig.get_paths()["include"], "Python.h").exists() else ["no Python.h"]
    fix = "on Debian or Ubuntu: apt install gcc python3-dev, for the Python that is used"
    yield Check("compiler", not missing, " and ".join(missing) or "a C compiler and Python's headers, for Triton", fix)


def packages() -> Iterator[Check]:
    """The installed versions against requirements.lock; local builds (+cu128) count as their version."""
    if not LOCK.exists():
        yield Check("packages", None, "no requirements.lock beside the kit: versions are not compared")
        return
    from packaging.requirements import Requirement

    lines = LOCK.read_text(encoding="utf-8").splitlines()
    wanted = [r for line in lines if line.strip() and ((r := Requirement(line)).marker is None or r.marker.evaluate())]
    installed = {r.name: runs.version(r.name) for r in wanted}
    wrong = [r for r in wanted if not r.specifier.contains(installed[r.name] or "0", prereleases=True)]
    said = ", ".join(f"{r.name} {installed[r.name] or 'missing'} for {r.specifier}" for r in wrong[:4])
    text = f"{len(wanted) - len(wrong)} of {len(wanted)} as in requirements.lock" + (f"; not: {said}" if wrong else "")
    serious = any(installed[r.name] is None or r.name in runs.PACKAGES for r in wrong)
    yield Check("packages", not serious if serious or not wrong else None, text, "run: make setup")


def libraries() -> Iterator[Check]:
    """Unsloth imports, and torch sees the GPU that the driver shows."""
    import_unsloth()
    import torch

    gpu, _ = cuda_gpu()
    sees = torch.cuda.is_available()
    detail = f"unsloth {runs.version('unsloth')}, torch {torch.__version__} ({'CUDA ' + str(torch.version.cuda) if sees else 'no CUDA'})"
    yield Check("libraries", gpu is None or sees, detail, "torch cannot use the driver's GPU: update the driver")


def four_bit() -> Iterator[Check]:
    """bitsandbytes really stores a layer in NF4 and multiplies with it on the device."""
    import torch
    from bitsandbytes.nn.modules import Linear4bit

    device = "cuda" if cuda_gpu()[0] else "cpu"
    untyped: Any = Linear4bit
    layer = untyped(128, 128, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    plain = layer.weight.detach().clone()
    ones = torch.ones(1, 128, device=device)
    off = float((layer.to(device)(ones) - ones @ plain.to(device).T).abs().mean() / plain.sum(1).abs().mean())
    detail = f"bitsandbytes {runs.version('bitsandbytes')} multiplies with NF4 weights on the {device}, {off:.0%} off the unquantised ones"
    yield Check("4-bit", off < 0.5, detail, "bitsandbytes and CUDA disagree; python -m bitsandbytes says more; lora, dora and highrank need no 4-bit")


def computing(config: RunConfig) -> Iterator[Check]:
    chosen = precision(config, training=True)
    yield Check("precision", None, f"{config.method} computes in {chosen.name}: {chosen.reason}")


def fits(config: RunConfig) -> Iterator[Check]:
    """Memory and disk, by the count that training makes before it loads."""
    model, room = skeleton(config), total_memory()
    if wrong := check_targets(config, linear_layers(model)):
        yield Check("layers", False, wrong[0], "; ".join(wrong))
        return
    need = count(config, model)
    said = f"{config.method} on {config.model} needs about {size(need.peak)}" + (f" of {size(room)}" if room else "")
    yield Check("memory", room is None or need.certain <= room, said, "choose a 4-bit method, a lower --micro-batch or --max-length, or a smaller model")
    # combined trains its parts one after the other and needs no more than they do.
    each = (f"{m} {_needed(config, m, model, room)}" for m in METHODS if m != "combined")
    yield Check("methods", None, f"memory that each needs by count: {', '.join(each)}")
    # The base model in 16 bits is downloaded once; data and reports are small beside it.
    download = 0 if config.is_local else 2 * sum(p.numel() for p in model.parameters())
    free = shutil.disk_usage(existing(Path(config.runs_dir))).free
    said = f"{size(need.disk + download)} needed for model and checkpoints, {size(free)} free"
    yield Check("disk", free > need.disk + download, said, "free some disk, or choose another --runs-dir")


def _needed(config: RunConfig, method: str, model: Any, room: int | None) -> str:
    """What a method needs beside the configuration's own, and whether that is there."""
    try:
        check(other := sibling(config, method))
    except UserError:
        return "(not with these settings)"
    need = count(other, model)
    return size(need.peak) + (" (cannot fit)" if room and need.certain > room else " (may not)" if room and need.peak > room else "")


def hub(config: RunConfig) -> Iterator[Check]:
    """Whether the recipe's model and data can be read; a token is only said to be there."""
    if config.is_local:
        yield Check("hub", None, "not needed: model and data lie on this machine")
        return
    from huggingface_hub import HfApi, constants, get_token

    yield Check("token", None, "a Hugging Face token is set" if get_token() else "no Hugging Face token (HF_TOKEN) is set; gated models need one")
    needed = [("model", loadable(config.model))] if not Path(loadable(config.model)).is_dir() else []
    needed += [("dataset", stream.origin) for stream in map(Stream, config.source) if stream.path is None]
    for kind, name in needed:
        try:
            with hub_errors(f"{kind} {name}"):
                HfApi().auth_check(name, repo_type=kind)
            yield Check(kind, True, f"{name} can be read")
        except Unreachable:
            constants.HF_HUB_OFFLINE = True  # what follows need not wait for it again
            cached = Path(constants.HF_HUB_CACHE, f"{kind}s--{name.replace('/', '--')}").is_dir()
            detail = f"the hub cannot be reached and {name} is {'' if cached else 'not '}in the local cache"
            yield Check(kind, cached, detail, "check the network, or use --recipe tiny")
        except UserError as error:
            yield Check(kind, False, error.problems[0], error.problems[0])
