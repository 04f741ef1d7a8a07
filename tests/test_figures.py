"""Figures: drawn from whatever there is, with intervals where there are any."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from test_report import Make, made_run

from kit.files import write_jsonl
from kit.report.answers import gather
from kit.report.figures import NAMES, draw, draw_lengths, errors, front, pareto, smoothed
from kit.report.rows import Row

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


def test_a_full_disk_leaves_the_figures_that_were_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "lengths.png"
    draw_lengths(STATS, path)
    before = {file: file.read_bytes() for file in tmp_path.iterdir()}

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("kit.files.os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        draw_lengths(STATS | {"max_length": 512}, path)
    assert {file: file.read_bytes() for file in tmp_path.iterdir()} == before


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
    captions = {f.name: f.caption for f in drawn}
    assert captions["training_loss"].endswith("a twentieth of the steps. Fainter: a method's further seeds.")
    assert captions["human_vs_metric"].startswith("Mean human score of the replies that were scored against ROUGE-L of all test rows")
    made = {p.name: p.read_bytes() for p in (tmp_path / "figures").iterdir()}
    assert made.keys() == {f"{f.name}.{e}" for f in drawn for e in ("png", "svg")}
    assert all(data.startswith(b"\x89PNG") if name.endswith("png") else b"<svg" in data and b"<text" not in data for name, data in made.items())


def test_nothing_is_drawn_of_nothing(tiny: Make, tmp_path: Path) -> None:
    (made_run(tiny("--method", "base"), ["a", "b"]) / "eval.json").write_text("{")
    assert draw(gather(tiny().run_dir.parent), None, None, tmp_path / "figures") == []


def finished(tiny: Make, method: str, reply: str, **costs: float) -> Path:
    """A run of four rows with other costs than made_run's."""
    return made_run(tiny("--method", method), [reply, "a", "b", "the lake"], trained=costs)


def drawn(tiny: Make, folder: Path, families: Sequence[Sequence[str]] = ()) -> tuple[dict[str, str], dict[str, Any]]:
    """Captions and Matplotlib's figures, by name."""
    canvases: dict[str, Any] = {}

    def keep(figure: Any, path: Path) -> Path:
        canvases[path.name] = figure
        return path

    with mock.patch("kit.report.figures._save", keep):
        captions = {f.name: f.caption for f in draw(gather(tiny().run_dir.parent), None, None, folder, families)}
    return captions, canvases


def dashed(axes: Any) -> list[Any]:
    return [line for line in axes.lines if line.get_linestyle() == "--"]


def test_a_figure_of_an_earlier_report_goes_and_a_foreign_file_stays(tiny: Make, tmp_path: Path) -> None:
    made_run(tiny("--method", "lora"), ["a", "b"])
    folder = tmp_path / "figures"
    folder.mkdir()
    for name in ("human_vs_metric.png", "human_vs_metric.svg", "data_lengths.png", "length.svg", "mine.png", "human_vs_metric.pdf"):
        (folder / name).write_text("of before")
    made = {f.name for f in draw(gather(tiny().run_dir.parent), None, None, folder)}
    assert made < set(NAMES)
    assert {p.name for p in folder.iterdir()} == {f"{n}.{e}" for n in made for e in ("png", "svg")} | {"mine.png", "human_vs_metric.pdf"}
    assert (folder / "length.svg").read_text() != "of before"


def test_a_front_reaches_the_edges_of_its_axes_also_with_a_single_point(tiny: Make, tmp_path: Path) -> None:
    finished(tiny, "lora", "the lake is blue", train_wall_s=30.0)
    finished(tiny, "dora", "the lake", train_wall_s=60.0)
    captions, canvases = drawn(tiny, tmp_path)
    axes = canvases["time_vs_performance"].axes[0]
    (line,) = dashed(axes)
    score = gather(tiny().run_dir.parent).rows[0]["rouge_l"]["value"]
    assert line.get_xydata().tolist() == [[30.0, axes.get_ylim()[0]], [30.0, score], [axes.get_xlim()[1], score]]
    assert captions["time_vs_performance"].endswith("of methods that no other equals or beats in both, by value, which is no verdict: LoRA.")


def test_methods_that_cannot_fairly_be_ranked_together_share_no_front(tiny: Make, tmp_path: Path) -> None:
    for method, seconds, reply in (
        ("lora", 30.0, "a"),
        ("dora", 60.0, "the lake is blue"),
        ("galore", 10.0, "the lake"),
        ("full", 20.0, "a"),
        ("hybrid", 5.0, "b"),
    ):
        finished(tiny, method, reply, train_wall_s=seconds)
    captions, canvases = drawn(tiny, tmp_path, [["lora", "dora"], ["galore", "full"], ["hybrid"]])
    lines = [line.get_xydata()[1:-1, 0].tolist() for line in dashed(canvases["time_vs_performance"].axes[0])]
    assert lines == [[30.0, 60.0], [10.0]]
    assert captions["time_vs_performance"].endswith("the Pareto fronts of what can fairly be ranked together, of methods that no other equals or beats in "
                                                    "both, by value, which is no verdict: LoRA and DoRA; GaLore.")  # fmt: skip


