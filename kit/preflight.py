"""Before anything is loaded: are the settings possible for this model, will it fit into memory, is there disk for it? By count, not by trial."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

from kit import forgetting
from kit.config import RunConfig
from kit.console import say
from kit.device import cuda_gpu, total_memory
from kit.errors import UserError, unknown
from kit.hub import hub_errors
from kit.layers import adapted, check_targets, linear_layers, text_weights
from kit.model import architecture, built, precision
from kit.resources import GIB, size

# NF4 with double quantisation: 4 bits, an 8-bit scale for each 64 values and a float32 for each 256 scales (Dettmers et al. 2023, section 3).
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
# Unsloth's fused loss goes through a large vocabulary's logits in parts.
LOGITS_AT_MOST = GIB
# Adapters on a smaller share of the layers' weights are worth a line: in hybrids and mixtures the usual names are few of the layers.
MOST = 0.9
SIZES = {"float32": 4, "float16": 2, "bfloat16": 2}


class Need(NamedTuple):
    """Bytes. `certain` is weights, gradients and optimiser states; activations are an estimate."""

    weights: float
    trained: float
    activations: float
    disk: float

    @property
    def certain(self) -> float:
        return self.weights + self.trained

    @property
    def peak(self) -> float:
        return self.certain + self.activations


def skeleton(config: RunConfig) -> Any:
    """The model's architecture on torch's meta device: shapes, no weights."""
    import torch

    stored = architecture(config)
    with hub_errors(f"model {config.model}"), torch.device("meta"):
        return built(stored)


def possible(config: RunConfig) -> Any:
    """The skeleton of a model that the settings fit; what does not fit it is one UserError, and so is a text for the evaluation that is not there."""
    forgetting.check(config)
    model = skeleton(config)
    from transformers.training_args import OptimizerNames

    problems = check_targets(config, linear_layers(model))
    known = [name.value for name in OptimizerNames]
    problems += [unknown("optimizer", config.optimizer, known)] if config.optimizer not in known else []
    if problems:
        raise UserError(*problems)
    return model


def check(config: RunConfig) -> float | None:
    """Raises one UserError with everything that cannot work; returns the predicted peak in GiB (None when not asked to predict)."""
    model, problems = possible(config), list[str]()
    if not config.technique.full and (share := adapted_share(config, model)) < MOST:
        left = [t for t in linear_layers(model) if t not in config.target_modules] or ["what is no linear layer, such as a mixture's experts"]
        say(f"adapters on {share:.0%} of the layers' weights; none on {', '.join(left)}")
    if not config.preflight:
        return None
    need = count(config, model)
    # The checkpoints of a killed training have their room already.
    kept = sum(f.stat().st_size for f in (config.run_dir / "checkpoints").rglob("*") if f.is_file())
    room, free = total_memory(), shutil.disk_usage(existing(config.run_dir)).free + kept
    gpu, _ = cuda_gpu()
    where = gpu.name if gpu else "this machine"
    split = {"weights": need.weights, "trained state": need.trained, "activations about": need.activations}
    said = f"predicted peak {need.peak / GIB:.2f} GiB: " + ", ".join(f"{k} {v / GIB:.2f}" for k, v in split.items())
    say(said + (f"; {where} has {size(room)}" if room else ""))
    if room and need.certain > room:
        problems.append(f"weights, gradients and optimiser states alone need {size(need.certain)} and {where} has {size(room)}; "
                        "choose a 4-bit method, a lower --rank or an 8-bit --optimizer (--no-preflight tries all the same)")  # fmt: skip
    elif room and need.peak > room:
        say("this may not fit: lower --micro-batch (and raise --accumulation), or let --auto-batch do so")
    if need.disk > free:
        problems.append(f"checkpoints and result need {size(need.disk)} of disk and {config.runs_dir} has {size(free)} free")
    if problems:
        raise UserError(*problems)
    return need.peak / GIB


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def count(config: RunConfig, model: Any) -> Need:
    """What a configuration needs, from the model's shapes."""
    method = config.technique
    size = SIZES[precision(config, training=True).name]
    inside = sum(m.weight.numel() for n, m in model.named_modules() if type(m).__name__ == "Linear" and not n.endswith("lm_head"))
    total = sum(p.numel() for p in model.parameters())
    weights = inside * (NF4_BYTES if method.four_bit else 4 if method.full else size) + (total - inside) * (4 if method.full else size)
    eight_bit = "8bit" in config.optimizer and cuda_gpu()[0] is not None
    if method.full:
        embeddings = 0 if config.train_embeddings else model.get_input_embeddings().weight.numel()
        trained = sum(p.numel() for p in text_weights(model)) - embeddings
        states = _states(config, model, trained, eight_bit)
        need = trained * 4 + states
    else:
        trained = adapter_size(config, model)
        states = trained * (2 if eight_bit else 8)
        need = trained * (4 + 4) + states
    saved = total if method.full else trained
    # Two checkpoints and a third being written, and the result beside them.
    return Need(weights, need, activations(config, model, size), (3 + 1) * saved * 4 + 3 * states)


def _states(config: RunConfig, model: Any, trained: int, eight_bit: bool) -> float:
    """Bytes of optimiser state of a method that trains weights: Adam's two moments, for projected matrices in their subspace."""
    moment = 2 if eight_bit else 8
    if not config.technique.projection:
        # The trainer has bitsandbytes keep the moments of embeddings in 32 bits.
        embedding = model.get_input_embeddings().weight.numel() if eight_bit and config.train_embeddings else 0
        return (trained - embedding) * moment + embedding * 8
    rest, projected = trained, 0.0
    for name, p in model.get_decoder().named_parameters():
        if p.ndim == 2 and name.split(".")[-2] in config.target_modules and min(p.shape) > config.rank:
            rest -= p.numel()
            projected += config.rank * max(p.shape) * moment
            projected += config.rank * min(p.shape) * 4 if config.technique.projection == "galore" else 0
    return rest * moment + projected


def adapter_size(config: RunConfig, model: Any) -> int:
    """Parameters of the adapter: A and B of every target, and DoRA's magnitudes."""
    modules = adapted(config, model)
    magnitudes = sum(m.out_features for m in modules) if config.technique.adapter == "dora" else 0
    return int(sum(config.rank * (m.in_features + m.out_features) for m in modules) + magnitudes)


def adapted_share(config: RunConfig, model: Any) -> float:
    """Weights of the layers that get an adapter, as a share of all that text goes through but embeddings and head."""
    import torch

    embeddings = [m for m in model.modules() if isinstance(m, torch.nn.Embedding)] + [model.get_output_embeddings()]
    outside = {id(m.weight) for m in embeddings if m is not None}
    return float(sum(m.weight.numel() for m in adapted(config, model)) / sum(p.numel() for p in text_weights(model) if id(p) not in outside))


def activations(config: RunConfig, model: Any, size: int) -> float:
    """An estimate in bytes: inputs of all layers (and all they keep, without checkpointing), one layer at work, and logits with their gradient."""
    text = model.config.get_text_config()
    tokens = config.micro_batch * config.max_length
    inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
    layer = tokens * (8 * text.hidden_size + 4 * inner) * size
    kept = text.num_hidden_layers * (tokens * text.hidden_size * size if config.gradient_checkpointing else layer)
    # Unsloth's fused loss adds up a trained head's gradient in one buffer and gives it in another.
    head = 2 * text.vocab_size * text.hidden_size * 4 if config.technique.full and config.train_embeddings and cuda_gpu()[0] else 0
    return float(kept + layer + min(2 * tokens * text.vocab_size * 4, LOGITS_AT_MOST) + head)
