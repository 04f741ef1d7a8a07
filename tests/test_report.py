"""The report: rows from files alone, means over seeds, partial and damaged runs have their place, foreign text stays text."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, in_process, places

from kit.config import RunConfig
from kit.console import console
from kit.errors import UserError
from kit.files import read_json, sha256, write_json, write_jsonl
from kit.metrics import scores_by_source
from kit.report import about, answers, content, markdown, tables, write
from kit.report.answers import CHANGED, gather
from kit.report.blocks import Heading
from kit.report.content import document
from kit.report.rows import Row, blank, cell, collect, duration, interval, number
from kit.report.verdicts import verdicts
from kit.runs import open_run

Make = Callable[..., RunConfig]
HOSTILE = "</td><script>alert(1)</script> | `` ``` [bold]x[/bold]"
FORGOT = {"text": "general", "sha256": "x", "tokens": 9, "perplexity": {"value": 20.0, "low": 19.0, "high": 21.0}, "kl": None}
PROVENANCE = {"data": "h", "gpu": None, "gpu_absent_because": "none", "cpu": "c", "versions": {"python": "3"}}


def made_run(config: RunConfig, predictions: list[str], *, data: str = "h", sources: tuple[str, ...] = ("alpaca",), trained: dict[str, Any] | None = None,
             **more: Any) -> Path:  # fmt: skip
    """A finished run; `trained` goes into train.json, `more` into eval.json."""
    folder = open_run(config)
    rows = [
        {"id": f"{sources[i % len(sources)]}-{i:03d}", "source": sources[i % len(sources)], "prompt": HOSTILE, "reference": "the lake is blue",
         "prediction": p, "reply_tokens": 3, "finished": True, "nll": 2.0, "nll_tokens": 4}
        for i, p in enumerate(predictions)
    ]  # fmt: skip
    write_jsonl(folder / "predictions.jsonl", rows)
    digest = sha256(folder / "predictions.jsonl")
    generation = {"empty": 0, "unfinished": 0, "mean_reply_tokens": 3.0, "wall_s": 1.0, "peak_memory_gib": 1.0}
    precision = {"name": "float32", "reason": "r"}
    provenance = PROVENANCE | {"data": data}
    write_json(folder / "eval.json", {**scores_by_source(rows), "generation": generation, "precision": precision, "provenance": provenance,
                                      "predictions_sha256": digest, **more})  # fmt: skip
    if config.method != "base":
        write_json(folder / "train.json", {"status": "done", "train_wall_s": 65.0, "peak_memory_gib": 1.5, "tokens_per_s": 2000.0,
                                           "trainable_params": 123456, "tokens_supervised": 1000, "adapter_mib": 1.25, "provenance": provenance}
                   | (trained or {}))  # fmt: skip
        write_jsonl(folder / "log.jsonl", [{"step": i, "loss": 3.0 / i} for i in range(1, 20)])
    return folder


def build(config: RunConfig) -> tuple[list[Row], list[str], str]:
    """Rows, notes and Markdown, without figures and the other formats."""
    given = write.inputs(config)
    return given.results.every, list(given.notes), markdown.render("", document(given))


def test_all_files_come_from_one_set_of_rows(tiny: Make) -> None:
    made_run(tiny("--method", "base"), ["a lake"] * 3)
    made_run(tiny("--method", "lora"), ["the lake is blue"] * 3)
    results, notes, _ = write.build(tiny())
    out = Path(tiny().report_dir)
    text = (out / "report.md").read_text(encoding="utf-8")
    assert [r["method"] for r in results.rows] == ["base", "lora"]
    assert notes == []
    summary = json.loads((out / "summary.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} in summary.json"))
    assert (summary["schema"], summary["recipe"], len(summary["rows"]), len(summary["verdicts"])) == (1, "tiny", 2, 3)
    table = list(csv.DictReader(io.StringIO((out / "comparison_table.csv").read_text())))
    assert float(table[1]["bleu4"]) == summary["rows"][1]["bleu4"]["value"] == pytest.approx(100)
    assert float(table[1]["length_ratio"]) == 1
    assert table[0]["adapter_mib"] == ""
    assert "| LoRA | **0.00 → 100.00** ★ |" in text
    names = {"bleu_rouge_comparison", "memory_vs_performance", "time_vs_performance", "training_loss", "length"}
    assert {p.name for p in (out / "figures").iterdir()} == {f"{n}.{e}" for n in names for e in ("png", "svg")}
    assert {p.name for p in out.iterdir()} == {"report.md", "report.html", "report.pdf", "comparison_table.csv", "summary.json", "figures"}


@pytest.mark.parametrize(("memory", "first"), [((2.0, 2.05), "time"), ((2.0, 3.0), "memory"), ((2.0, None), "memory")])
def test_the_first_figure_shows_a_cost_that_differs(memory: tuple[float | None, ...], first: str) -> None:
    rows = [blank(m, 0) | {"ranked": True, "peak_memory_gib": gib} for m, gib in zip(("lora", "dora"), memory, strict=True)]
    assert content._foremost(rows) == f"{first}_vs_performance"


def test_a_report_of_others_is_left_alone_and_another_experiments_is_named(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tiny("--method", "lora"), ["a"] * 4)
    out = Path(tiny().report_dir)
    out.mkdir(parents=True)
    (out / "report.md").write_text("my thesis")
    with pytest.raises(UserError, match=r"holds report\.md and no summary\.json: it is none of the kit's reports"):
        write.own_folder(out, "tiny")
    write_json(out / "summary.json", {"rows": [{"run": "runs/other/base"}, {"run": None}]})
    write.own_folder(out, "tiny")
    assert "held the report of other, which this one replaces" in capsys.readouterr().out
    write.own_folder(out, "other")
    assert capsys.readouterr().out == ""


def test_settings_are_those_of_the_methods_that_use_them(tiny: Make) -> None:
    for method in ("lora", "galore", "full"):
        made_run(tiny("--method", method), ["a"] * 4)
    text = build(tiny())[2]
    text = text[text.index("## Settings") :]
    assert "| rank | 16 | 48 | — |" in text
    assert "| learning_rate | 0.008 | 0.032 | 0.0032 |" in text
    assert "| train_embeddings | — | False | True |" in text
    shared = " ".join(text[text.index("The same for all") : text.index("## How")].split())
    assert "; alpha 16; " in shared  # LoRA's alone
    assert "; projection_scale 0.25; " in shared  # GaLore's alone
    assert "dora_kernel" not in text  # nobody's


def test_the_report_says_what_the_runs_used_and_not_what_its_own_flags_say(tiny: Make) -> None:
    from kit.dataset import prepare

    small = ("--train-per-source", "10", "--test-per-source", "5")
    prepare(tiny(*small))
    made_from = sha256(tiny().data_path / "manifest.json")
    made_run(tiny("--method", "lora", *small, "--limit-test", "3"), ["a lake"] * 3, data=made_from, trained={"rows_left_out": 6})
    text = build(tiny())[2]
    assert (
        "These runs used only the first 3 test rows. Training takes whole effective batches: of the training rows 6 fill none and are left out of an epoch."
        in text
    )
    assert "At 256 tokens a row, train: 30 whole. valid: 120 whole. test: 15 whole." in text
    wanted = "make compare RECIPE=tiny METHODS=\"lora\" ARGS='--train-per-source 10 --test-per-source 5 --limit-test 3'"
    assert wanted in text


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ((), "Recipe: The built-in model and data, offline, on the CPU."),
        (("--forgetting-text", "none"), "Recipe: The built-in model and data"),
        (
            ("--limit-train", "96", "--limit-test", "6000"),
            "These runs are a trial of recipe tiny, on the built-in model with 96 training rows and 600 test rows, computed in float32. The recipe "
            "itself: The built-in model and data, offline, on the CPU.",
        ),
        (
            ("--recipe", "t4-lora-dora", "--scale-down"),
            "These runs are a trial of recipe t4-lora-dora, on the built-in model with 1,800 training rows and 600 test rows, computed in float32. The set-up "
            "itself, as published: LoRA against DoRA on a T4 without quantisation",
        ),
        (
            ("--recipe", "t4", "--precision", "float32"),
            "These runs change the recipe by the flags under How to reproduce. The recipe itself: google/gemma-3-1b-it on",
        ),
    ],
)
def test_a_recipe_is_quoted_as_what_these_runs_are_of_it(tiny: Make, flags: tuple[str, ...], said: str) -> None:
    for method in ("base", "lora"):
        made_run(tiny(*flags, "--method", method, "--name", "tiny"), ["a lake"] * 3)
    assert said in build(tiny())[2]


def test_scores_of_a_run_that_is_not_trained_to_its_end_are_no_result(tiny: Make) -> None:
    for method in ("lora", "dora", "qlora"):
        made_run(tiny("--method", method), ["the lake is blue"] * 3)
    write_json(tiny("--method", "lora").run_dir / "train.json", {"status": "cancelled", "reason": "KeyboardInterrupt: stopped"})
    (tiny("--method", "dora").run_dir / "train.json").unlink()
    rows, notes, _ = build(tiny())
    assert {r["method"]: (r["status"], r["ranked"]) for r in rows} == {"qlora": ("done", True), "lora": ("cancelled", False), "dora": ("damaged", False)}
    assert "LoRA: KeyboardInterrupt: stopped" in notes
    assert "DoRA: it has scores but no train.json, so that nobody knows what was trained; train it again" in notes


def test_a_report_on_tuned_rates_needs_no_sweep_of_the_default_method(tiny: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after `make compare METHODS=lora ARGS=--tuned`, with a sweep of lora alone."""
    made_run(tiny("--method", "lora"), ["the lake is blue"] * 3)
    monkeypatch.setattr("kit.report.write.draw", lambda *_: [])
    assert in_process([ROOT / "scripts" / "report.py", "--recipe", "tiny", *places(tmp_path), "--tuned"]) == 0
    assert (tmp_path / "report" / "report.md").exists()


