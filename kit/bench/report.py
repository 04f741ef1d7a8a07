"""The report of many large runs, as a user makes it: a fresh process that reads all of them and writes every file."""

from __future__ import annotations

import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from kit.bench.harness import Peaks, interleave, summary
from kit.bench.metrics import composed
from kit.bench.startup import ROOT, command
from kit.config import BASE, RunConfig
from kit.files import sha256, write_json, write_jsonl
from kit.metrics import scores_by_source
from kit.runs import open_run
from kit.settings import sibling

Row = dict[str, Any]
METHODS = ("qlora", "lora", "qdora", "dora", "highrank", "galore", "apollo", "full")
SEEDS, STEPS = 3, 1000
SOURCES = ("alpaca", "tulu", "ultrachat")


def report(config: RunConfig, rounds: int, rows: int = 6000) -> dict[str, Any]:
    """Eight methods by three seeds and the base model, composed replies of about 200 words to every row; `html_mib` is the size of report.html.

    Memory is the largest process's: the main one or one of its readers.
    """
    peaks: Peaks = {}
    with tempfile.TemporaryDirectory() as folder:
        made = replace(config, name="large", runs_dir=f"{folder}/runs", report_dir=f"{folder}/report")
        runs = [replace(made, method=BASE), *(replace(sibling(made, m), seed=s) for m in METHODS for s in range(SEEDS))]
        scores = scores_by_source(answers(rows, 0))  # of one for all: what takes time is what the report itself computes
        for number, run in enumerate(runs):
            write_run(run, answers(rows, number), scores)
        where = ("--recipe", made.recipe, "--name", "large", "--runs-dir", made.runs_dir, "--report-dir", made.report_dir, "--data-dir", f"{folder}/data")
        words = (sys.executable, str(ROOT / "scripts" / "report.py"), *where)
        name = f"{len(runs)} runs of {rows} replies"
        times = interleave({name: command(name, 0, *words, peaks=peaks)}, rounds)[0]
        found = summary("report", times, peaks, [])
        found["variants"][name]["html_mib"] = Path(made.report_dir, "report.html").stat().st_size / 2**20
    return found


def answers(rows: int, number: int) -> list[Row]:
    """predictions.jsonl: the references are the same for every number, the replies keep more or less of each."""
    rng = random.Random(number)
    return [
        {"id": f"{i:05d}", "source": SOURCES[i % 3], "prompt": f"Question {i}?", **pair, "reply_tokens": 200, "finished": True,
         "nll": rng.uniform(100, 300), "nll_tokens": 200}
        for i, pair in enumerate(composed(rows, number))
    ]  # fmt: skip


def write_run(config: RunConfig, predictions: list[Row], scores: Row) -> None:
    """A finished run."""
    folder, rng = open_run(config), random.Random(config.run_name)
    write_jsonl(folder / "predictions.jsonl", predictions)
    provenance: dict[str, Any] = {"data": "composed", "gpu": None, "cpu": "none", "versions": {}}
    common = {"schema": 1, "precision": {"name": "float32", "reason": "composed"}, "provenance": provenance}
    generation = {"empty": 0, "unfinished": 0, "mean_reply_tokens": 200.0, "wall_s": 1.0, "peak_memory_gib": 1.0}
    write_json(folder / "eval.json", common | scores | {"generation": generation, "predictions_sha256": sha256(folder / "predictions.jsonl")})
    if config.method == BASE:
        return
    costs = {"train_wall_s": rng.uniform(60, 90), "peak_memory_gib": rng.uniform(2, 9), "tokens_per_s": 2000.0, "trainable_params": 10**6}
    write_json(folder / "train.json", common | costs | {"status": "done", "tokens_supervised": 10**6, "adapter_mib": 50.0})
    write_jsonl(folder / "log.jsonl", [{"step": i, "loss": 3 / i**0.5 + rng.uniform(0, 0.1)} for i in range(1, STEPS + 1)])
