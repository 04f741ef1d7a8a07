"""Rich console tables: data, training, evaluation and the comparison."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from rich import box
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from kit import dataset
from kit.config import RunConfig
from kit.console import console, counts, say
from kit.files import read_json
from kit.hub import load_tokenizer
from kit.prompts import IGNORE, Renderer
from kit.report.blocks import BEST
from kit.report.content import comparison
from kit.report.figures import draw_lengths
from kit.report.rows import COLUMNS, SCORES, Row, duration, interval, number, plain
from kit.report.verdicts import LEGEND, Verdict, by_reason, matrix

PERCENTILE_NAMES = ("p5", "p25", "p50", "p75", "p95", "p99", "p100")


def _table(heads: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    for i, head in enumerate(heads):
        table.add_column(escape(head), justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*(escape(c) if isinstance(c, str) else c for c in row))
    return table


def fits(table: Table) -> bool:
    return Measurement.get(console, console.options.update(max_width=10_000), table).maximum <= console.width


def show(title: str, heads: Sequence[str], rows: Sequence[Sequence[str | Text]]) -> None:
    """Prints a table; columns that the console is too narrow for follow in another below, with the first column again. Nothing is cut off."""
    last = len(heads)
    while last > 2 and not fits(_table(heads[:last], [r[:last] for r in rows])):
        last -= 1
    if title:  # not the table's own, which would wrap at its width
        console.print(Text(title, style="bold"))
    console.print(_table(heads[:last], [r[:last] for r in rows]))
    if last < len(heads):
        show("", [heads[0], *heads[last:]], [[r[0], *r[last:]] for r in rows])


def data_table(manifest: dict[str, Any], folder: Path) -> None:
    """Rows in, kept and dropped by reason, and what the maximum length cut."""
    rows = [[n, *(f"{s[k]:,}" for k in ("rows_in", "kept", "train", "test")), counts(s["dropped"]), counts(s["repaired"])]
            for n, s in manifest["sources"].items()]  # fmt: skip
    show(f"Data in {folder}", ["source", "rows in", "kept", "train", "test", "dropped", "repaired"], rows)
    for split, cut in manifest["truncated"].items():
        lengths = manifest["lengths"][split]
        console.print(f"{split}: {counts(cut)}; tokens a row: median {lengths['p50']}, 95% {lengths['p95']}, longest {lengths['p100']}", markup=False)


def inspect_tables(manifest: dict[str, Any], folder: Path) -> None:
    """Lengths, turns and scripts of every split, and what the audit for duplicates and leaks found."""
    stats = read_json(folder / "dataset_stats.json")
    body = []
    for split, s in stats["splits"].items():
        for name, lengths in {"all": s["tokens"], **s["tokens_by_source"]}.items():
            rows = s["rows"] if name == "all" else manifest["sources"][name][split]
            body.append([f"{split} {name}", f"{rows:,}", *(f"{lengths[p]:,}" for p in PERCENTILE_NAMES)])
    show("Tokens a row, after fitting to the maximum length", ["split", "rows", *PERCENTILE_NAMES], body)
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
    row = [str(record["steps"]), number(record["final_loss"], 3), duration(record["train_wall_s"]), number(record["tokens_per_s"], 0),
           number(record["peak_memory_gib"], 2, " GiB"), f"{record['trainable_params']:,}", number(record["adapter_mib"], 1, " MiB")]  # fmt: skip
    show(f"Trained {config.run_dir}", ["steps", "final loss", "time", "tokens/s", "peak memory", "trainable", "adapter"], [row])
    gate_lines(record["gates"])


def gate_lines(checks: dict[str, Any]) -> None:
    """One line for each gate; a mark and a word, so that colour is not needed."""
    for name, gate in checks.items():
        word, style = {True: ("✓ passed", "green"), False: ("✗ FAILED", "bold red"), None: ("– not judged", "dim")}[gate["passed"]]
        console.print(Text.assemble((f"{word:<13}", style), f"{name.replace('_', ' ')}: {gate['detail']}"), soft_wrap=True)


def sweep_table(found: dict[str, Any], config: RunConfig) -> None:
    """Validation perplexity by learning rate, the best one marked."""
    rows = []
    for point in found["curve"]:
        mark = "best" if point["learning_rate"] == found["best"] else ""
        perplexity = number(point["valid_perplexity"], 3) if point["valid_perplexity"] is not None else "diverged"
        rows.append([f"{point['learning_rate']:g}", perplexity, duration(point["train_wall_s"]), mark])
    show(f"Learning rates of {config.method} on {found['budget']['rows']:,} rows", ["learning rate", "perplexity", "time", ""], rows)
    console.print(f"use it with: --tuned, or --learning-rate {found['best']:g}", markup=False)


def evaluation_table(config: RunConfig, record: dict[str, Any]) -> None:
    """Scores with 95% intervals, over all rows, without flagged ones and by source; lengths and forgetting."""
    leaks, blocks = record.get("leaks") or {"flagged": 0, "without": None}, {"all": record["all"]}
    if leaks["without"]:
        blocks |= {f"without {leaks['flagged']} flagged": leaks["without"]}
    rows = [[name, *(interval(block[m]) for m in (*SCORES, "length_ratio"))] for name, block in {**blocks, **record["per_source"]}.items()]
    show(f"Evaluated {config.run_dir}", ["rows", *(COLUMNS[m].title for m in SCORES), "length ratio"], rows)
    made = record["generation"]
    console.print(f"{made['empty']} empty and {made['unfinished']} unfinished replies, {made['mean_reply_tokens']:.1f} tokens each; "
                  f"{leaks['flagged']} test row{'' if leaks['flagged'] == 1 else 's'} flagged by the leak audit", markup=False)  # fmt: skip
    if lost := record.get("forgetting"):
        kl = f"; KL from the base model {interval(lost['kl'], 4)} nats a token" if lost["kl"] else ""
        before = f"{number(lost['perplexity_before']['value'], 2)} → " if lost["perplexity_before"] else ""
        say(f"general text ({lost['text']}): perplexity {before}{interval(lost['perplexity'])}{kl}")
    if reason := record.get("forgetting_reason"):
        say(f"forgetting: {reason}")
    gate_lines(record["gates"])


def tasks_table(config: RunConfig, record: dict[str, Any]) -> None:
    """What lm-evaluation-harness found, with its standard errors."""
    rows = [[task, metric, number(score["value"], 4), number(score["stderr"], 4)] for task, found in record["tasks"].items() for metric, score in found.items()]
    show(f"Tasks of lm-evaluation-harness {record['versions']['lm_eval']} on {config.run_dir}", ["task", "metric", "value", "standard error"], rows)


def comparison_table(rows: Sequence[Row], found: Sequence[Verdict], title: str) -> None:
    """The report's comparison: the base model and every method side by side; a star only where the verdicts support it."""
    table = comparison(rows, found)
    heads, body = table.heads, [[Text(f"★ {c.text}", style="bold green") if c.best else c.text for c in row] for row in table.rows]
    if fits(_table(heads, body)):
        show(title, heads, body)
    else:  # scores, then costs
        first = 1 + len(SCORES)
        show(title, heads[:first], [r[:first] for r in body])
        show("", [heads[0], *heads[first:]], [[r[0], *r[first:]] for r in body])
    if any(c.best for row in table.rows for c in row):
        console.print(BEST, markup=False)


