"""Rich console tables: data, training, evaluation and the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from kit.config import RunConfig
from kit.console import console, counts, say
from kit.files import read_json
from kit.report.rows import COLUMNS, cell, duration, interval, number

PERCENTILE_NAMES = ("p5", "p25", "p50", "p75", "p95", "p99", "p100")


def _table(title: str, columns: Sequence[str]) -> Table:
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
    return table


def data_table(manifest: dict[str, Any], folder: Path) -> None:
    """Rows in, kept and dropped by reason, and what the maximum length cut."""
    table = _table(f"Data in {folder}", ["source", "rows in", "kept", "train", "test", "dropped", "repaired"])
    for name, s in manifest["sources"].items():
        table.add_row(escape(name), *(f"{s[k]:,}" for k in ("rows_in", "kept", "train", "test")), counts(s["dropped"]), counts(s["repaired"]))
    console.print(table)
    for split, cut in manifest["truncated"].items():
        lengths = manifest["lengths"][split]
        console.print(f"{split}: {counts(cut)}; tokens a row: median {lengths['p50']}, 95% {lengths['p95']}, longest {lengths['p100']}", markup=False)


def inspect_tables(manifest: dict[str, Any], folder: Path) -> None:
    """Lengths, turns and scripts of every split, and what the audit for duplicates and leaks found."""
    from kit.report.figures import draw_lengths

    stats = read_json(folder / "dataset_stats.json")
    table = _table("Tokens a row, after fitting to the maximum length", ["split", "rows", *PERCENTILE_NAMES])
    for split, s in stats["splits"].items():
        for name, lengths in {"all": s["tokens"], **s["tokens_by_source"]}.items():
            rows = s["rows"] if name == "all" else manifest["sources"][name][split]
            table.add_row(escape(f"{split} {name}"), f"{rows:,}", *(f"{lengths[p]:,}" for p in PERCENTILE_NAMES))
    console.print(table)
    for split, s in stats["splits"].items():
        console.print(f"{split}: exchanges a row: {_most(s['exchanges'])}; scripts: {_most(s['scripts'])}", markup=False)
    found, left = manifest["duplicates"], manifest["leaks"]
    console.print(
        f"{found['exact']:,} exact duplicates dropped; {found['near']:,} rows in {found['groups']:,} groups of near duplicates (similarity "
        f"{found['similarity']} or the same prompt), each kept on one side of the split", markup=False,
    )  # fmt: skip
    console.print(f"figure: {draw_lengths(stats, folder / 'lengths.png')}", markup=False)
    console.print(f"test rows whose prompt is in another split: {left['same_prompt']['test_rows']:,}; "
                  f"whose first question is: {left['same_opening']['test_rows']:,}", markup=False)  # fmt: skip


def _most(by_value: dict[str, int], n: int = 6) -> str:
    shown = ", ".join(f"{value} ×{count:,}" for value, count in list(by_value.items())[:n])
    return shown + (f" and {len(by_value) - n} more" if len(by_value) > n else "")


def show_rows(config: RunConfig, n: int) -> None:
    """Training rows as the model sees them; supervised tokens stand in ⟦ ⟧ and, where there is colour, in green."""
    from kit import dataset
    from kit.hub import load_tokenizer
    from kit.prompts import IGNORE, Renderer

    tokenizer: Any = load_tokenizer(config.model, config.revision)
    rows = dataset.rows(config, "train")[:n]
    for row, example in zip(rows, Renderer(tokenizer, config.format, config.max_length).examples(rows), strict=True):
        console.rule(Text(f"{row['id']}: {len(example.input_ids)} tokens, {example.supervised} supervised, {example.fit.replace('_', ' ')}"), align="left")
        text = Text()
        for supervised, run in groupby(zip(example.input_ids, example.labels, strict=True), key=lambda pair: pair[1] != IGNORE):
            piece = tokenizer.decode([token for token, _ in run])
            text.append(f"⟦{piece}⟧" if supervised else piece, style="bold green" if supervised else "dim")
        console.print(text, soft_wrap=True)


def training_table(config: RunConfig, record: dict[str, Any]) -> None:
    """What one training cost and gave."""
    table = _table(f"Trained {config.run_dir}", ["steps", "final loss", "time", "tokens/s", "peak memory", "trainable", "adapter"])
    table.add_row(
        str(record["steps"]), number(record["final_loss"], 3), duration(record["train_wall_s"]), number(record["tokens_per_s"], 0),
        number(record["peak_memory_gib"], 2, " GiB"), f"{record['trainable_params']:,}", number(record["adapter_mib"], 1, " MiB"),
    )  # fmt: skip
    console.print(table)
    gate_lines(record["gates"])


def gate_lines(checks: dict[str, Any]) -> None:
    """One line for each gate; a mark and a word, so that colour is not needed."""
    for name, gate in checks.items():
        word, style = {True: ("✓ passed", "green"), False: ("✗ FAILED", "bold red"), None: ("– not judged", "dim")}[gate["passed"]]
        console.print(Text(f"{word:<13}", style=style) + Text(f"{name.replace('_', ' ')}: {gate['detail']}", style=""), soft_wrap=True)


def sweep_table(found: dict[str, Any], config: RunConfig) -> None:
    """Validation perplexity by learning rate, the best one marked."""
    table = _table(f"Learning rates of {config.method} on {found['budget']['rows']:,} rows", ["learning rate", "perplexity", "time", ""])
    for point in found["curve"]:
        mark = "best" if point["learning_rate"] == found["best"] else ""
        perplexity = number(point["valid_perplexity"], 3) if point["valid_perplexity"] is not None else "diverged"
        table.add_row(f"{point['learning_rate']:g}", perplexity, duration(point["train_wall_s"]), mark)
    console.print(table)
    console.print(f"use it with: --tuned, or --learning-rate {found['best']:g}", markup=False)


def evaluation_table(config: RunConfig, record: dict[str, Any]) -> None:
    """Scores with 95% intervals, over all rows, without flagged ones and by source; lengths and forgetting."""
    table = _table(f"Evaluated {config.run_dir}", ["rows", "BLEU-4", "ROUGE-L", "perplexity", "length ratio"])
    leaks, blocks = record.get("leaks") or {"flagged": 0, "without": None}, {"all": record["all"]}
    if leaks["without"]:
        blocks |= {f"without {leaks['flagged']} flagged": leaks["without"]}
    for name, block in {**blocks, **record["per_source"]}.items():
        table.add_row(escape(name), *(interval(block[m]) for m in ("bleu4", "rouge_l", "perplexity", "length_ratio")))
    console.print(table)
    made = record["generation"]
    console.print(f"{made['empty']} empty and {made['unfinished']} unfinished replies, {made['mean_reply_tokens']:.1f} tokens each; "
                  f"{leaks['flagged']} test rows flagged by the leak audit", markup=False)  # fmt: skip
    if lost := record.get("forgetting"):
        kl = f"; KL from the base model {interval(lost['kl'], 4)} nats a token" if lost["kl"] else ""
        before = f"{number(lost['perplexity_before']['value'], 2)} → " if lost["perplexity_before"] else ""
        say(f"general text ({lost['text']}): perplexity {before}{interval(lost['perplexity'])}{kl}")
    if reason := record.get("forgetting_reason"):
        say(f"forgetting: {reason}")
    gate_lines(record["gates"])


def tasks_table(config: RunConfig, record: dict[str, Any]) -> None:
    """What lm-evaluation-harness found, with its standard errors."""
    table = _table(f"Tasks of lm-evaluation-harness {record['versions']['lm_eval']} on {config.run_dir}", ["task", "metric", "value", "standard error"])
    for task, found in record["tasks"].items():
        for metric, score in found.items():
            table.add_row(escape(task), escape(metric), number(score["value"], 4), number(score["stderr"], 4))
    console.print(table)


def comparison_table(rows: Sequence[dict[str, Any]], title: str) -> None:
    """The base model and every run side by side; a cell that is not there prints as —."""
    table = _table(title, [c.title for c in COLUMNS.values()])
    base = next((r for r in rows if r["method"] == "base"), None)
    for row in rows:
        table.add_row(*(escape(cell(key, row, base)) for key in COLUMNS))
    console.print(table)


def verdict_table(found: Sequence[dict[str, Any]]) -> None:
    """A matrix of what can be said: the row's method against the column's, on each metric."""
    names = list(dict.fromkeys(m for v in found for m in (v["a"], v["b"])))
    signs = {"better": "+", "worse": "−", "equivalent": "=", "cannot tell": "?", "different": "≠"}
    flipped = {"better": "worse", "worse": "better"}
    said = {(v["a"], v["b"], v["metric"]): v for v in found} | {
        (v["b"], v["a"], v["metric"]): v | {"verdict": flipped.get(v["verdict"], v["verdict"])} for v in found
    }
    metrics = list(dict.fromkeys(v["metric"] for v in found))
    table = _table("Verdicts, row against column: " + ", ".join(COLUMNS[m].title for m in metrics), ["", *names])
    for a in names:
        marks = ["".join(signs[v["verdict"]] for m in metrics if (v := said.get((a, b, m)))) for b in names]
        starred = ["*" if (v := said.get((a, b, metrics[0]))) and v["confounded"] else "" for b in names]
        table.add_row(escape(a), *(mark + star or "·" for mark, star in zip(marks, starred, strict=True)))
    console.print(table)
    console.print("+ better, − worse, = equivalent, ? cannot tell, * differs in more than the method (see Fairness in report.md)", markup=False)


def bench_table(found: dict[str, Any]) -> None:
    """Medians with their spread, and the paired ratios."""
    table = _table(f"Bench {found['what']}", ["variant", "median", "IQR", "peak memory", "rounds"])
    for name, v in found["variants"].items():
        table.add_row(escape(name), *(number(v[k], 3, " s") for k in ("median_s", "iqr_s")), number(v["peak_memory_gib"], 2, " GiB"), str(v["n"]))
    console.print(table)
    for pair, ratio in found["ratios"].items():
        console.print(f"{pair}: {ratio:.2f}", markup=False)
