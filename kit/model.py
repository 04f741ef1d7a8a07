"""Loads a model through Unsloth and makes a method's parameters trainable."""

from __future__ import annotations

import gc
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kit import dataset
from kit.config import BASE, RunConfig
from kit.console import console, say
from kit.device import Choice, choose_precision, cuda_gpu
from kit.errors import UserError, first_line
from kit.generation import any_shape, named_ends
from kit.hub import hub_errors, load_tokenizer, loadable, reach
from kit.layers import check_targets, linear_layers, targets, text_weights
from kit.prompts import Renderer
from kit.resources import is_memory_error

# On some processors bitsandbytes looks for a faster 4-bit kernel on the hub and warns that it has none.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# torchao warns of extensions for newer versions of torch, which nothing here uses.
logging.getLogger("torchao").setLevel(logging.ERROR)


def all_there(record: logging.LogRecord) -> bool:
    """Of weights that a model lacks, or has in other shapes, transformers makes random ones and says so in a log record: here it is an error."""
    said = re.search(r"LOAD REPORT\S* from: (.+)\n(?s:.*?)^(.+?) *\| *\S*?(MISSING|MISMATCH|CONVERSION)", record.getMessage(), re.MULTILINE)
    if said:
        raise UserError(f"model {said[1]}: the weights are not those that its config.json describes ({said[2]}: {said[3].lower()})")
    return True


loading = logging.getLogger("transformers.modeling_utils")
# Also where the others are told to be quieter; at WARNING itself transformers would name every layer that several GPUs do not share.
loading.setLevel(logging.WARNING - 1)
loading.addFilter(all_there)


def precision(config: RunConfig, *, training: bool) -> Choice:
    """The computing precision and the reason for it; one that the GPU does not have is a UserError."""
    if config.precision != "auto":
        gpu, _ = cuda_gpu()
        if config.precision == "bfloat16" and gpu is not None and gpu.capability < (8, 0):
            raise UserError(f"--precision bfloat16: {gpu.name} has no bfloat16, and Unsloth would compute in float16; use --precision auto")
        return Choice(config.precision, "as asked for")
    return choose_precision(architecture(config).model_type, whole=training and config.technique.full)


def architecture(config: RunConfig) -> Any:
    """The model's configuration as its repository has it; of one that is stored quantised no method, nor the base, would have 16-bit weights."""
    from transformers import AutoConfig

    reach(config.model, config.revision)
    with hub_errors(f"model {config.model}"):
        stored = AutoConfig.from_pretrained(loadable(config.model, config.revision), revision=config.revision or None, trust_remote_code=False)
    if quantised := getattr(stored, "quantization_config", None):
        kind = quantised.get("quant_method", "in a way of its own")
        raise UserError(f"{config.model} is stored quantised ({kind}); name the 16-bit model that it was made from, which 4-bit methods quantise themselves")
    return stored


def load_base(config: RunConfig, *, training: bool = False, folder: Path | None = None) -> tuple[Any, Any, Choice]:
    """(model, tokenizer, precision): the base model as the method stores it, every weight frozen; from `folder` when the weights were trained."""
    unsloth = import_unsloth()
    import torch

    four_bit = config.method != BASE and config.technique.four_bit
    chosen = precision(config, training=training)
    where = str(folder or config.model)
    say(f"loading {where}{' in 4-bit NF4' if four_bit else ''}, computing in {chosen.name}: {chosen.reason}")
    whole: dict[str, bool] = {}
    if training and config.technique.full:
        # Weights held in 16 bits lose the updates smaller than their rounding: on a GPU Unsloth keeps them in float32 and computes in 16 bits.
        whole = {"full_finetuning": True} | ({"float32_mixed_precision": True} if cuda_gpu()[0] else {})
    with hub_errors(f"model {config.model}"):
        # The exact name: for 4 bits Unsloth would take another repository, whose quantisation leaves some layers out.
        model, _ = unsloth.FastModel.from_pretrained(
            model_name=str(folder or loadable(config.model, config.revision)), use_exact_model_name=True,
            revision=None if folder else config.revision or None, max_seq_length=config.max_length + config.max_new_tokens,
            dtype=getattr(torch, chosen.name), load_in_4bit=four_bit, trust_remote_code=False, use_safetensors=True,
            use_gradient_checkpointing="unsloth" if config.gradient_checkpointing else False, **whole,
        )  # fmt: skip
    if hasattr(model, "peft_config"):
        raise UserError(f"{config.model} holds an adapter (adapter_config.json) beside the model; name a model without")
    if chosen.name == "float32" and not whole and getattr(model, "_unsloth_forced_float32", False):
        chosen = Choice("float16", "float32 was asked for, but Unsloth computes this family in float16 on GPUs without bfloat16")
        say(f"computing in {chosen.name}: {chosen.reason}")
    # Unsloth falls back to 16-bit with a printed line when NF4 fails; a comparison must not.
    if four_bit and not any(type(m).__name__ == "Linear4bit" for m in model.modules()):
        raise UserError(f"{config.model} could not be loaded in 4-bit on this machine (bitsandbytes rejects its layers); use --method lora")
    # Flex attention refuses whole weights, whose queries and keys are in float32 and whose values are in 16 bits.
    if model.config._attn_implementation == "flex_attention" and (not training or config.technique.full):
        model.config._attn_implementation = any_shape(model)
    if folder:
        restore(model, folder)
    settle(model, saved=training)
    model.requires_grad_(False)
    tokenizer = load_tokenizer(config.model, config.revision)
    as_stored(model, tokenizer, architecture(config).get_text_config().vocab_size)
    embedded(config, model, tokenizer)
    return model, tokenizer, chosen