def test_the_learning_rates_that_were_tried_are_shown_and_damaged_sweeps_named(tiny: Make) -> None:
    folder = made_run(tiny("--method", "lora"), ["the lake is blue"] * 3).parent / "sweep"
    assert "Learning rates tried" not in build(tiny())[2]
    curve = [{"learning_rate": rate, "valid_perplexity": p, "train_wall_s": 1.0} for rate, p in ((4e-3, 2.5), (8e-3, 1.75), (1.6e-2, None))]
    found = {"schema": 1, "method": "lora", "budget": {"rows": 1360, "settings": {}}, "curve": curve, "best": 8e-3}
    write_json(folder / "lora.json", found)
    write_json(folder / "qlora.json", found | {"method": "qlora", "curve": [], "best": 8e-3})
    write_json(folder / "dora.json", found | {"method": "dora", "best": None})
    write_json(folder / "full.json", found | {"method": "full", "curve": [curve[0] | {"valid_perplexity": "low"}]})
    (folder / "apollo.json").write_text("{")
    _, notes, text = build(tiny())
    assert [line for line in text.splitlines() if line.startswith("| LoRA |") and "1,360" in line] == [
        "| LoRA |  | 0.004 | 2.500 | 1,360 |",
        "| LoRA | yes | 0.008 | 1.750 | 1,360 |",
        "| LoRA |  | 0.016 | — | 1,360 |",
    ]
    assert text.index("## Learning rates tried") < text.index("## Settings")
    assert [n for n in notes if "sweep" in n] == [
        f"{folder / 'dora.json'}, best is missing",
        next(n for n in notes if n.startswith(f"{folder / 'apollo.json'}: cannot be read")),
        f"{folder / 'full.json'}, curve, item 0, valid_perplexity is 'low'",
    ]


