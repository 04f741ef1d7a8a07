"""What is counted before loading equals what is there after loading; what cannot work is refused at once, all of it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

from kit import preflight
from kit.bench.shapes import SHAPES
from kit.config import RunConfig
from kit.device import Gpu, choose_precision
from kit.errors import UserError
from kit.methods import METHODS
from kit.model import attach, load_base
from kit.preflight import adapter_size, check, count, skeleton
from kit.settings import resolve

Make = Callable[..., RunConfig]


@pytest.mark.parametrize("method", ["lora", "qdora", "highrank", "full", "galore"])
def test_counted_parameters_are_those_there_are(ready: Make, method: str) -> None:
    config = ready("--method", method)
    bare = skeleton(config)
    model = attach(load_base(config, training=True)[0], config)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if not config.technique.full:
        assert adapter_size(config, bare) == trainable
    stored = sum(p.numel() * p.element_size() for p in model.parameters() if config.technique.full or not p.requires_grad)
    # bitsandbytes keeps its scales beside the parameters.
    assert count(config, bare).weights == pytest.approx(stored, rel=0.02)


def test_counted_optimiser_state_is_the_measured_one(ready: Make) -> None:
    from kit.training import train

    for method in ("lora", "galore"):
        config = ready("--method", method, "--limit-train", "16")
        need, bare = count(config, skeleton(config)), skeleton(config)
        weights = adapter_size(config, bare) if method == "lora" else sum(p.numel() for p in bare.parameters()) - bare.get_input_embeddings().weight.numel()
        states = need.trained - weights * (8 if method == "lora" else 4)
        assert train(config)["optimizer_state_mib"] == pytest.approx(states / 2**20, rel=0.03)
    assert count(ready("--method", "galore", "--rank", "1000"), bare).trained == weights * (4 + 8)  # no layer is wide enough to be projected


def test_what_cannot_fit_is_refused_before_loading(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "total_memory", lambda: 5 * 2**20)
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(UserError) as error:
        check(ready("--method", "full"))
    assert len(error.value.problems) == 2
    assert "weights, gradients and optimiser states alone need" in error.value.problems[0]
    assert "of disk" in error.value.problems[1]
    assert check(ready("--method", "full", "--no-preflight")) is None


def test_the_checkpoints_of_a_killed_training_need_no_room_once_more(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ready("--method", "lora")
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**20))
    with pytest.raises(UserError, match="of disk"):
        check(config)
    checkpoint = config.run_dir / "checkpoints" / "checkpoint-5"
    checkpoint.mkdir(parents=True)
    with (checkpoint / "optimizer.pt").open("wb") as file:
        file.truncate(2**30)
    check(config)


def test_a_tight_fit_is_only_said(ready: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(preflight, "total_memory", lambda: 64 * 2**20)
    assert check(ready("--method", "lora")) > 0.06
    assert "this may not fit" in capsys.readouterr().out


def test_rank_and_targets_are_checked_together(ready: Make) -> None:
    with pytest.raises(UserError) as error:
        check(ready("--method", "lora", "--rank", "64", "--target-modules", "k_proj", "--target-modules", "q_prj"))
    assert error.value.problems[0] == "unknown target module 'q_prj'; did you mean 'q_proj'?"
    assert error.value.problems[1].startswith("--rank 64 is larger than the layers it adapts (k_proj 48); use at most 48")


def test_usual_layers_that_a_model_has_by_other_names_are_told_in_one_line(ready: Make) -> None:
    with pytest.raises(UserError) as error:
        check(ready("--method", "lora", "--model", "builtin-gptneo", "--format", "alpaca"))
    assert error.value.problems == (
        "builtin-gptneo has no layers o_proj, gate_proj, up_proj, down_proj; name those to adapt, such as --target-modules k_proj "
        "--target-modules v_proj --target-modules q_proj --target-modules out_proj --target-modules c_fc --target-modules c_proj",
    )


def test_adapters_on_few_of_a_models_weights_are_said(ready: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The usual names: in a hybrid every fourth layer's attention alone, in a mixture no expert."""
    from transformers import Qwen3_5TextConfig, Qwen3MoeConfig

    small = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    Qwen3_5TextConfig(**small, intermediate_size=64, linear_num_value_heads=16).save_pretrained(tmp_path / "hybrid")
    Qwen3MoeConfig(**small, num_experts=4, moe_intermediate_size=64).save_pretrained(tmp_path / "mixture")
    assert check(ready("--method", "lora", "--no-preflight")) is None
    assert "adapters on" not in capsys.readouterr().out
    check(ready("--method", "lora", "--no-preflight", "--model", str(tmp_path / "hybrid")))
    assert "of the layers' weights; none on out_proj, in_proj_qkv, in_proj_z" in capsys.readouterr().out
    attention = [word for name in ("q_proj", "k_proj", "v_proj", "o_proj") for word in ("--target-modules", name)]
    check(ready("--method", "lora", "--no-preflight", "--model", str(tmp_path / "mixture"), *attention))
    assert "none on what is no linear layer, such as a mixture's experts" in capsys.readouterr().out


