"""The sweep: the same budget for each rate, judged on validation rows, the curve kept and the best rate used when asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kit import sweep as module
from kit.config import RunConfig
from kit.errors import UserError
from kit.files import read_json, write_json
from kit.sweep import sweep

Make = Callable[..., RunConfig]
# A quarter of the rows is 16 optimiser steps.
SHORT = ("--method", "lora", "--limit-train", "256", "--valid-per-source", "8", "--accumulation", "1")


def stand_in(monkeypatch: pytest.MonkeyPatch, perplexity: Callable[[RunConfig], float], *, moved: bool = True) -> list[tuple[float, int]]:
    """In place of training; returns (rate, rank) of each that is made."""
    made: list[tuple[float, int]] = []

    def train(trial: RunConfig) -> dict[str, Any]:
        made.append((trial.learning_rate, trial.rank))
        return {"valid_perplexity": perplexity(trial), "train_wall_s": 1.0, "gates": {"moved": {"passed": moved, "detail": "0 of 84"}}}

    monkeypatch.setattr("kit.sweep.train", train)
    return made


def test_a_sweep_keeps_its_curve_and_gives_the_best_rate(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FACTORS", (0.001, 1.0, 1e30))
    found = sweep(ready(*SHORT, "--max-grad-norm", "1e30"), share=0.25)
    assert [c["learning_rate"] for c in found["curve"]] == [8e-6, 8e-3, 8e27]
    low, good, diverged = (c["valid_perplexity"] for c in found["curve"])
    assert good < low
    assert diverged is None
    assert found["best"] == 8e-3
    assert found["budget"]["rows"] == 64
    config = ready(*SHORT, "--max-grad-norm", "1e30", "--tuned")
    assert config.learning_rate == 8e-3
    assert read_json(config.run_dir.parent / "sweep" / "lora.json") == found
    # Test rows were not opened, and the runs lie apart from those that are compared.
    assert not config.run_dir.exists()


def test_a_best_rate_at_the_end_is_said_and_other_settings_are_swept_anew(
    ready: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = stand_in(monkeypatch, lambda trial: 1 / trial.learning_rate)
    monkeypatch.setattr(module, "FACTORS", (0.5, 1.0, 2.0))
    for flags in ((), (), ("--rank", "8"), ("--learning-rate", "1.6e-2")):
        sweep(ready(*SHORT, *flags), share=0.25)
    assert trained == [(4e-3, 16), (8e-3, 16), (1.6e-2, 16), (4e-3, 8), (8e-3, 8), (1.6e-2, 8), (8e-3, 16), (1.6e-2, 16), (3.2e-2, 16)]
    said = capsys.readouterr().out
    assert "a larger one may be better; sweep around it with --learning-rate 0.016" in said.replace("\n", " ")
    assert said.count("is there already") == 1


def test_a_trial_of_other_settings_makes_room(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FACTORS", (1.0,))
    trained = [sweep(ready(*SHORT), share=share)["budget"]["rows"] for share in (0.25, 0.5)]
    assert trained == [64, 128]


def test_a_sweep_needs_validation_rows_and_something_to_tune(ready: Make) -> None:
    with pytest.raises(UserError, match="judged on validation rows"):
        sweep(ready(*SHORT, "--valid", "0"), share=0.2)
    with pytest.raises(UserError, match="it has no learning rate"):
        sweep(ready("--method", "base"), share=0.2)


@pytest.mark.parametrize("method", ["hybrid", "combined"])
def test_what_is_built_on_others_has_no_rate_to_look_for(ready: Make, method: str) -> None:
    with pytest.raises(UserError, match="hybrid and combined are not swept; sweep their parts, qlora and highrank"):
        sweep(ready("--method", method), share=0.2)


@pytest.mark.parametrize(
    ("flags", "share", "what_to_do"),
    [
        ((), 0.2, r"51 of 256 training rows makes 12 optimiser steps, and it takes 16 .* give a larger share of the rows, --share 0.25"),
        (("--limit-train", "30"), 1.0, "with --share 1 take 64 training rows or more, or make more of them with --epochs 3"),
        (("--limit-train", "60"), 0.2, r"12 of 60 training rows .* with --share 1 take 64 training rows or more, or make more of them with --epochs 2"),
        (("--limit-train", "30", "--epochs", "6"), 0.2, r"30 training rows makes 6 optimiser steps, .* --share 0.4"),
        (("--max-steps", "9"), 1.0, "give a larger --max-steps, or none"),
        (("--limit-train", "9000000"), 1e-6, r" 1 of 1,800 training rows makes 1 optimiser step, .* --share 0.04"),
    ],
)
def test_too_few_steps_are_refused_before_anything_is_trained(
    ready: Make, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...], share: float, what_to_do: str
) -> None:
    trained = stand_in(monkeypatch, lambda _: 2.0)
    with pytest.raises(UserError, match=what_to_do):
        sweep(ready(*SHORT, *flags), share=share)
    assert trained == []


def test_no_rate_is_best_where_all_give_the_same_or_nothing_moved(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ready(*SHORT)
    stand_in(monkeypatch, lambda _: 2.0)
    with pytest.raises(UserError, match=r"the same validation perplexity, 2.000: none is better; give a larger --share"):
        sweep(config, share=0.25)
    stand_in(monkeypatch, lambda trial: trial.learning_rate, moved=False)
    with pytest.raises(UserError, match="every learning rate of the sweep failed for lora"):
        sweep(config, share=0.25)
    assert not (config.run_dir.parent / "sweep" / "lora.json").exists()


@pytest.mark.parametrize(
    ("method", "flags", "differing"),
    [
        ("lora", ("--rank", "4"), "rank 16 -> 4"),
        ("lora", ("--format", "alpaca", "--max-length", "64"), r"format 'chat' -> 'alpaca', max_length 256 -> 64"),
        ("lora", ("--accumulation", "4"), "effective batch 4 -> 16"),
        ("lora", ("--micro-batch", "2", "--accumulation", "2"), ""),
        ("lora", ("--limit-train", "9", "--limit-test", "3", "--epochs", "2", "--max-steps", "3", "--seed", "1", "--engine", "vllm"), ""),
        ("lora", ("--train-embeddings", "--update-gap", "3"), ""),  # of other methods
        ("full", ("--rank", "4", "--alpha", "3"), ""),
        ("full", ("--no-train-embeddings",), "train_embeddings True -> False"),
    ],
)
def test_a_rate_that_was_found_with_other_settings_is_not_used(
    ready: Make, monkeypatch: pytest.MonkeyPatch, method: str, flags: tuple[str, ...], differing: str
) -> None:
    stand_in(monkeypatch, lambda trial: 1 / trial.learning_rate)
    short = ("--method", method, *SHORT[2:])
    best = sweep(ready(*short), share=0.25)["best"]
    if differing:
        with pytest.raises(UserError, match=rf"other settings \({differing}\).* sweep anew with: python scripts/sweep.py --method {method} --name tiny"):
            ready(*short, *flags, "--tuned")
    else:
        assert ready(*short, *flags, "--tuned").learning_rate == best
    assert ready(*short, *flags, "--tuned", "--learning-rate", "1e-5").learning_rate == 1e-5


def test_what_is_built_on_methods_without_a_sweep_is_told_so_at_once(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `make compare ARGS=--tuned` asks for combined before it evaluates the base model."""
    stand_in(monkeypatch, lambda trial: 1 / trial.learning_rate)
    for part in ("qlora", "highrank"):
        with pytest.raises(UserError, match=rf"--tuned needs \S+/sweep/{part}\.json; make it with: python scripts/sweep\.py --method {part} "):
            ready("--method", "combined", *SHORT[2:], "--tuned")
        sweep(ready("--method", part, *SHORT[2:]), share=0.25)
    assert ready("--method", "combined", *SHORT[2:], "--tuned").tuned