def test_the_commands_to_reproduce_name_the_general_text(tiny: Make) -> None:
    from kit.forgetting import HUB

    for seed, text in enumerate(("builtin", HUB["wikitext"].name, "my notes.txt")):
        made_run(tiny("--method", "lora", "--seed", str(seed)), ["a lake"] * 3, forgetting=FORGOT | {"text": text})
    lines = [line for line in build(tiny())[2].splitlines() if line.startswith("make compare RECIPE")]
    assert lines == [
        'make compare RECIPE=tiny METHODS="lora"',
        'make compare RECIPE=tiny METHODS="lora" SEEDS="1" ARGS=\'--forgetting-text wikitext\'',
        "make compare RECIPE=tiny METHODS=\"lora\" SEEDS=\"2\" ARGS='--forgetting-text '\"'\"'my notes.txt'\"'\"''",
    ]


def test_the_commands_to_reproduce_need_no_sweep(tiny: Make) -> None:
    """A best rate that is the method's usual one stands there too: without a rate --tuned asks for the sweep's file."""
    usual = tiny("--method", "lora").learning_rate
    made_run(tiny("--method", "lora", "--tuned", "--learning-rate", str(usual)), ["a lake"] * 3)
    lines = [line for line in build(tiny())[2].splitlines() if line.startswith("make compare RECIPE")]
    assert lines == [f"make compare RECIPE=tiny METHODS=\"lora\" ARGS='--learning-rate {usual} --tuned'"]


def test_the_same_runs_give_the_same_bytes(tiny: Make) -> None:
    made_run(tiny("--method", "base"), ["a"] * 3)
    made_run(tiny("--method", "qlora"), ["the lake"] * 3)
    write.build(tiny())
    files = [p for p in Path(tiny().report_dir).rglob("*") if p.is_file()]
    before = {p: p.read_bytes() for p in files}
    write.build(tiny())
    assert len(files) == 15
    assert {p: p.read_bytes() for p in files} == before