def settle(model: Any, *, saved: bool = False) -> None:
    """Greedy generation, without the beams, penalties or stop texts that the model's own settings ask for.

    One that will be saved keeps its own, unless they contradict each other (a temperature without sampling): transformers reads these and writes none.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    with suppress(ValueError):
        own.validate(strict=True)
        if saved:
            return
    model.generation_config = GenerationConfig(**{name: getattr(own, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")})


def restore(model: Any, folder: Path) -> None:
    """The saved weights once more, into the dtype that the model has: Unsloth loads Gemma 3 by way of bfloat16 for a GPU without it, and loses digits.

    Those alone that are saved under their own names: transformers, which renames others (Pythia's head, the experts of a mixture), has loaded those,
    and what was trained is held against what is loaded (kit.gates).
    """
    from safetensors.torch import load_file

    for file in folder.glob("*.safetensors"):
        model.load_state_dict(load_file(file), strict=False)


def as_stored(model: Any, tokenizer: Any, vocabulary: int) -> None:
    """Padding without a token of its own, or without an embedding for it: the end of text, which labels and masks tell apart.

    On a GPU Unsloth adds a token and an embedding row to a model without one; adapters would then carry the embeddings and fit no other loader.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= vocabulary:
        tokenizer.pad_token = tokenizer.eos_token
    if model.get_input_embeddings().weight.shape[0] != vocabulary:
        model.resize_token_embeddings(vocabulary)
    # Before each training transformers takes these from the tokenizer and warns of it; generation settings may name more ends of a reply.
    model.config.eos_token_id = tokenizer.eos_token_id
    if tokenizer.eos_token_id not in (own := named_ends(model.generation_config)):
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *own]
    for settings in (model.config, model.generation_config):
        settings.bos_token_id, settings.pad_token_id = tokenizer.bos_token_id, tokenizer.pad_token_id


def embedded(config: RunConfig, model: Any, tokenizer: Any) -> None:
    """Control tokens that were added to a tokenizer and never to the model are a UserError: a GPU would only say that an index is out of bounds."""
    rows = model.get_input_embeddings().weight.shape[0]
    control = Renderer(tokenizer, config.format, sys.maxsize).scaffold(2, False)
    if beyond := sorted({i for piece in control for i in piece if i >= rows}):
        raise UserError(f"{config.model} has embeddings of tokens up to {rows - 1}, and its {config.format} format uses {tokenizer.decode(beyond[:1])!r}, "
                        f"token {beyond[0]}" + ("; use --format alpaca" if config.format == "chat" else ""))  # fmt: skip


