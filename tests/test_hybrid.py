"""Hybrids: widening keeps the function, the two halves make one training, combinations are chosen on validation rows alone."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit import hybrid
from kit.config import RunConfig
from kit.errors import UserError
from kit.evaluation import evaluate
from kit.files import read_json, read_jsonl, write_json
from kit.hybrid import KINDS, WEIGHTS, adapter, padded, widen
from kit.model import attach, load_base
from kit.settings import sibling
from kit.training import train

Make = Callable[..., RunConfig]
SHORT = ("--limit-train", "68", "--limit-test", "6", "--max-new-tokens", "8", "--valid-per-source", "4", "--forgetting-text", "none")
IDS = [[2, 40, 50, 60, 70, 80]]


def logits(model: Any) -> Any:
    import torch

    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(IDS)).logits


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Callable[..., RunConfig], Path]:
    """Places with a lora run of rank 16 in them, and its adapter."""
    from conftest import config, places

    folder = tmp_path_factory.mktemp("hybrid")

    def make(*flags: str) -> RunConfig:
        return config(*places(folder), *SHORT, *flags)

    train(make("--method", "lora"))
    return make, make("--method", "lora").run_dir / "adapter"


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize("method", ["highrank", "rslora"])
def test_widening_and_padding_keep_the_function(trained: tuple[Make, Path], tmp_path: Path, method: str, stabilised: bool) -> None:
    import torch
    from peft import PeftModel

    make, folder = trained
    source = Path(shutil.copytree(folder, tmp_path / "source"))
    write_json(source / "adapter_config.json", read_json(source / "adapter_config.json") | {"use_rslora": stabilised})  # 4 times the scale
    expected = logits(PeftModel.from_pretrained(load_base(make("--method", "lora"))[0], str(source)))
    untuned = logits(load_base(make("--method", "lora"))[0])
    assert (expected - untuned).abs().max() > 0.5
    wide = make("--method", method)
    assert (wide.rank, wide.alpha) == (48, 12)
    model = attach(load_base(wide)[0], wide)
    assert {m.scaling["default"] for m in model.modules() if isinstance(getattr(m, "scaling", None), dict)} == {12 / (48**0.5 if method == "rslora" else 48)}
    widen(model, source)
    assert torch.allclose(logits(model), expected, atol=1e-4)
    again = PeftModel.from_pretrained(load_base(make("--method", "lora"))[0], str(padded(source, tmp_path / "wide", 48)))
    assert torch.allclose(logits(again), expected, atol=1e-4)
    assert adapter(tmp_path / "wide")[1]["r"] == 48


def test_sequential_is_one_training_in_two_halves(trained: tuple[Make, Path]) -> None:
    make, _ = trained
    config = make("--method", "hybrid")
    record = train(config)
    alone = read_json(make("--method", "lora").run_dir / "train.json")
    # The same rows once, in the same order: equal steps and tokens to every other method.
    for key in ("steps", "tokens_total", "tokens_supervised"):
        assert record[key] == alone[key]
    log, other = (list(read_jsonl(c.run_dir / "log.jsonl")) for c in (config, make("--method", "lora")))
    assert [(r["step"], r["tokens"]) for r in log] == [(r["step"], r["tokens"]) for r in other]
    assert [p["method"] for p in record["parts"]] == ["qlora"]
    assert record["train_wall_s"] > record["parts"][0]["train_wall_s"] > 0
    assert (record["epochs"], record["rows_left_out"]) == (1.0, 4)
    assert record["peak_memory_gib"] >= record["parts"][0]["peak_memory_gib"]
    assert adapter(config.run_dir / "adapter")[1]["r"] == 48
    assert not [g for g in (record["gates"] | evaluate(config)["gates"]).values() if g["passed"] is False]


def test_combined_tries_all_and_takes_the_best_on_validation(trained: tuple[Make, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    make, _ = trained
    opened = []
    real = hybrid.dataset.rows
    monkeypatch.setattr(hybrid.dataset, "rows", lambda config, split: opened.append(split) or real(config, split))
    config = make("--method", "combined")
    record = train(config)
    assert "test" not in opened
    assert [t["kind"] for t in record["tried"]] == ["alone"] * 2 + [k for k in KINDS for _ in WEIGHTS]
    combinations = [t for t in record["tried"] if t["kind"] != "alone"]
    assert record["valid_perplexity"] == min(t["valid_perplexity"] for t in combinations)
    assert len({t["valid_perplexity"] for t in combinations}) == len(combinations)
    qlora, highrank = (read_json(make("--method", m).run_dir / "train.json") for m in ("qlora", "highrank"))
    assert record["train_wall_s"] == qlora["train_wall_s"] + highrank["train_wall_s"]
    assert record["tokens_total"] == 2 * qlora["tokens_total"]
    scored = evaluate(config)
    assert scored["gates"]["reloaded"]["passed"]


@pytest.mark.parametrize("both", [True, False])
def test_a_sum_of_low_rank_is_pefts_svd(both: bool) -> None:
    """Of the factors alone; also where only one of the adapters is on a layer, and where the layer is narrower than the rank."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.Linear(40, 6))
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=4, target_modules=["0", "1"]), "one")
    model.add_adapter("two", LoraConfig(r=8, lora_alpha=24, target_modules=["0", "1"] if both else ["1"]))
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight)
    weights = {"one": 0.25, "two": 0.75}
    model.add_weighted_adapter(["one", "two"], [0.25, 0.75], "wanted", combination_type="svd", svd_full_matrices=False)
    hybrid._add(RunConfig(), model, "made", "svd", weights)
    layers = [m for m in model.modules() if "made" in getattr(m, "lora_A", {})]
    assert len(layers) == 2
    for layer in layers:
        made = layer.get_delta_weight("made")
        assert torch.allclose(made, layer.get_delta_weight("wanted"), atol=1e-4 * float(made.abs().max()))
        assert (layer.lora_A["made"].weight.shape, layer.lora_A["made"].weight.dtype) == (layer.lora_A["one"].weight.shape, torch.float32)
    x = torch.randn(5, 24)
    model.set_adapter("made")
    assert model(x).isfinite().all()