def test_seeds_get_a_mean_row_over_seeds_and_examples(tiny: Make) -> None:
    def forgot(value: float) -> dict[str, Any]:
        before, after = ({"value": v, "low": v - 1, "high": v + 1} for v in (20.0, value))
        return {"text": "general", "sha256": "x", "tokens": 100, "perplexity_before": before, "perplexity": after, "kl": after}

    made_run(tiny("--method", "lora"), ["the lake is blue", "a", "b", "c"] * 5, forgetting=forgot(22.0))
    made_run(tiny("--method", "lora", "--seed", "1"), ["the lake is blue", "the lake is blue", "b", "c"] * 5, forgetting=forgot(26.0))
    made_run(tiny("--method", "dora"), ["a"] * 20)
    results = gather(tiny().run_dir.parent)
    assert [r["label"] for r in results.every] == ["LoRA (2 seeds)", "LoRA (seed 0)", "LoRA (seed 1)", "DoRA"]
    assert [r["label"] for r in results.shown] == ["LoRA (2 seeds)", "DoRA"]
    mean, first, second = results.every[:3]
    assert mean["seed"] == "mean"
    assert mean["rouge_l"]["value"] == pytest.approx((first["rouge_l"]["value"] + second["rouge_l"]["value"]) / 2)
    assert (mean["rouge_l"]["seeds"], mean["rouge_l"]["over"]) == (2, "seeds and examples")
    assert mean["rouge_l"]["high"] - mean["rouge_l"]["low"] > first["rouge_l"]["high"] - first["rouge_l"]["low"]
    assert mean["exact_match"] == {"value": pytest.approx(37.5), "low": None, "high": None}
    assert (mean["train_wall_s"], mean["ranges"]["train_wall_s"]) == (65, (65, 65))
    assert (mean["generation"]["unfinished"], mean["generation"]["mean_reply_tokens"]) == (0, 3)
    assert "On general text (general) perplexity went from 20.00 to 23.92 with LoRA (2 seeds)." in build(tiny())[2]
    summary = write.summary(write.inputs(tiny()))
    assert [r["seed"] for r in summary["rows"]] == ["mean", 0, 1, 0]


def test_a_mean_over_seeds_is_of_them_all_or_not_given(tiny: Make) -> None:
    unsound = {"peak_memory_gib": None, "gates": {"moved": {"passed": False, "detail": "none"}}}
    made_run(tiny("--method", "lora"), ["the lake"] * 3, forgetting=FORGOT)
    made_run(tiny("--method", "lora", "--seed", "1"), ["a"] * 3, forgetting=FORGOT | {"sha256": "y"}, trained=unsound)
    (mean,) = gather(tiny().run_dir.parent).means
    assert (mean["train_wall_s"], mean["peak_memory_gib"], mean["forgetting"]) == (65, None, None)
    assert (mean["ranked"], mean["reason"]) == (False, "not ranked; moved: none")


def test_many_replies_are_read_by_several_processes_alike(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in ("0", "1"):
        made_run(tiny("--method", "lora", "--seed", seed), ["the lake", "a", seed] * 4)
    alone = gather(tiny().run_dir.parent)
    monkeypatch.setattr(answers, "MANY", 0)
    monkeypatch.setattr(answers.os, "sched_getaffinity", lambda _: {0, 1})
    assert gather(tiny().run_dir.parent).every == alone.every


def test_unfinished_failed_and_damaged_runs_have_rows_with_reasons(tiny: Make) -> None:
    made_run(tiny("--method", "base"), ["a"] * 2)
    open_run(tiny("--method", "lora"))
    write_json(open_run(tiny("--method", "dora")) / "train.json", {"status": "oom", "reason": "out of memory"})
    (made_run(tiny("--method", "qlora"), ["b"] * 2) / "eval.json").write_text("{")
    write_json(open_run(tiny("--method", "qdora")) / "train.json", {"status": "done"})
    running = open_run(tiny("--method", "highrank"))
    write_jsonl(running / "log.jsonl", [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}])
    half = open_run(tiny("--method", "galore"))
    write_json(half / "train.json", {"status": "done"})
    write_jsonl(half / "predictions.jsonl", [{"id": "alpaca-0"}])
    (half.parent / "full-s0").mkdir()
    rows, notes, text = build(tiny())
    assert {r["method"]: r["status"] for r in rows} == {
        "base": "done", "qlora": "damaged", "lora": "missing", "dora": "oom", "qdora": "trained", "highrank": "running", "galore": "running", "full": "damaged",
    }  # fmt: skip
    assert len(notes) == 7
    assert "high-rank LoRA: training is running or was stopped after 2 steps; the same command goes on from the last checkpoint" in notes
    assert "GaLore: evaluation is running or was stopped after 1 replies" in notes
    assert "| DoRA: oom | — | — |" in text


