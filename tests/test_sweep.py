"""The sweep: the same budget for each rate, judged on validation rows, the curve kept and the best rate used when asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kit import sweep as module
from kit.config import RunConfig
from kit.errors import UserError
from kit.files import read_json
from kit.sweep import sweep

Make = Callable[..., RunConfig]
SHORT = ("--method", "lora", "--limit-train", "256", "--valid-per-source", "8")


def test_a_sweep_keeps_its_curve_and_gives_the_best_rate(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FACTORS", (0.001, 1.0, 1e30))
    found = sweep(ready(*SHORT, "--max-grad-norm", "1e30"), share=0.25)
    assert [c["learning_rate"] for c in found["curve"]] == [8e-6, 8e-3, 8e27]
    low, good, diverged = (c["valid_perplexity"] for c in found["curve"])
    assert good < low
    assert diverged is None
    assert found["best"] == 8e-3
    assert found["budget"]["rows"] == 64
    config = ready(*SHORT, "--tuned")
    assert config.learning_rate == 8e-3
    assert read_json(config.run_dir.parent / "sweep" / "lora.json") == found
    # Test rows were not opened, and the runs lie apart from those that are compared.
    assert not config.run_dir.exists()


def test_a_best_rate_at_the_end_is_said_and_other_settings_are_swept_anew(
    ready: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[tuple[float, int]] = []

    def train(trial: RunConfig) -> dict[str, float]:
        trained.append((trial.learning_rate, trial.rank))
        return {"valid_perplexity": 1 / trial.learning_rate, "train_wall_s": 1.0}

    monkeypatch.setattr("kit.training.train", train)
    monkeypatch.setattr(module, "FACTORS", (0.5, 1.0, 2.0))
    for flags in ((), (), ("--rank", "8"), ("--learning-rate", "1.6e-2")):
        sweep(ready(*SHORT, *flags), share=0.25)
    assert trained == [(4e-3, 16), (8e-3, 16), (1.6e-2, 16), (4e-3, 8), (8e-3, 8), (1.6e-2, 8), (8e-3, 16), (1.6e-2, 16), (3.2e-2, 16)]
    said = capsys.readouterr().out
    assert "a larger one may be better; sweep around it with --learning-rate 0.016" in said.replace("\n", " ")
    assert said.count("is there already") == 1


def test_a_sweep_needs_validation_rows_and_something_to_tune(ready: Make) -> None:
    with pytest.raises(UserError, match="judged on validation rows"):
        sweep(ready(*SHORT, "--valid", "0"), share=0.2)
    with pytest.raises(UserError, match="it has no learning rate"):
        sweep(ready("--method", "base"), share=0.2)
