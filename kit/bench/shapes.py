"""Real models' shapes with random weights: what a step costs depends on the shape alone, and nothing is downloaded."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kit.config import RunConfig
from kit.errors import UserError, unknown
from kit.hub import load_tokenizer
from kit.model import built

# google/gemma-3-1b-it's config.json, apart from its token ids: the built-in tokenizer is used with it.
SHAPES: dict[str, dict[str, Any]] = {
    "gemma-3-1b": {
        "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256,
        "vocab_size": 262144, "query_pre_attn_scalar": 256, "sliding_window": 512, "max_position_embeddings": 32768,
    },
}  # fmt: skip


@contextmanager
def shaped(config: RunConfig, shape: str, layers: int | None) -> Iterator[RunConfig]:
    """The configuration with a model of that shape, or of its first layers, and with data folders of its own, all of them temporary."""
    if shape not in SHAPES:
        raise UserError(unknown("model config", shape, SHAPES))
    settings = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    with tempfile.TemporaryDirectory() as folder:
        build(settings, Path(folder) / shape)
        yield dataclasses.replace(config, model=str(Path(folder) / shape), data_dir=folder)


def build(settings: dict[str, Any], folder: Path) -> None:
    """Saves the model in bfloat16 with the built-in tokenizer."""
    import torch
    from transformers import Gemma3TextConfig

    tokenizer: Any = load_tokenizer("builtin")
    torch.manual_seed(0)
    ids = {"pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    built(Gemma3TextConfig(**settings, **ids), dtype=torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
