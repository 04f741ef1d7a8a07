"""Model folders as they come from elsewhere: what cannot be compared is one line that says so, and nothing of it is trained."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit.config import RunConfig
from kit.errors import UserError
from kit.files import read_json, write_json
from kit.hub import BUILTIN, load_tokenizer, loadable
from kit.model import architecture, attach, import_unsloth, load_base, settle
from kit.prompts import Renderer

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


def test_a_whole_model_is_loaded_without_a_word_of_the_library(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    import_unsloth()
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("transformers").handlers[0], "emit", lambda record: said.append(record.getMessage()))
    load_base(ready("--method", "base"))
    assert said == []


@pytest.mark.parametrize("name", ["builtin", "builtin-gptneo"])
def test_a_model_and_its_tokenizer_name_the_same_control_tokens(name: str, ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else transformers says before each training that it changed them, and names a reply's end twice."""
    loaded, tokenizer, _ = load_base(ready("--model", name, "--format", "alpaca", "--method", "lora", "--max-length", "128"), training=True)
    from transformers.trainer_utils import align_special_tokens

    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("transformers").handlers[0], "emit", lambda record: said.append(record.getMessage()))
    align_special_tokens(loaded, tokenizer)
    assert said == []
    assert loaded.generation_config.eos_token_id == ([1, 5] if name == "builtin" else [0])


def test_an_end_that_the_generation_settings_lack_is_added_without_a_word(ready: Make, model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.trainer_utils import align_special_tokens

    folder = model("generation_config.json", eos_token_id=7)
    loaded, tokenizer, _ = load_base(ready("--model", str(folder), "--method", "lora"), training=True)
    said: list[str] = []
    monkeypatch.setattr(logging.getLogger("transformers").handlers[0], "emit", lambda record: said.append(record.getMessage()))
    align_special_tokens(loaded, tokenizer)
    assert said == []
    assert loaded.generation_config.eos_token_id == [tokenizer.eos_token_id, 7]


def test_pickled_weights_are_not_read(ready: Make, model: Callable[..., Path]) -> None:
    import torch
    from safetensors.torch import load_file

    folder = model()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded: it has no weights in safetensors, the only ones that are read"):
        load_base(ready("--model", str(folder), "--method", "base"))


def test_replies_are_greedy_whatever_the_model_asks_for(ready: Make, model: Callable[..., Path]) -> None:
    """The kit's own generation reads no such settings, transformers', by which the chat and models with states go, does."""
    folder = model("generation_config.json", eos_token_id=[1, 5, 7], num_beams=4, repetition_penalty=1.5, stop_strings=["a"], suppress_tokens=[9])
    loaded, _, _ = load_base(ready("--model", str(folder), "--method", "base"))
    assert loaded.generation_config.to_diff_dict().keys() <= {"bos_token_id", "eos_token_id", "pad_token_id", "transformers_version"}
    assert loaded.generation_config.eos_token_id == [1, 5, 7]


def test_settings_that_contradict_each_other_hinder_no_saving(ready: Make, model: Callable[..., Path], tmp_path: Path) -> None:
    """transformers reads a temperature without sampling and writes none: whole weights were lost once they were trained."""
    loaded, _, _ = load_base(ready("--model", str(model("generation_config.json", temperature=0.6)), "--method", "full"), training=True)
    loaded.save_pretrained(tmp_path / "saved")
    loaded.generation_config.update(do_sample=True, temperature=0.7)
    settle(loaded, saved=True)
    assert loaded.generation_config.temperature == 0.7


def test_a_folder_below_home_is_that_folder(model: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell leaves the ~ of --model=~/model as it is."""
    folder = model()
    monkeypatch.setenv("HOME", str(folder.parent))
    assert loadable("~/model") == str(folder)


@pytest.mark.parametrize("left", ["model.safetensors", "tokenizer_config.json"])
def test_a_model_without_its_tokenizers_files_is_refused(left: str, model: Callable[..., Path]) -> None:
    """transformers makes one that knows no text, and says nothing."""
    folder = model()
    for file in folder.glob("*token*"):
        if file.name != left:
            file.unlink()
    with pytest.raises(UserError, match=r"model \S+ cannot be loaded: it has no tokenizer that can be read"):
        load_tokenizer(str(folder))


def test_an_adapter_is_no_model(tiny: Make, tmp_path: Path) -> None:
    write_json(tmp_path / "adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "lab/base"})
    with pytest.raises(UserError, match=r"has no config\.json that names an architecture; of an adapter, give the model that it was made for"):
        architecture(tiny("--model", str(tmp_path)))


def test_templates_without_a_default_are_named(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", {"rag": "x", "tool_use": "x"})
    with pytest.raises(UserError, match=r"multiple chat templates with no default.*\['rag', 'tool_use'\].*--format alpaca"):
        Renderer(tokenizer, "chat", 128)


def test_padding_without_a_row_of_the_embeddings_is_the_end_of_text(ready: Make, model: Callable[..., Path]) -> None:
    folder = model("tokenizer_config.json", pad_token="[PAD]")
    _, tokenizer, _ = load_base(ready("--model", str(folder), "--method", "base"))
    assert tokenizer.pad_token_id == tokenizer.eos_token_id


def test_control_tokens_without_a_row_of_the_embeddings_are_named(ready: Make, model: Callable[..., Path]) -> None:
    """As where a chat template was given new ones, and the embeddings were not resized: an IndexError, or an assertion of the GPU's."""
    folder = model()
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<end_of_turn>", "<|over|>"))
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|over|>"]})
    tokenizer.save_pretrained(folder)
    with pytest.raises(UserError, match=r"has embeddings of tokens up to \d+, and its chat format uses '<\|over\|>', token \d+; use --format alpaca"):
        load_base(ready("--model", str(folder), "--method", "base"))


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_an_adapter_beside_a_model_is_not_the_base(ready: Make, model: Callable[..., Path]) -> None:
    """Unsloth loads the adapter onto the model that it names, and the untuned model would be a tuned one."""
    base = ready("--model", str(model()), "--method", "lora")
    attach(load_base(base, training=True)[0], base).save_pretrained(base.model)
    with pytest.raises(UserError, match=r"model holds an adapter \(adapter_config\.json\) beside the model; name a model without"):
        load_base(base)