def test_a_sweep_from_before_a_setting_existed_was_made_with_its_default(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = stand_in(monkeypatch, lambda trial: 1 / trial.learning_rate)
    config = ready(*SHORT)
    best = sweep(config, share=0.25)["best"]
    path = config.run_dir.parent / "sweep" / "lora.json"
    found = read_json(path)
    del found["budget"]["settings"]["rslora"]
    write_json(path, found)
    assert ready(*SHORT, "--tuned").learning_rate == best
    with pytest.raises(UserError, match=r"other settings \(rslora False -> True\)"):
        ready(*SHORT, "--rslora", "--tuned")
    made = len(trained)
    assert sweep(config, share=0.25)["best"] == best
    assert len(trained) == made


def test_a_trial_from_before_a_setting_existed_is_kept(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FACTORS", (1.0,))
    config = ready(*SHORT)
    sweep(config, share=0.25)
    folder = config.run_dir.parent / "sweep"
    trial = next(folder.glob("*/*/*/config.json"))
    write_json(trial, {k: v for k, v in read_json(trial).items() if k != "rslora"})
    (folder / "lora.json").unlink()
    weights = next(trial.parent.glob("adapter/*.safetensors"))
    before = weights.stat().st_mtime_ns
    sweep(config, share=0.25)
    assert weights.stat().st_mtime_ns == before
