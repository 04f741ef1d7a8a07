"""Figures: drawn from whatever there is, with intervals where there are any."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_report import Make, made_run

from kit.report.answers import gather
from kit.report.figures import draw, errors, pareto, smoothed

STATS = {"max_length": 256, "splits": {"train": {"tokens_by_source": {"alpaca": {f"p{q}": q for q in (5, 25, 50, 75, 95)}}}}}


def test_an_interval_reaches_from_its_value_and_a_missing_one_does_not() -> None:
    assert errors({"value": 5.0, "low": 3.0, "high": 6.0}) == [[2.0], [1.0]]
    for found in ({"value": 5.0, "low": None, "high": None}, {"value": 5.0}, {"value": 5.0, "low": 5.1, "high": 5.0}):
        assert errors(found) == [[0.0], [0.0]]


def test_the_front_holds_what_no_other_point_beats() -> None:
    assert pareto([(2, 5.0), (1, 3.0), (3, 4.0), (1, 2.0), (4, 9.0), (2, 5.0)]) == [(1, 3.0), (2, 5.0), (4, 9.0)]


def test_a_curve_is_smoothed_by_what_came_before() -> None:
    assert smoothed([4.0, 2.0, 6.0], share=0.6) == pytest.approx([4.0, 3.0, 4.0])
    assert smoothed([5.0]) == [5.0]


def test_what_is_there_is_drawn(tiny: Make, tmp_path: Path) -> None:
    """Scores without intervals, a run without costs, another without a log; a failed one; a source whose name no font has."""
    sources = ("alpaca", "数据")
    made_run(tiny("--method", "base"), ["a", "b"], sources=sources)
    for seed in ("0", "1"):
        made_run(tiny("--method", "lora", "--seed", seed), ["the lake", "a"], sources=sources)
    (made_run(tiny("--method", "dora"), ["a", "b"], sources=sources) / "train.json").unlink()
    (made_run(tiny("--method", "qlora"), ["a", "b"], sources=sources) / "log.jsonl").write_text("{")
    results = gather(tiny().run_dir.parent)
    rated = {"criteria": {"overall": {"runs": {"lora-s0": {"value": 4.0, "low": 3.0, "high": 5.0}, "gone": {"value": 1.0, "low": None, "high": None}}}}}
    drawn = draw(results, rated, STATS, tmp_path / "figures")
    assert [f.name for f in drawn] == ["bleu_rouge_comparison", "memory_vs_performance", "time_vs_performance", "training_loss", "per_source", "length",
                                       "human_vs_metric", "data_lengths"]  # fmt: skip
    made = {p.name: p.read_bytes() for p in (tmp_path / "figures").iterdir()}
    assert made.keys() == {f"{f.name}.{e}" for f in drawn for e in ("png", "svg")}
    assert all(data.startswith(b"\x89PNG") if name.endswith("png") else b"<svg" in data and b"<text" not in data for name, data in made.items())


def test_nothing_is_drawn_of_nothing(tiny: Make, tmp_path: Path) -> None:
    (made_run(tiny("--method", "base"), ["a", "b"]) / "eval.json").write_text("{")
    assert draw(gather(tiny().run_dir.parent), None, None, tmp_path / "figures") == []
