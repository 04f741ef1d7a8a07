"""The layers of a model that text goes through, and which of them a method trains."""

from __future__ import annotations

import re
from typing import Any

from kit.config import RunConfig
from kit.errors import unknown


def linear_layers(model: Any) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every kind of linear layer that text goes through, by its name's last part; the smallest when they differ."""
    import torch

    out: dict[str, tuple[int, int]] = {}
    for name, module in model.get_decoder().named_modules():
        if isinstance(module, torch.nn.Linear):
            last, shape = name.rpartition(".")[2], (module.out_features, module.in_features)
            out[last] = min(out.get(last, shape), shape, key=min)
    return out


def text_weights(model: Any) -> list[Any]:
    """The parameters that text goes through, tied ones once: all, but for those with which a model also sees or hears."""
    parts = (model.get_decoder(), model.get_output_embeddings())
    return list({id(p): p for part in parts if part is not None for p in part.parameters()}.values())


def adapted(config: RunConfig, model: Any) -> list[Any]:
    """The linear layers that get an adapter."""
    return _named(model.get_decoder(), config)


def _named(part: Any, config: RunConfig) -> list[Any]:
    import torch

    return [m for n, m in part.named_modules() if isinstance(m, torch.nn.Linear) and n.rpartition(".")[2] in config.target_modules]


def targets(model: Any, config: RunConfig) -> list[str] | str:
    """The layers to adapt as PEFT is told: by their names' last parts or, where a vision tower has layers of these names too, by a pattern."""
    text = model.get_decoder()
    if len(_named(model, config)) == len(adapted(config, model)):
        return list(config.target_modules)
    path = next(n for n, m in model.named_modules() if m is text)
    return rf"{re.escape(path)}\..*\.({'|'.join(map(re.escape, config.target_modules))})"


def check_targets(config: RunConfig, layers: dict[str, tuple[int, int]]) -> list[str]:
    """What is wrong with the target modules and the rank, given the model's linear layers."""
    if "target_modules" in config.technique.unused:
        return []
    if not layers:
        return [f"{config.model} has no linear layers that {config.method} could use (GPT-2's are of another kind); --method full trains it"]
    missing = [t for t in config.target_modules if t not in layers]
    problems = [unknown("target module", t, layers) for t in missing if t not in RunConfig.target_modules]
    if usual := [t for t in missing if t in RunConfig.target_modules]:
        flags = " ".join(f"--target-modules {t}" for t, shape in layers.items() if min(shape) >= config.rank)
        problems.append(f"{config.model} has no layers {', '.join(usual)}; name those to adapt, such as {flags}")
    narrow = {t: min(layers[t]) for t in config.target_modules if t in layers and min(layers[t]) < config.rank}
    if narrow and not config.technique.projection:
        sides = ", ".join(f"{t} {side}" for t, side in sorted(narrow.items()))
        problems.append(f"--rank {config.rank} is larger than the layers it adapts ({sides}); use at most {min(narrow.values())} or other --target-modules")
    return problems
