"""PNG figures from the report's rows: colour-blind-safe, told apart by hatch and marker in black and white, intervals drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit.report.rows import COLUMNS, Row, cell

# Okabe and Ito's palette (2008).
COLOURS = ("#999999", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo", "--", "**")
MARKERS = "osD^vP*Xh"


def draw(rows: Sequence[Row], logs: dict[str, list[Row]], folder: Path) -> list[Path]:
    """Draws every figure that the rows have something for; returns the files written."""
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    scored = [r for r in rows if r["bleu4"]]
    style = {cell("label", r, None): i % len(COLOURS) for i, r in enumerate(rows)}
    made = []
    if scored:
        made.append(_save(_bars(scored, style), folder / "bleu_rouge_comparison.png"))
    if costed := [r for r in scored if r["peak_memory_gib"] is not None]:
        made.append(_save(_memory(costed, style), folder / "memory_vs_performance.png"))
    if logs:
        made.append(_save(_loss(logs, style), folder / "training_loss.png"))
    return made


def draw_lengths(stats: dict[str, Any], path: Path) -> Path:
    """Tokens a row for every split and source: median, middle half and middle nine tenths, from dataset_stats.json."""
    import matplotlib

    matplotlib.use("Agg")
    bars = [(f"{split} {name}", p) for split, s in stats["splits"].items() for name, p in s["tokens_by_source"].items()]
    figure, axes = _figure(height=1.2 + 0.32 * len(bars))
    for at, (_, p) in enumerate(bars):
        axes.plot([p["p5"], p["p95"]], [at, at], color="black", linewidth=1)
        axes.barh(at, p["p75"] - p["p25"], left=p["p25"], height=0.6, color=COLOURS[1], edgecolor="black", linewidth=0.6)
        axes.plot([p["p50"]] * 2, [at - 0.3, at + 0.3], color="white", linewidth=2)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.invert_yaxis()
    axes.axvline(stats["max_length"], color="black", linestyle=":", linewidth=1)
    axes.set_xlabel(f"tokens a row: median, middle 50% and 90%; dotted: maximum length {stats['max_length']:,}")
    return _save(figure, path)


def _figure(width: float = 7.0, height: float = 4.2) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    # No creation date or version inside: the same rows give the same bytes.
    figure.savefig(path, dpi=150, metadata={"Software": None})
    return path


def _errors(scores: Sequence[dict[str, Any]]) -> list[list[float]]:
    return [[s["value"] - s["low"] for s in scores], [s["high"] - s["value"] for s in scores]]


def _bars(rows: Sequence[Row], style: dict[str, int]) -> Any:
    figure, axes = _figure(max(6.0, 1.1 * len(rows) + 3))
    width = 0.8 / len(rows)
    for i, row in enumerate(rows):
        scores = [row["bleu4"], row["rouge_l"]]
        label = cell("label", row, None)
        k = style[label]
        at = [x + (i - (len(rows) - 1) / 2) * width for x in (0, 1)]
        bars = axes.bar(at, [s["value"] for s in scores], width * 0.92, yerr=_errors(scores), capsize=3, label=label,
                        color=COLOURS[k], hatch=HATCHES[k], edgecolor="black", linewidth=0.6)  # fmt: skip
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_xticks([0, 1], [COLUMNS["bleu4"].title, COLUMNS["rouge_l"].title])
    axes.set_ylabel("score (0–100), with 95% interval")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def _memory(rows: Sequence[Row], style: dict[str, int]) -> Any:
    figure, axes = _figure()
    for row in rows:
        label = cell("label", row, None)
        k = style[label]
        axes.errorbar([row["peak_memory_gib"]], [row["rouge_l"]["value"]], yerr=_errors([row["rouge_l"]]), fmt=MARKERS[k], color=COLOURS[k],
                      ecolor="black", elinewidth=0.8, capsize=3, markersize=9, markeredgecolor="black", label=label)  # fmt: skip
    axes.margins(x=0.15, y=0.15)
    axes.set_xlabel("peak memory while training (GiB)")
    axes.set_ylabel("ROUGE-L, with 95% interval")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def _loss(logs: dict[str, list[Row]], style: dict[str, int]) -> Any:
    figure, axes = _figure()
    dashes = ("-", "--", "-.", ":")
    for label, log in logs.items():
        k = style[label]
        axes.plot([r["step"] for r in log], smoothed([r["loss"] for r in log]), color=COLOURS[k], linestyle=dashes[k % 4], label=label)
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("training loss (nats a token, running mean)")
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    return figure


def smoothed(values: Sequence[float], share: float = 0.05) -> list[float]:
    """A trailing mean over a share of the curve: steps are grouped by length, so single losses jump."""
    window = max(1, round(len(values) * share))
    return [sum(values[max(0, i + 1 - window) : i + 1]) / min(i + 1, window) for i in range(len(values))]