@pytest.mark.parametrize(
    ("name", "change", "status", "reason"),
    [
        ("config", {"rank": [16]}, "damaged", "config.json, rank is [16]"),
        ("eval", {"all": {"bleu4": {"value": "high"}}}, "damaged", "eval.json, all, bleu4, value is 'high'"),
        ("eval", {"per_source": None}, "damaged", "eval.json, per_source is not an object"),
        ("train", {"peak_memory_gib": True}, "damaged", "train.json, peak_memory_gib is True"),
        ("samples", {"samples": {}}, "done", "samples.json, samples is not a list"),
        ("tasks", {"tasks": {"quiz": {"acc": {"value": []}}}}, "done", "tasks.json, tasks, quiz, acc, value is []"),
    ],
)
def test_a_file_of_another_shape_is_told_by_name(tiny: Make, name: str, change: dict[str, Any], status: str, reason: str) -> None:
    made_run(tiny("--method", "base"), ["a"] * 4)
    path = made_run(tiny("--method", "lora"), ["b"] * 4) / f"{name}.json"
    write_json(path, (read_json(path) if path.exists() else {}) | change)
    rows, notes, _ = build(tiny())
    assert [r["status"] for r in rows] == ["done", status]
    assert len(notes) == 1
    assert reason in notes[0]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda p: p.write_text(p.read_text().replace("a hill", "the lake")), CHANGED),
        (lambda p: p.unlink(), "predictions.jsonl cannot be used"),
    ],
)
def test_predictions_that_were_not_scored_are_not_ranked(tiny: Make, damage: Callable[[Path], None], reason: str) -> None:
    made_run(tiny("--method", "base"), ["a"] * 20)
    made_run(tiny("--method", "lora"), ["the lake is blue"] * 20)
    damage(made_run(tiny("--method", "qlora"), ["a hill"] * 20) / "predictions.jsonl")
    given = write.inputs(tiny())
    results, notes, found = given.results, given.notes, given.found
    row = next(r for r in results.rows if r["method"] == "qlora")
    assert not row["ranked"]
    assert row["reason"].startswith(reason)
    assert any(reason in note for note in notes)
    assert {(v["a"], v["b"]) for v in found} == {("base", "lora")}


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"id": "alpaca-0", "pred', "not valid JSON"),
        ('{"id": "alpaca-000", "source": "alpaca"}', "has no prompt, reference, prediction, nll, nll_tokens"),
        ('{"id": "x", "source": "s", "prompt": "", "reference": "", "prediction": 7, "nll": 1, "nll_tokens": 1}', "cannot be used"),
        ('{"id": "x", "source": "s", "prompt": "", "reference": "", "prediction": "", "nll": NaN, "nll_tokens": 1}', "Perplexity of a row is not finite"),
    ],
)
def test_damaged_predictions_cost_their_own_run_alone(tiny: Make, line: str, reason: str) -> None:
    made_run(tiny("--method", "qlora"), ["a", "b"] * 10)
    made_run(tiny("--method", "dora"), ["a", "c"] * 10)
    (made_run(tiny("--method", "lora"), ["b"] * 20, predictions_sha256=None) / "predictions.jsonl").write_text(line + "\n")
    given = write.inputs(tiny())
    assert any(reason in note for note in given.notes), given.notes
    assert {(v["a"], v["b"]) for v in given.found} == {("qlora", "dora")}
    json.dumps(write.summary(given), allow_nan=False)


def test_scores_without_intervals_are_drawn_and_told(tiny: Make) -> None:
    """As with --limit 3 over three sources: no source has two rows, so no score has an interval."""
    sources = ("alpaca", "tulu", "ultrachat")
    made_run(tiny("--method", "base"), ["a"] * 3, sources=sources)
    folder = made_run(tiny("--method", "lora"), ["the lake is blue"] * 3, sources=sources)
    assert read_json(folder / "eval.json")["all"]["bleu4"]["low"] is None
    _, notes, text = build(tiny())
    assert notes == ["no verdicts: 3 test rows are too few for a comparison; it takes at least 2 rows of a source"]
    assert "| LoRA | all | 100.00 | 100.00 |" in text


def test_what_an_evaluation_adds_is_shown(tiny: Make) -> None:
    """Forgetting, leaks, fixed prompts and outside tasks; runs without them are as before."""
    made_run(tiny("--method", "base"), ["a"] * 4, forgetting=FORGOT)
    without = {m: {"value": 7.0, "low": 6.0, "high": 8.0, "n": 2} for m in ("bleu4", "rouge_l", "perplexity")}
    after = {"perplexity": {"value": 25.0, "low": 24.0, "high": 26.0}, "kl": {"value": 0.31, "low": 0.3, "high": 0.32}}
    tuned = FORGOT | {"perplexity_before": FORGOT["perplexity"]} | after
    folder = made_run(tiny("--method", "lora"), ["b"] * 4, forgetting=tuned, leaks={"flagged": 2, "without": without})
    write_json(folder / "samples.json", {"samples": [{"prompt": "Explain rain.", "prediction": HOSTILE, "finished": True}]})
    write_json(folder / "tasks.json", {"tasks": {"quiz": {"acc": {"value": 0.5, "stderr": None}}}, "limit": 10, "versions": {}})
    (made_run(tiny("--method", "dora"), ["b"] * 4) / "samples.json").write_text("[")
    text, notes = build(tiny())[2], build(tiny())[1]
    for shown in ("| LoRA | 20.00 \\[19.00, 21.00\\] | 25.00 \\[24.00, 26.00\\] | 0.31 \\[0.30, 0.32\\] |", "| LoRA | 2 |", "| LoRA | 0.500 |",
                  "with 95% bootstrap intervals over the pieces in which the text was read",
                  "Explain rain.", "the first 10 rows of each task", "(general) perplexity went from 20.00 to 25.00 with LoRA"):  # fmt: skip
        assert shown in text, shown
    assert len(notes) == 2
    assert "samples.json is left out" in notes[0]
    assert notes[1].startswith("50% of the test rows resemble training rows")