def source_table(rows: Sequence[Row]) -> None:
    """BLEU-4 and ROUGE-L of every method on each source's test rows, if there are several."""
    names = sorted({s for r in rows for s in r["per_source"] or {}})
    if len(names) > 1:
        body = [[r["label"], *(" / ".join(number(plain((r["per_source"] or {}).get(s, {}), m), 2) for m in ("bleu4", "rouge_l")) for s in names)] for r in rows]
        show("By source: BLEU-4 / ROUGE-L", ["method", *names], body)


def verdict_table(found: Sequence[Verdict]) -> None:
    """A matrix of what can be said: the row's method against the column's, on each metric."""
    rows = matrix(found)
    names = [row[0] for row in rows]
    title = "Verdicts, row against column: " + ", ".join(COLUMNS[m].title for m in dict.fromkeys(v["metric"] for v in found))
    named = fits(_table(["", *names], rows))
    if named:
        show(title, ["", *names], rows)
    else:
        numbers = [str(i) for i in range(1, len(names) + 1)]
        show(title, ["", *numbers], [[f"{i} {row[0]}", *row[1:]] for i, row in zip(numbers, rows, strict=True)])
    console.print(LEGEND if named else f"{LEGEND} Columns are numbered as the rows.", markup=False)


def fairness_lines(unfair: Sequence[tuple[str, str, list[str]]]) -> None:
    """The pairs that must not be ranked, with the reasons."""
    for line in by_reason(unfair):
        console.print(Text.assemble(("not ranked: ", "bold"), line))


def bench_table(found: dict[str, Any]) -> None:
    """Medians with their spread, and the paired ratios."""
    rows = [[name, *(number(v[k], 3, " s") for k in ("median_s", "iqr_s")), number(v["peak_memory_gib"], 2, " GiB"), str(v["n"])]
            for name, v in found["variants"].items()]  # fmt: skip
    show(f"Bench {found['what']}", ["variant", "median", "IQR", "peak memory", "rounds"], rows)
    for pair, ratio in found["ratios"].items():
        console.print(f"{pair}: {ratio:.2f}", markup=False)
