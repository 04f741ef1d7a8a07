"""The DoRA bench: what it trains is what it says, and what it counts."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from conftest import config

# kit.bench.dora the attribute is the function.
bench: Any = importlib.import_module("kit.bench.dora")

SMALL = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "query_pre_attn_scalar": 16}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "SHAPE", bench.SHAPE | SMALL)
    monkeypatch.setattr(bench, "ROWS", 2)
    monkeypatch.setattr(bench, "LENGTH", 16)


def test_every_setting_is_there_once() -> None:
    assert len(set(bench.SETTINGS.values())) == len(bench.SETTINGS) == 5 * 2 + 2 + 3


def test_sides_are_compared_within_a_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("train NF4 autocast checkpointed x4", "train 16-bit x1", "generate float32")
    monkeypatch.setattr(bench, "SETTINGS", {name: bench.SETTINGS[name] for name in names})
    made: list[tuple[str, ...]] = []
    original = bench.adapted

    def noted(*arguments: Any) -> Any:
        model = original(*arguments)
        kinds = {type(v).__name__ for m in model.modules() for v in getattr(m, "lora_variant", {}).values()}
        bases = {type(m.base_layer).__name__ for m in model.modules() if hasattr(m, "base_layer")}
        trained = {p.dtype for p in model.parameters() if p.requires_grad}
        assert trained == {torch.float32}
        assert model.is_gradient_checkpointing == arguments[1].checkpointing
        made.append((*kinds, *bases))
        return model

    monkeypatch.setattr(bench, "adapted", noted)
    found = bench.dora(config("--rank", "4"), 1)
    assert set(found["ratios"]) == {f"{n} {side}/{n} lora" for n in names for side in ("dora-kit", "dora-peft")}
    assert all(ratio > 0 for ratio in found["ratios"].values())
    linear = [("Linear",), ("KeptNormDora", "Linear"), ("DoraLinearVariant", "Linear")]
    assert made == [("Linear4bit",), ("KeptNormDora", "Linear4bit"), ("DoraLinearVariant", "Linear4bit"), *linear, *linear]
    kept = [found["variants"][f"train 16-bit x1 {side}"]["saved_mib"] for side in bench.SIDES]
    assert 0 < kept[1] < kept[2]
    assert "saved_mib" not in found["variants"]["generate float32 lora"]


def test_only_the_settings_that_are_asked_for_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "ONLY", ["NF4 autocast"])
    assert set(bench.settings()) == {"train NF4 autocast x1", "train NF4 autocast checkpointed x1", "train NF4 autocast checkpointed x4"}
    monkeypatch.setattr(bench, "ONLY", [])
    assert bench.settings() == bench.SETTINGS


def test_a_process_that_measures_memory_runs_one_variant() -> None:
    bench.ALONE[:] = ["train 16-bit x1 dora-kit"]
    try:
        found = bench.dora(config("--rank", "4"), 1)
    finally:
        bench.ALONE[:] = []
    assert found["variants"].keys() == {"train 16-bit x1 dora-kit"}
    assert found["variants"]["train 16-bit x1 dora-kit"]["peak_memory_gib"] > 0