def built(architecture: Any, **settings: Any) -> Any:
    """A model of an architecture with random weights, leaving no trace.

    transformers' lazy package keeps every class it once gave: on a GPU Unsloth's compiled class, with the fused loss, would not be used any more.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(architecture, **settings)
    vars(sys.modules[type(architecture).__module__.rpartition(".")[0]]).pop(type(model).__name__, None)
    return model


def attach(model: Any, config: RunConfig) -> Any:
    """The model with the method's parameters trainable: a new adapter, or the weights themselves."""
    if problems := check_targets(config, linear_layers(model)):
        raise UserError(*problems)
    if config.technique.full:
        return unfreeze(model, config)
    try:
        model = import_unsloth().FastModel.get_peft_model(
            model, r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets(model, config),
            bias="none", use_dora=config.technique.adapter == "dora", use_rslora=config.rslora, random_state=config.seed,
            use_gradient_checkpointing="unsloth" if config.gradient_checkpointing else False,
        )  # fmt: skip
    except ValueError as error:
        if not any(name in str(error) for name in config.target_modules):  # such as Mamba's out_proj, whose weight is used without its layer
            raise
        raise UserError(f"PEFT adapts other --target-modules of {config.model}: {first_line(error)}") from None
    return fast_dora(model, config)


def ordered(model: Any) -> Any:
    """The model, whose adapters' layers PEFT keeps in a set: saved in its order, no two trainings would leave the same bytes."""
    for settings in getattr(model, "peft_config", {}).values():
        if isinstance(settings.target_modules, set):
            settings.target_modules = sorted(settings.target_modules)
    return model


def fast_dora(model: Any, config: RunConfig) -> Any:
    """The model with its DoRA layers, if any, on the kit's path; it stays an ordinary PEFT model."""
    if config.technique.adapter == "dora" and config.dora_kernel == "kit":
        from kit.dora import install

        install(model)
    return model


def unfreeze(model: Any, config: RunConfig) -> Any:
    """The model with the weights that text goes through trainable, the embeddings only where asked for."""
    for weight in text_weights(model):
        weight.requires_grad_(True)
    if not config.train_embeddings:
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            embedding.requires_grad_(False)
        if config.gradient_checkpointing:  # Recomputation starts from inputs that carry a gradient.
            model.enable_input_require_grads()
    return model


def load_trained(config: RunConfig) -> tuple[Any, Any, Choice]:
    """(model, tokenizer, precision) for evaluation: the base model alone for `base`, else with what the run saved."""
    saved = saved_folder(config)
    if config.method != BASE and not any(saved.glob("*.safetensors")):
        raise UserError(f"{config.run_dir} has no trained model; run: python scripts/train.py {config.again}")
    model, tokenizer, chosen = load_base(config, folder=saved if config.method != BASE and config.technique.full else None)
    if config.method != BASE and not config.technique.full:
        from peft import PeftModel

        with undamaged(saved):
            model = fast_dora(PeftModel.from_pretrained(model, str(saved)), config)
    import_unsloth().FastModel.for_inference(model)
    return model, tokenizer, chosen


@contextmanager
def undamaged(saved: Path) -> Iterator[None]:
    """What a run saved and cannot be loaded again is a UserError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, UserError) or is_memory_error(error):
            raise
        raise UserError(f"{saved} is damaged ({type(error).__name__}: {first_line(error)}); remove it and train again") from None


def saved_folder(config: RunConfig) -> Path:
    """Where a run keeps what it trained: an adapter in PEFT's format, or the whole model."""
    return config.run_dir / ("model" if config.method != BASE and config.technique.full else "adapter")


def prepare_data(config: RunConfig) -> None:
    """Builds the data when it is missing; Unsloth comes first then, since the build's tokenizer imports transformers."""
    if dataset.manifest_of(config) is None:
        import_unsloth()
        dataset.prepare(config)


def import_unsloth() -> Any:
    """Unsloth, imported before transformers, trl and peft as it demands; its caches stay out of the working folder."""
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "unsloth_compiled"))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Else what checkpointing keeps in float32 is rounded to bfloat16 where it is long enough, and gradients differ by a quarter of a percent.
    os.environ.setdefault("UNSLOTH_OFFLOAD_FP32", "exact")
    known = "unsloth" in sys.modules
    gc.disable()
    try:
        import unsloth
    finally:
        gc.enable()
    quiet()
    if not known:  # What is imported stays: half a million objects that each full collection would visit, for 0.3 s, also while they come.
        gc.freeze()
    return unsloth


def quiet() -> None:
    """Keeps the libraries' own progress bars out of logs."""
    from transformers.utils import logging as transformers_logging

    if not console.is_terminal:
        transformers_logging.disable_progress_bar()


def free_memory() -> None:
    """Gives back what dropped models held, before another one is loaded in this process."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