def test_combined_needs_validation_rows(tiny: Make) -> None:
    with pytest.raises(UserError, match="give --valid-per-source"):
        train(tiny("--method", "combined", "--valid", "0"))


def test_what_is_tuned_is_the_parts(tiny: Make) -> None:
    experiment = tiny("--method", "lora").run_dir.parent
    wide = ("--dropout", "0.1")
    write_json(experiment / "sweep" / "qlora.json", {"best": 7e-4, "budget": {"settings": tiny("--method", "qlora", *wide).identity()}})
    hybrid = tiny("--method", "hybrid", "--tuned", *wide)
    assert hybrid.learning_rate == tiny("--method", "hybrid").learning_rate
    assert (sibling(hybrid, "qlora").learning_rate, sibling(hybrid, "qlora").tuned) == (7e-4, True)
    assert sibling(tiny("--method", "hybrid", "--tuned", "--learning-rate", "1e-5"), "qlora").learning_rate == 1e-5
    # The part has the user's flags, and they are held against the sweep's.
    with pytest.raises(UserError, match=r"other settings \(dropout 0.1 -> 0.0\)"):
        sibling(tiny("--method", "hybrid", "--tuned"), "qlora")
    # A tuned method's rate is its own, and not one that was asked for.
    assert sibling(tiny("--method", "qlora", "--tuned", *wide), "hybrid").learning_rate == hybrid.learning_rate


def test_a_part_has_its_own_settings_and_the_users_flags(tiny: Make) -> None:
    part = sibling(tiny("--method", "combined", "--seed", "3", "--epochs", "2"), "qlora")
    assert (part.method, part.rank, part.alpha, part.seed, part.epochs) == ("qlora", 16, 16, 3, 2)
    # Also where the flag says what the method has anyway: `make compare ARGS="--alpha 32"` trains QLoRA with it, and so must its part be.
    whole = tiny("--method", "combined", "--rank", str(tiny("--method", "combined").rank))
    assert sibling(whole, "qlora").rank == whole.rank > sibling(tiny("--method", "combined"), "qlora").rank