def test_a_model_that_writes_no_text_of_its_own_is_told_in_one_line(ready: Make, tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"cannot be loaded: Unrecognized configuration class .*T5Config"):
        check(ready("--method", "lora", "--model", str(tmp_path)))


def test_a_model_whose_layers_are_of_another_kind_is_told_in_one_line_and_trains_whole(ready: Make, tmp_path: Path) -> None:
    from transformers import GPT2Config

    GPT2Config(vocab_size=300, n_embd=64, n_layer=1, n_head=2).save_pretrained(tmp_path / "gpt2")
    model = "--model", str(tmp_path / "gpt2"), "--format", "alpaca"
    for method in ("lora", "galore"):
        with pytest.raises(UserError, match=r"gpt2 has no linear layers .*; --method full trains it$"):
            check(ready("--method", method, *model))
    assert check(ready("--method", "full", *model)) > 0


@pytest.fixture
def gemma(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The shapes of google/gemma-3-1b-it, counted as on a T4."""
    import torch
    from transformers import AutoModelForCausalLM, Gemma3TextConfig

    gpu = Gpu("Tesla T4", (7, 5), 15 * 2**30)
    for module in ("kit.preflight", "kit.device"):
        monkeypatch.setattr(f"{module}.cuda_gpu", lambda: (gpu, ""))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(Gemma3TextConfig(**SHAPES["gemma-3-1b"]))


def test_gemma_3_1b_on_a_t4_by_count(ready: Make, gemma: Any) -> None:
    """The figures of the README: what trains on 15 GB, from shapes alone."""
    assert sum(p.numel() for p in gemma.parameters()) == 999_885_952
    needs = {m: count(ready("--method", m, "--rank", "16", "--optimizer", "adamw_8bit"), gemma) for m in ("qlora", "lora", "full")}
    assert adapter_size(ready("--method", "lora", "--rank", "16"), gemma) == 13_045_760
    assert needs["qlora"].weights / 1e9 == pytest.approx(0.97, abs=0.03)
    assert needs["lora"].weights / 1e9 == pytest.approx(2.0, abs=0.01)
    assert needs["lora"].trained == 13_045_760 * (4 + 4 + 2)
    bits = 8 * preflight.NF4_BYTES
    assert bits == pytest.approx(4.127, abs=1e-3)  # as in the paper
    # Weights, gradients, a byte for each moment, and the embeddings' moments in float32.
    embedding = 262_144 * 1152
    assert needs["full"].certain == pytest.approx((4 + 4 + 2) * 999_885_952 + 6 * embedding)
    assert needs["full"].activations > 2 * 4 * embedding  # of a trained head's gradient
    galore = count(ready("--method", "galore", "--rank", "128", "--optimizer", "adamw_8bit"), gemma)
    assert galore.activations == needs["full"].activations - 2 * 4 * embedding
    assert galore.disk > 4 * 4 * 999_885_952  # whole models are saved, also where the embeddings are frozen
    adam = 2 * (999_885_952 - 301_989_888)
    states = galore.trained - 4 * (999_885_952 - 301_989_888)
    assert (adam - states) / 1e9 > 0.5  # what GaLore saves over 8-bit Adam, embeddings frozen


def test_the_memory_that_the_readme_names(gemma: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kit.preflight.precision", lambda config, training: choose_precision("gemma3_text", whole=training and config.technique.full))
    lines = (ROOT / "README.md").read_text().splitlines()
    rows = [(line.split("|")[1], float(found[1])) for line in lines if (found := re.search(r"\| ([\d.]+) GiB \|$", line))]
    said = {m: size for names, size in rows for m in re.findall(r"`(\w+)`", names)}
    counted = {m: round(count(resolve({"recipe": "t4", "method": m}), gemma).peak / 2**30, 1) for m in METHODS if m != "combined"}
    assert said == counted