def test_a_point_above_the_only_front_is_not_denied(tiny: Make, tmp_path: Path) -> None:
    for method, seconds, reply in (("lora", 30.0, "a"), ("dora", 60.0, "the lake"), ("combined", 90.0, "the lake is blue")):
        finished(tiny, method, reply, train_wall_s=seconds)
    said = "The dashed line is the Pareto front{}, of methods that no other equals or beats in both, by value, which is no verdict: {}."
    captions = drawn(tiny, tmp_path, [["lora", "dora"], ["combined"]])[0]
    assert captions["time_vs_performance"].endswith(said.format(" of what can fairly be ranked together", "LoRA and DoRA"))
    captions = drawn(tiny, tmp_path, [["lora", "dora", "combined"]])[0]
    assert captions["time_vs_performance"].endswith(said.format("", "LoRA, DoRA and combined"))


def test_a_cost_that_does_not_differ_clearly_has_no_front_and_starts_at_0(tiny: Make, tmp_path: Path) -> None:
    finished(tiny, "lora", "the lake is blue", peak_memory_gib=1.009, train_wall_s=30.0)
    finished(tiny, "dora", "the lake", peak_memory_gib=1.026, train_wall_s=60.0)
    captions, canvases = drawn(tiny, tmp_path)
    axes = canvases["memory_vs_performance"].axes[0]
    assert dashed(axes) == []
    assert axes.get_xlim()[0] == 0
    assert captions["memory_vs_performance"] == (
        "ROUGE-L with 95% intervals against peak memory while training: upper left is best. The ranked methods differ in memory by less than 5%, which is no "
        "difference in what was measured once a run: no Pareto front."
    )


def test_one_method_has_no_front(tiny: Make, tmp_path: Path) -> None:
    made_run(tiny("--method", "base"), ["a", "b"])
    made_run(tiny("--method", "lora"), ["a", "b"])
    captions, canvases = drawn(tiny, tmp_path)
    assert dashed(canvases["time_vs_performance"].axes[0]) == []
    assert captions["time_vs_performance"] == "ROUGE-L with 95% intervals against training time: upper left is best. Dotted: the base model."


def test_a_run_that_is_not_ranked_is_on_no_front() -> None:
    def row(label: str, cost: float, score: float, ranked: bool = True) -> Row:
        return {"label": label, "cost": cost, "rouge_l": {"value": score}, "ranked": ranked}

    rows = [row("a", 1, 3), row("b", 2, 5), row("c", 3, 4), row("d", 1, 9, ranked=False)]
    assert [r["label"] for r in front(rows, "cost")] == ["a", "b"]


def test_the_sources_of_a_metric_share_its_scale(tiny: Make, tmp_path: Path) -> None:
    made_run(tiny("--method", "lora"), ["the lake is blue", "a", "the lake", "b"], sources=("alpaca", "tulu"))
    ends = [ax.get_xlim() for ax in drawn(tiny, tmp_path)[1]["per_source"].axes]
    assert ends[0] == ends[1]
    assert ends[2] == ends[3]


def test_the_base_models_line_runs_behind_its_number(tiny: Make, tmp_path: Path) -> None:
    for method in ("base", "lora"):
        made_run(tiny("--method", method), ["the lake is blue", "a"])
    for ax in drawn(tiny, tmp_path)[1]["bleu_rouge_comparison"].axes:
        (line,) = [line for line in ax.lines if line.get_linestyle() == ":"]
        assert all(text.get_bbox_patch() is not None and text.get_zorder() > line.get_zorder() for text in ax.texts)


@pytest.mark.parametrize("name", ["training_loss", "length"])
def test_there_are_no_halves_of_steps_and_tokens(tiny: Make, tmp_path: Path, name: str) -> None:
    folder = made_run(tiny("--method", "lora"), ["the lake " * 10, "the lake"])
    write_jsonl(folder / "log.jsonl", [{"step": i, "loss": 1.0} for i in range(1, 21)])
    figure = drawn(tiny, tmp_path)[1][name]
    figure.draw_without_rendering()
    assert all(tick == round(tick) for tick in figure.axes[0].get_xticks())


def test_a_run_that_trains_nothing_is_named_where_it_has_no_curve(tiny: Make, tmp_path: Path) -> None:
    made_run(tiny("--method", "lora"), ["a", "b"])
    assert drawn(tiny, tmp_path)[0]["training_loss"].endswith("a twentieth of the steps.")
    (made_run(tiny("--method", "combined"), ["a", "b"]) / "log.jsonl").unlink()
    assert drawn(tiny, tmp_path)[0]["training_loss"].endswith("a twentieth of the steps. Combined trains nothing and has no curve.")
