"""Loads a model through Unsloth and attaches a method's adapter."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from kit import dataset
from kit.config import BASE, RunConfig
from kit.console import console, say
from kit.device import Choice, choose_precision
from kit.errors import UserError, unknown
from kit.hub import hub_errors, loadable


def precision(config: RunConfig) -> Choice:
    """The computing precision and the reason for it."""
    from transformers import AutoConfig

    if config.precision != "auto":
        return Choice(config.precision, "as asked for")
    with hub_errors(f"model {config.model}"):
        model_type = AutoConfig.from_pretrained(loadable(config.model), revision=config.revision or None).model_type
    return choose_precision(model_type)


def load_base(config: RunConfig) -> tuple[Any, Any, Choice]:
    """(model, tokenizer, precision): the base model as the method stores it, every weight frozen."""
    unsloth = import_unsloth()
    import torch

    four_bit = config.method != BASE and config.technique.four_bit
    chosen = precision(config)
    say(f"loading {config.model}{' in 4-bit NF4' if four_bit else ''}, computing in {chosen.name}: {chosen.reason}")
    with hub_errors(f"model {config.model}"):
        model, tokenizer = unsloth.FastModel.from_pretrained(
            model_name=loadable(config.model), max_seq_length=config.max_length + config.max_new_tokens,
            dtype=getattr(torch, chosen.name), load_in_4bit=four_bit, revision=config.revision or None, trust_remote_code=False,
            use_gradient_checkpointing="unsloth" if config.gradient_checkpointing else False,
        )  # fmt: skip
    # Unsloth falls back to 16-bit with a printed line when NF4 fails; a comparison must not.
    if four_bit and not any(type(m).__name__ == "Linear4bit" for m in model.modules()):
        raise UserError(f"{config.model} could not be loaded in 4-bit on this machine (bitsandbytes rejects its layers); use --method lora")
    model.requires_grad_(False)
    return model, tokenizer, chosen


def attach(model: Any, config: RunConfig) -> Any:
    """The model with the method's new adapter, alone trainable. Unknown target modules are a UserError that lists those there are."""
    unsloth = import_unsloth()
    import torch

    linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    if missing := [t for t in config.target_modules if t not in linear]:
        raise UserError(*(unknown("target module", t, linear) for t in missing))
    return unsloth.FastModel.get_peft_model(
        model, r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=list(config.target_modules),
        bias="none", use_dora=config.technique.dora, random_state=config.seed,
        use_gradient_checkpointing="unsloth" if config.gradient_checkpointing else False,
    )  # fmt: skip


def load_trained(config: RunConfig) -> tuple[Any, Any, Choice]:
    """(model, tokenizer, precision) for evaluation: the base model alone for `base`, else with the run's saved adapter."""
    model, tokenizer, chosen = load_base(config)
    if config.method != BASE:
        from peft import PeftModel

        folder = config.run_dir / "adapter"
        if not (folder / "adapter_config.json").exists():
            raise UserError(f"{config.run_dir} has no trained adapter; run: python scripts/train.py --method {config.method} --seed {config.seed}")
        model = PeftModel.from_pretrained(model, str(folder))
    import_unsloth().FastModel.for_inference(model)
    return model, tokenizer, chosen


def prepare_data(config: RunConfig) -> None:
    """Builds the data when it is missing; Unsloth comes first then, since the build's tokenizer imports transformers."""
    if dataset.manifest_of(config) is None:
        import_unsloth()
        dataset.prepare(config)


def import_unsloth() -> Any:
    """Unsloth, imported before transformers, trl and peft as it demands; its caches stay out of the working folder."""
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "unsloth_compiled"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import unsloth
    from transformers.utils import logging

    if not console.is_terminal:
        logging.disable_progress_bar()
    return unsloth
