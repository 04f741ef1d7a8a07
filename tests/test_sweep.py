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
SHORT = ("--method", "lora", "--limit-train", "256")


def test_a_sweep_keeps_its_curve_and_gives_the_best_rate(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FACTORS", (0.001, 1.0, 1e30))
    found = sweep(tiny(*SHORT, "--max-grad-norm", "1e30"), share=0.25)
    assert [c["learning_rate"] for c in found["curve"]] == [2e-6, 2e-3, 2e27]
    low, good, diverged = (c["valid_perplexity"] for c in found["curve"])
    assert good < low
    assert diverged is None
    assert found["best"] == 2e-3
    assert found["budget"]["rows"] == 64
    config = tiny(*SHORT, "--tuned")
    assert config.learning_rate == 2e-3
    assert read_json(config.run_dir.parent / "sweep" / "lora.json") == found
    # Test rows were not opened, and the runs lie apart from those that are compared.
    assert not config.run_dir.exists()


def test_a_sweep_needs_validation_rows_and_something_to_tune(tiny: Make) -> None:
    with pytest.raises(UserError, match="judged on validation rows"):
        sweep(tiny(*SHORT, "--valid", "0"), share=0.2)
    with pytest.raises(UserError, match="it has no learning rate"):
        sweep(tiny("--method", "base"), share=0.2)
