"""The report: rows from files alone, partial and damaged runs have their place, foreign text stays text."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from kit.config import RunConfig
from kit.errors import UserError
from kit.files import read_json, write_json, write_jsonl
from kit.metrics import scores
from kit.report import write
from kit.report.rows import cell, collect, duration, number
from kit.report.tables import comparison_table
from kit.runs import open_run

Make = Callable[..., RunConfig]
HOSTILE = "</td><script>alert(1)</script> | `` ``` [bold]x[/bold]"
PROVENANCE = {"data": "h", "gpu": None, "gpu_absent_because": "none", "cpu": "c", "versions": {"python": "3"}}


def made_run(config: RunConfig, predictions: list[str], *, trained: bool = True, data: str = "h") -> Path:
    folder = open_run(config)
    rows = [
        {"id": f"alpaca-{i}", "source": "alpaca", "prompt": HOSTILE, "reference": "the lake is blue", "prediction": p, "reply_tokens": 3,
         "finished": True, "nll": 2.0, "nll_tokens": 4}
        for i, p in enumerate(predictions)
    ]  # fmt: skip
    write_jsonl(folder / "predictions.jsonl", rows)
    generation = {"empty": 0, "unfinished": 0, "mean_reply_tokens": 3.0, "wall_s": 1.0, "peak_memory_gib": 1.0}
    precision = {"name": "float32", "reason": "r"}
    provenance = PROVENANCE | {"data": data}
    write_json(folder / "eval.json", {"all": scores(rows), "per_source": {"alpaca": scores(rows)}, "generation": generation,
                                      "precision": precision, "provenance": provenance})  # fmt: skip
    if trained and config.method != "base":
        write_json(folder / "train.json", {"status": "done", "train_wall_s": 65.0, "peak_memory_gib": 1.5, "tokens_per_s": 2000.0,
                                           "trainable_params": 123456, "adapter_mib": 1.25, "provenance": provenance})  # fmt: skip
        write_jsonl(folder / "log.jsonl", [{"step": i, "loss": 3.0 / i} for i in range(1, 20)])
    return folder


def build(config: RunConfig) -> tuple[list[dict[str, object]], list[str], str]:
    rows, notes, _ = write.build(config)
    return rows, notes, (Path(config.report_dir) / "report.md").read_text(encoding="utf-8")


def test_all_files_come_from_one_set_of_rows(tiny: Make) -> None:
    made_run(tiny("--method", "base"), ["a lake"] * 3)
    made_run(tiny("--method", "lora"), ["the lake is blue"] * 3)
    rows, notes, text = build(tiny())
    out = Path(tiny().report_dir)
    assert [r["method"] for r in rows] == ["base", "lora"]
    assert notes == []
    summary = read_json(out / "summary.json")
    assert (summary["schema"], summary["recipe"], len(summary["rows"])) == (1, "tiny", 2)
    table = list(csv.DictReader(io.StringIO((out / "comparison_table.csv").read_text())))
    assert float(table[1]["bleu4"]) == summary["rows"][1]["bleu4"]["value"] == pytest.approx(100)
    assert table[0]["adapter_mib"] == ""
    assert "| LoRA | 0.00 → 100.00 |" in text
    assert {p.name for p in (out / "figures").iterdir()} == {"bleu_rouge_comparison.png", "memory_vs_performance.png", "training_loss.png"}
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in (out / "figures").iterdir())


def test_the_report_says_what_the_runs_used_and_not_what_its_own_flags_say(tiny: Make) -> None:
    from kit.dataset import prepare

    small = ("--train-per-source", "10", "--test-per-source", "5")
    prepare(tiny(*small))
    made_run(tiny("--method", "lora", *small, "--limit-test", "3"), ["a lake"] * 3)
    text = build(tiny())[2]
    assert "These runs used only the first 3 test rows." in text
    assert "At 256 tokens a row, train: 30 whole. valid: 120 whole. test: 15 whole." in text


def test_the_same_runs_give_the_same_bytes(tiny: Make) -> None:
    made_run(tiny("--method", "base"), ["a"] * 3)
    made_run(tiny("--method", "qlora"), ["the lake"] * 3)
    build(tiny())
    files = [p for p in Path(tiny().report_dir).rglob("*") if p.is_file()]
    before = {p: p.read_bytes() for p in files}
    build(tiny())
    assert len(files) == 6
    assert {p: p.read_bytes() for p in files} == before


def test_unfinished_failed_and_damaged_runs_have_rows_with_reasons(tiny: Make) -> None:
    made_run(tiny("--method", "base"), ["a"] * 2)
    open_run(tiny("--method", "lora"))
    write_json(open_run(tiny("--method", "dora")) / "train.json", {"status": "oom", "reason": "out of memory"})
    (made_run(tiny("--method", "qlora"), ["b"] * 2) / "eval.json").write_text("{")
    rows, notes, text = build(tiny())
    assert {r["method"]: r["status"] for r in rows} == {"base": "done", "qlora": "damaged", "lora": "missing", "dora": "oom"}
    assert len(notes) == 3
    assert "| DoRA: oom | — | — |" in text


def test_runs_on_different_data_are_pointed_out(tiny: Make) -> None:
    made_run(tiny("--method", "base"), ["a"] * 2)
    made_run(tiny("--method", "lora"), ["a"] * 2, data="other")
    assert build(tiny())[1] == ["the runs were made on different data; their scores cannot be compared"]


def test_foreign_text_stays_text(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tiny("--method", "base"), [HOSTILE, "b"])
    rows, _, text = build(tiny())
    outside = "".join(part for i, part in enumerate(text.split("````")) if i % 2 == 0)
    assert HOSTILE in text
    assert "<script>" not in outside
    comparison_table(rows, "[red]title")
    assert "[red]title" in capsys.readouterr().out


def test_a_fence_is_longer_than_any_inside() -> None:
    assert write.fenced("a ```` b")[0] == "`````text"
    assert write.escape("a|b<c>") == r"a\|b\<c\>"


def test_no_runs_is_an_error(tiny: Make) -> None:
    with pytest.raises(UserError, match="no runs in"):
        collect(Path(tiny().runs_dir))


def test_seeds_are_told_apart(tiny: Make) -> None:
    made_run(tiny("--method", "lora"), ["a"] * 2)
    made_run(tiny("--method", "lora", "--seed", "1"), ["a"] * 2)
    assert [cell("label", r, None) for r in collect(Path(tiny().runs_dir) / "tiny")] == ["LoRA", "LoRA (seed 1)"]


def test_numbers_read_well() -> None:
    assert [duration(s) for s in (None, 42.4, 125, 4320)] == ["—", "42 s", "2 min 05 s", "1 h 12 min"]
    assert (number(None, 2), number(1234.5, 1, " GiB")) == ("—", "1,234.5 GiB")


def test_summary_is_plain_json(tiny: Make) -> None:
    made_run(tiny("--method", "base"), ["a"] * 2)
    build(tiny())
    json.loads((Path(tiny().report_dir) / "summary.json").read_text(), parse_constant=lambda c: pytest.fail(f"{c} in summary.json"))