@pytest.mark.parametrize(
    ("shares", "said"),
    [
        ({}, "How much of it the training rows hold was not checked."),
        ({"lora": 0.0004, "base": 0.9}, "Of its sequences of 8 words 0.04% occur in the training rows."),
        (
            {"lora": 1.0, "dora": 0.002},
            "Of its sequences of 8 words 0.2% to 100%, by run, occur in the training rows: tuning saw part",
        ),
    ],
)
def test_a_general_text_is_said_to_be_apart_only_as_far_as_that_was_checked(tiny: Make, shares: dict[str, float], said: str) -> None:
    for method in ("base", "lora", "dora"):
        made_run(tiny("--method", method), ["a"] * 2, forgetting=FORGOT | ({"overlap": shares[method]} if method in shares else {}))
    text = build(tiny())[2]
    assert "On 9 tokens of general text (general, SHA-256 x): perplexity before and after" in text
    assert said in text


@pytest.mark.parametrize(("tokens", "named"), [({"lora": "13a"}, "13a"), ({"lora": "zh", "dora": "13a"}, "zh/13a")])
def test_lengths_say_whose_tokens_they_count(tiny: Make, tokens: dict[str, str], named: str) -> None:
    for method, by in tokens.items():
        made_run(tiny("--method", method), ["a"] * 4, score_tokens=by)
    assert f"| run | empty | unfinished | the model's tokens a reply | times the reference's length ({named} tokens) |" in build(tiny())[2]


def test_human_scores_are_shown_with_their_agreement(tiny: Make) -> None:
    from kit.rating.deck import deck, items
    from kit.rating.ledger import CRITERIA, open_ledger

    made_run(tiny("--method", "base"), ["a", "b", "c", "d"] * 2)
    made_run(tiny("--method", "lora"), ["the lake is blue", "the lake", "b", "c"] * 2)
    folder = tiny().run_dir.parent
    for rater in ("anna", "ben"):
        with open_ledger(folder, rater, CRITERIA) as ledger:
            for card in deck(items(folder), rater, limit=100, seed=0):
                ledger.add(card, dict.fromkeys(CRITERIA, 4 if "lake" in card.reply else 1))
    text = build(tiny())[2]
    assert "by anna and ben, blind" in text
    assert re.search(r"\| LoRA \| 2\.50 \\\[", text)
    human = answers.human(folder, gather(folder))["criteria"]["fluency"]["correlation"]
    assert human["BLEU-4"] == human["ROUGE-L"]  # two words are too few for 4-grams and yet not nothing
    assert "fluency, weighted kappa of anna, ben: 1.00" in text
    assert "Spearman's rank correlation with ROUGE-L: " in text
    assert "counts by its square (quadratic weights)" in text
    (folder / "ratings" / "anna.jsonl").write_text("7\n")
    assert any("not a rating" in note for note in build(tiny())[1])


def test_a_format_that_fails_costs_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kit.report import pdf

    (tmp_path / "report.pdf").write_text("of an earlier report")
    monkeypatch.setattr(pdf, "render", lambda *_: 1 / 0)
    assert write.render("t", [Heading("h")], tmp_path) == ["report.pdf could not be made (ZeroDivisionError: division by zero)"]
    assert {p.name for p in tmp_path.iterdir()} == {"report.md", "report.html"}


def test_a_maximum_length_that_cuts_much_is_told() -> None:
    def found(**fits: int) -> list[str]:
        return write._cut({"truncated": {"train": {"whole": 9}, "test": fits}, "inputs": {"max_length": 1024}})

    assert found(whole=70, prompt_cut=20, turns_dropped=10) == [
        "30% of the test rows are longer than the maximum length of 1,024 tokens: prompts lost turns or text, or references their end"
    ]
    assert found(whole=80, prompt_cut=20) == []
    assert found(prompt_cut=3)[0].startswith("100% of")
    assert write._cut(None) == []


