"""Model folders as they come from elsewhere: what cannot be compared is one line that says so, and nothing of it is trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.config import RunConfig
from kit.errors import UserError
from kit.files import read_json, write_json
from kit.hub import BUILTIN
from kit.model import architecture, load_base

Make = Callable[..., RunConfig]


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    """A copy of the built-in model with other settings, in config.json unless told; None takes one out."""

    def make(file: str = "config.json", **settings: Any) -> Path:
        folder = Path(shutil.copytree(BUILTIN["builtin"], tmp_path / "model"))
        stored = read_json(folder / file) | settings
        write_json(folder / file, {k: v for k, v in stored.items() if v is not None})
        return folder

    return make


@pytest.mark.parametrize("stored", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"quant_method": "gptq", "bits": 4}])
def test_a_model_that_is_stored_quantised_is_refused(stored: dict[str, Any], tiny: Make, model: Callable[..., Path]) -> None:
    """LoRA, and the base model's evaluation, would run on 4 bits under the name of 16."""
    folder = model(quantization_config=stored)
    with pytest.raises(UserError, match=rf"is stored quantised \({stored['quant_method']}\).*name the 16-bit model that it was made from"):
        architecture(tiny("--model", str(folder)))


def test_weights_that_are_missing_or_of_other_shapes_are_not_made_up(ready: Make, model: Callable[..., Path]) -> None:
    """transformers fills in random ones and warns."""
    from safetensors.torch import load_file, save_file

    folder = model()
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if ".layers.3.mlp" not in k}, folder / "model.safetensors", metadata={"format": "pt"})
    base = ready("--model", str(folder), "--method", "base")
    with pytest.raises(UserError, match=r"model/?: the weights are not those that its config\.json describes \(model\.layers\.3\.mlp.*: missing"):
        load_base(base)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    write_json(folder / "config.json", read_json(folder / "config.json") | {"intermediate_size": 256})
    with pytest.raises(UserError, match=r"describes \(model\.layers.*: mismatch"):
        load_base(base)