def test_runs_on_different_data_are_pointed_out(tiny: Make) -> None:
    made_run(tiny("--method", "base"), ["a"] * 4)
    made_run(tiny("--method", "lora"), ["a"] * 4, data="other")
    assert build(tiny())[1] == ["the runs were made on different data; their scores cannot be compared"]


def test_foreign_text_stays_text(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tiny("--method", "base"), [HOSTILE, "b"])
    rows, _, text = build(tiny())
    outside = "".join(part for i, part in enumerate(text.split("````")) if i % 2 == 0)
    assert HOSTILE in text
    assert "<script>" not in outside
    tables.comparison_table(rows, [], "[red]title")
    assert "[red]title" in capsys.readouterr().out


def test_the_console_cuts_nothing_off(tiny: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    sources, methods = ("alpaca", "tulu", "ultrachat"), ("qlora", "highrank", "galore", "full")
    made_run(tiny("--method", "base"), ["a"] * 12, sources=sources)
    for method in methods:
        made_run(tiny("--method", method), ["the lake is blue"] * 12, sources=sources)
    results = gather(tiny().run_dir.parent)
    found = verdicts(results)[0]
    for width in (50, 80, 120, 200):
        monkeypatch.setattr(console, "width", width)
        tables.comparison_table(results.shown, found, "Comparison")
        tables.source_table(results.shown)
        tables.verdict_table(found)
        shown = capsys.readouterr().out
        assert max(map(len, shown.splitlines())) <= width
        assert "…" not in shown
        assert [shown.count(x) for x in ("0.00 → 100.00", "123,456", "100.00 / 100.00", "++?")] == [8, 4, 12, 4]  # 12 rows are too few to be equal


def test_a_star_stands_where_the_verdicts_support_it(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tiny("--method", "base"), ["a hill"] * 40)
    made_run(tiny("--method", "lora"), ["the lake is blue"] * 40)
    results = gather(tiny().run_dir.parent)
    tables.comparison_table(results.shown, verdicts(results)[0], "")
    assert capsys.readouterr().out.count("★ 0.00 → 100.00") == 2
    made_run(tiny("--method", "dora"), ["the lake is blue"] * 40)
    results = gather(tiny().run_dir.parent)
    tables.comparison_table(results.shown, verdicts(results)[0], "")
    assert "★" not in capsys.readouterr().out


def test_no_runs_is_an_error(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    """And replaces no other experiment's report, nor says so."""
    with pytest.raises(UserError, match="no runs in"):
        collect(Path(tiny().runs_dir))
    write_json(Path(tiny().report_dir) / "summary.json", {"rows": [{"run": "runs/other/base"}]})
    with pytest.raises(UserError, match="no runs in"):
        write.build(tiny())
    assert capsys.readouterr().out == ""


def test_seeds_are_told_apart(tiny: Make) -> None:
    made_run(tiny("--method", "lora"), ["a"] * 2)
    assert [cell("label", r, None) for r in collect(Path(tiny().runs_dir) / "tiny")] == ["LoRA"]
    made_run(tiny("--method", "lora", "--seed", "1"), ["a"] * 2)
    made_run(tiny("--method", "dora", "--seed", "1"), ["a"] * 2)
    assert [cell("label", r, None) for r in collect(Path(tiny().runs_dir) / "tiny")] == ["LoRA (seed 0)", "LoRA (seed 1)", "DoRA (seed 1)"]
    for seed in ("10", "2"):
        made_run(tiny("--method", "dora", "--seed", seed), ["a"] * 2)
    assert [r["seed"] for r in collect(Path(tiny().runs_dir) / "tiny")] == [0, 1, 1, 2, 10]


def test_numbers_read_well() -> None:
    assert [duration(s) for s in (None, 0.42, 9.97, 42.4, 59.7, 125, 4320)] == ["—", "0.4 s", "10 s", "42 s", "1 min 00 s", "2 min 05 s", "1 h 12 min"]
    assert (number(None, 2), number(1234.5, 1, " GiB")) == ("—", "1,234.5 GiB")
    before, after = ({"bleu4": {"value": value}} for value in (1.0, 2.0))
    assert (cell("bleu4", before, before), cell("bleu4", after, before), cell("bleu4", after, None)) == ("1.00", "1.00 → 2.00", "2.00")
    assert interval({"value": 1.0, "low": None, "high": None}) == "1.00"
    assert interval(None) == interval({"value": None, "low": None, "high": None}) == "—"


def test_what_a_hybrid_is_built_on_may_be_one_run_or_several() -> None:
    qlora, highrank = ({"method": m, "rank": 16, "steps": 10, "train_wall_s": 4.1, "valid_perplexity": 2.0} for m in ("qlora", "highrank"))
    said = [about.parts({"label": "hybrid", "parts": parts, "tried": None}) for parts in ([qlora], [qlora, highrank])]
    assert said[0].endswith("its time, tokens and other costs include QLoRA's.")
    assert said[1].endswith("its time, tokens and other costs include theirs.")


def test_a_report_needs_no_torch(tiny: Make) -> None:
    made_run(tiny("--method", "base"), ["a"] * 3)
    made_run(tiny("--method", "lora"), ["the lake"] * 3)
    code = "import sys, runpy\nrunpy.run_path(sys.argv[0], run_name='__main__')\nassert not {'torch', 'transformers', 'unsloth'} & set(sys.modules)"
    flags = ["--recipe", "tiny", *places(Path(tiny().runs_dir).parent)]
    done = subprocess.run([sys.executable, "-c", f"import sys; sys.argv = {[str(ROOT / 'scripts' / 'report.py'), *flags]}\n{code}"],
                          capture_output=True, text=True, timeout=240, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "report:" in done.stdout


def test_data_that_were_rebuilt_are_not_described_as_those_of_the_runs(tiny: Make) -> None:
    from kit.dataset import prepare

    small = ("--train-per-source", "10", "--test-per-source", "5")
    prepare(tiny(*small))
    made_run(tiny("--method", "lora", *small), ["a lake"] * 3, data="of before")
    _, notes, text = build(tiny())
    assert [n for n in notes if "was rebuilt after these runs were made" in n]
    assert "## Data" not in text


@pytest.mark.parametrize(("scripts", "said"), [({"LATIN": 95, "CJK": 5}, False), ({"LATIN": 50, "CJK": 30, "DEVANAGARI": 20}, True), ({}, False)])
def test_rows_that_the_word_metrics_cannot_see_are_told(scripts: dict[str, int], said: bool) -> None:
    by = {tokens: [{"status": "done", "score_tokens": tokens}] for tokens in ("13a", "intl", "zh", "char")}
    notes = write.unseen({"splits": {"test": {"scripts": scripts}}}, by["13a"])
    for tokens, lost in (("intl", "30%"), ("zh", ""), ("char", "")):
        found = write.unseen({"splits": {"test": {"scripts": scripts}}}, by[tokens])
        assert [n.startswith(f"{lost} of the test rows are in scripts without spaces, whose sentences intl takes") for n in found] == [True] * bool(
            said and lost
        )
    thai = {"splits": {"test": {"scripts": {"THAI": 40, "CJK": 60}}}}
    assert write.unseen(thai, by["zh"])[0].startswith("40% of the test rows are in scripts without spaces, whose sentences zh takes for words: score by")
    assert [n.startswith("50% of the test rows are not in Latin letters: ROUGE-L counts a to z") for n in notes] == [True] * said


def test_runs_scored_by_other_tokens_are_not_ranked_against_each_other(tiny: Make) -> None:
    replies = ["the lake is blue", "湖是蓝色的", "a"] * 4
    for method, tokens in (("lora", "zh"), ("dora", "zh"), ("qlora", "13a")):
        made_run(tiny("--method", method), replies, score_tokens=tokens)
    results, notes, text = build(tiny())
    assert [r["score_tokens"] for r in results] == ["13a", "zh", "zh"]
    reasons = {(v["a"], v["b"]): v["confounded"] for v in write.inputs(tiny()).found}
    assert reasons == {("qlora", "lora"): ["scored by other tokens"], ("qlora", "dora"): ["scored by other tokens"], ("lora", "dora"): []}
    assert "make compare RECIPE=tiny METHODS=\"lora dora\" ARGS='--score-tokens zh'" in text
    assert any(n.startswith("BLEU-4 and ROUGE-L of these runs count different tokens (13a, zh) and cannot be compared; scripts/eval.py RUN") for n in notes)
    # Seeds that count different tokens have no mean.
    made_run(tiny("--method", "lora", "--seed", "1"), replies, score_tokens="13a")
    assert [r["label"] for r in build(tiny())[0]] == ["QLoRA", "LoRA (seed 0)", "LoRA (seed 1)", "DoRA"]
    made_run(tiny("--method", "lora"), replies, score_tokens="klingon")
    assert next(r for r in build(tiny())[0] if r["method"] == "lora")["reason"] == (
        "predictions.jsonl cannot be used: unknown score_tokens 'klingon'; known: 13a, char, intl, zh"
    )


def test_only_the_mark_of_a_line_is_coloured() -> None:
    from rich.console import Console

    shown = Console(record=True, width=100, file=io.StringIO())
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tables, "console", shown)
        tables.gate_lines({"moved": {"passed": True, "detail": "all"}})
        tables.fairness_lines([("a", "b", ["other rows"])])
    styled = shown.export_text(styles=True)
    assert "\x1b[32m✓ passed     \x1b[0mmoved: all" in styled
    assert "\x1b[1mnot ranked: \x1b[0ma and b: other rows" in styled
