"""Figures as PNG and SVG from the report's rows: colour-blind-safe, told apart by place, marker or dash in black and white, intervals drawn."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kit.config import BASE
from kit.files import write_bytes
from kit.methods import METHODS
from kit.metrics import METRICS
from kit.report.answers import Results
from kit.report.blocks import Figure
from kit.report.ranking import CLEARLY
from kit.report.rows import Row, curves, plain, title
from kit.report.words import names, sentence

# Okabe and Ito's palette (2008), its yellow darker to be seen as a line, grey for the base model; then as many more as there are methods.
COLOURS = ("#999999", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#B5A400", "#000000", "#882255", "#44AA99",
           "#332288", "#8C510A")  # fmt: skip
MARKERS = "osD^vP*Xhd<>p"
DASHES: tuple[Any, ...] = ("-", "--", "-.", ":", *((0, d) for d in (
    (5, 1), (1, 1), (3, 1, 1, 1), (8, 2), (8, 2, 1, 2), (3, 3), (8, 1, 1, 1, 1, 1), (1, 3), (5, 3, 1, 3),
)))  # fmt: skip
POINTS = 300  # of a loss curve; more cannot be seen
SPREAD = (5, 25, 50, 75, 95)
Shared = Literal["none", "row"]
NAMES = ("bleu_rouge_comparison", "memory_vs_performance", "time_vs_performance", "training_loss", "per_source", "length", "human_vs_metric", "data_lengths")
ENDINGS = (".png", ".svg")


def draw(results: Results, rated: Row | None, stats: Mapping[str, Any] | None, folder: Path, families: Sequence[Collection[str]] = ()) -> list[Figure]:
    """Draws every figure that there is something for and removes those of an earlier report; returns them with captions that say in words what is to be
    seen. Each of the `families` of methods, which can fairly be ranked among themselves alone, has a front of its own; none given: all are one."""
    rows = [r for r in results.shown if all(plain(r, m) is not None for m in ("bleu4", "rouge_l"))]
    # A method looks the same in every report.
    style = {m: i for i, m in enumerate(dict.fromkeys([BASE, *METHODS, *(r["method"] for r in results.rows)]))}
    made: list[Figure] = []

    def add(name: str, caption: str, drawn: Any) -> None:
        _save(drawn, folder / name)
        made.append(Figure(name, caption))

    if rows:
        add("bleu_rouge_comparison", "BLEU-4 and ROUGE-L of every method with 95% intervals; higher is better. The dotted line is the base model.",
            _comparison(rows, style, {"": rows}))  # fmt: skip
    for key, name, what, unit in (("peak_memory_gib", "memory", "peak memory while training", "GiB"), ("train_wall_s", "time", "training time", "s")):
        if costed := [r for r in rows if r[key] is not None]:
            groups = [[r for r in costed if r["method"] in those] for those in families] or [costed]
            fronts = [ahead for group in groups if (ahead := front(group, key))]
            caption = f"ROUGE-L with 95% intervals against {what}: upper left is best."
            add(f"{name}_vs_performance", " ".join([caption, *_said_of_fronts(costed, groups, fronts, name), *_dotted(rows)]),
                _tradeoff(costed, fronts, rows, style, key, f"{what} ({unit})"))  # fmt: skip
    if logs := curves(results.rows):
        caption = "Training loss by optimiser step, as a running mean over a twentieth of the steps."
        add("training_loss", " ".join([caption, *_fainter(results.rows, logs), *_without_curve(results.rows)]), _loss(results.rows, logs, style))
    sources = sorted({s for r in rows for s in r["per_source"] or {}})
    if len(sources) > 1:
        by_source = {s: [r | r["per_source"][s] for r in rows if s in (r["per_source"] or {})] for s in sources}
        add("per_source", "BLEU-4 and ROUGE-L on the test rows of each source, with 95% intervals, a metric on one scale.", _comparison(rows, style, by_source))
    if lengths := _lengths(results):
        add("length", "BLEU-4's tokens a reply: median, middle 50% and 90% of references and each method's first run. BLEU-4 rewards matching length.",
            _boxes(lengths, "tokens a reply: median, middle 50% and 90%"))  # fmt: skip
    if rated and rated["criteria"]:
        add("human_vs_metric", "Mean human score of the replies that were scored against ROUGE-L of all test rows, both with 95% intervals.",
            _human(results.rows, rated, style))  # fmt: skip
    if stats:
        add("data_lengths", "Tokens a row in every split and source; the dotted line is the maximum length.", _data(stats))
    _remove(folder, set(NAMES) - {f.name for f in made})
    return made


def _remove(folder: Path, names: Iterable[str]) -> None:
    """Figures that an earlier report left and this one does not draw: they would pass for its own."""
    for name in names:
        for ending in ENDINGS:
            (folder / f"{name}{ending}").unlink(missing_ok=True)


def draw_lengths(stats: Mapping[str, Any], path: Path) -> Path:
    """Tokens a row for every split and source, from dataset_stats.json."""
    return _save(_data(stats), path.with_suffix(""))


def _figure(panels: int, *, lines: int = 1, width: float = 7.5, height: float = 3.8, sharex: Shared = "none", sharey: bool = False) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width, height), layout="constrained")
    axes = figure.subplots(lines, panels, squeeze=False, sharex=sharex, sharey=sharey).ravel().tolist()
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.3)
        ax.set_axisbelow(True)
    return figure, axes


def _save(figure: Any, path: Path) -> Path:
    """PATH.png and PATH.svg; without dates, versions and random names the same rows give the same bytes."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    vector, pixels = io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "kit", "svg.fonttype": "path"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a source's name may be in any script
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once for both
        # Each canvas draws once; savefig would draw a second time, to ask for the layout.
        FigureCanvasSVG(figure).print_svg(vector, metadata={"Date": None, "Creator": None})
        figure.dpi = 150
        FigureCanvasAgg(figure).print_png(pixels, metadata={"Software": None})
    write_bytes(path.with_suffix(".svg"), vector.getvalue())
    write_bytes(path.with_suffix(".png"), pixels.getvalue())
    return path.with_suffix(".png")


def errors(score: Mapping[str, Any]) -> list[list[float]]:
    """[[below], [above]]: how far the interval reaches from the value; a score without an interval has no bar."""
    low, high = score.get("low"), score.get("high")
    if low is None or high is None:
        return [[0.0], [0.0]]
    # Rounding can put an end on the value's wrong side by a hair.
    return [[max(0.0, score["value"] - low)], [max(0.0, high - score["value"])]]


def _point(axes: Any, x: float, y: float, k: int, **how: Any) -> None:
    axes.errorbar([x], [y], fmt=MARKERS[k % len(MARKERS)], color=COLOURS[k % len(COLOURS)], markeredgecolor="black", markeredgewidth=0.6, markersize=7,
                  ecolor="black", elinewidth=1, capsize=3, **how)  # fmt: skip


def _comparison(rows: Sequence[Row], style: Mapping[str, int], groups: Mapping[str, Sequence[Row]]) -> Any:
    """A panel for each metric and group, methods from top to bottom, so that no legend is needed; the groups of a metric share its scale."""
    labels = [r["label"] for r in rows]
    metrics = ("bleu4", "rouge_l")
    lines, panels = (2, len(groups)) if len(groups) > 1 else (1, 2)
    shared: Shared = "row" if len(groups) > 1 else "none"  # a line is a metric
    figure, axes = _figure(panels, lines=lines, width=max(7.5, 2 + 2.2 * panels), height=lines * (1.1 + 0.3 * len(rows)), sharex=shared, sharey=True)
    for ax, (metric, group) in zip(axes, ((m, g) for m in metrics for g in groups), strict=True):
        for row in (r for r in groups[group] if plain(r, metric) is not None):
            at = labels.index(row["label"])
            _point(ax, row[metric]["value"], at, style[row["method"]], xerr=errors(row[metric]))
            if lines == 1:
                ax.annotate(f"{row[metric]['value']:.1f}", (row[metric]["value"], at), (0, 6), textcoords="offset points", ha="center", fontsize=8, zorder=1.5,
                            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5})  # fmt: skip
            if row["method"] == BASE:
                ax.axvline(row[metric]["value"], color="black", linestyle=":", linewidth=1, zorder=1)
        ax.set_xlabel(METRICS[metric].title + ("" if group else " (0–100)"))
        if group:
            ax.set_title("\n".join(textwrap.wrap(group, 22)), fontsize=9)
        ax.set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    axes[0].margins(y=0.08)
    return figure


def _tradeoff(rows: Sequence[Row], fronts: Sequence[Sequence[Row]], every: Sequence[Row], style: Mapping[str, int], key: str, what: str) -> Any:
    """A cost starts at 0, so that distances are proportions and a difference without meaning looks like none."""
    figure, (axes,) = _figure(1)
    for base in (r for r in every if r["method"] == BASE):
        axes.axhline(base["rouge_l"]["value"], color="black", linestyle=":", linewidth=1, label="base")
    for row in rows:
        _point(axes, row[key], row["rouge_l"]["value"], style[row["method"]], yerr=errors(row["rouge_l"]), label=row["label"])
    axes.margins(y=0.1)
    axes.set_xlim(0, 1.1 * max(r[key] for r in rows) or 1)
    for ahead in fronts:
        _front_line(axes, [(r[key], r["rouge_l"]["value"]) for r in ahead])
    axes.set_xlabel(what)
    axes.set_ylabel("ROUGE-L (0–100)")
    _legend(axes)
    return figure


def _front_line(axes: Any, points: Sequence[tuple[float, float]]) -> None:
    """The front's edge out to the axes: up to its first point, in steps from point to point, and on to the right. So a single point has one too."""
    right, bottom = axes.get_xlim()[1], axes.get_ylim()[0]
    (first, _), (_, last) = points[0], points[-1]
    xs, ys = zip((first, bottom), *points, (right, last), strict=True)
    axes.plot(xs, ys, color="black", linewidth=1, linestyle="--", drawstyle="steps-post", zorder=1, scalex=False, scaley=False)


def front(rows: Sequence[Row], key: str) -> list[Row]:
    """The ranked rows that no other one equals or beats in cost and ROUGE-L, by rising cost; none where the costs do not clearly differ."""
    ranked = [r for r in rows if r["ranked"]]
    if len(ranked) < 2 or alike([r[key] for r in ranked]):
        return []
    at = {(r[key], r["rouge_l"]["value"]): r for r in reversed(ranked)}
    return [at[point] for point in pareto(list(at))]


def alike(costs: Sequence[float]) -> bool:
    """Whether costs are too close to each other to be different: each was measured once."""
    return min(costs) >= CLEARLY * max(costs)


def _said_of_fronts(drawn: Sequence[Row], groups: Sequence[Sequence[Row]], fronts: Sequence[Sequence[Row]], cost: str) -> list[str]:
    if fronts:
        lines = "line is the Pareto front" if len(fronts) == 1 else "lines are the Pareto fronts"
        # A point beside them may be above the line.
        lines += " of what can fairly be ranked together" if sum(r["ranked"] for r in groups[0]) < len(drawn) else ""
        who = "; ".join(names([r["label"] for r in ahead]) for ahead in fronts)
        return [f"The dashed {lines}, of methods that no other equals or beats in both, by value, which is no verdict: {who}."]
    few = f"The ranked methods differ in {cost} by less than {1 - CLEARLY:.0%}, which is no difference in what was measured once a run: no Pareto front."
    return [few] if any(sum(r["ranked"] for r in group) > 1 for group in groups) else []


def _dotted(rows: Sequence[Row]) -> list[str]:
    return ["Dotted: the base model."] if any(r["method"] == BASE for r in rows) else []


def _fainter(rows: Sequence[Row], logs: Collection[str]) -> list[str]:
    drawn = [r["method"] for r in rows if r["label"] in logs]
    return ["Fainter: a method's further seeds."] if len(set(drawn)) < len(drawn) else []


def _without_curve(rows: Sequence[Row]) -> list[str]:
    """What is combined of trained runs takes no step of its own."""
    untrained = dict.fromkeys(title(r["method"]) for r in rows if r["method"] in METHODS and len(METHODS[r["method"]].parts) > 1)
    return [sentence(f"{names(list(untrained))} trains nothing and has no curve.")] if untrained else []


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """(cost, score) of the points that no other one beats in both, by rising cost."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda p: (p[0], -p[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


def _loss(rows: Sequence[Row], logs: Mapping[str, Sequence[Row]], style: Mapping[str, int]) -> Any:
    figure, (axes,) = _figure(1)
    named: set[str] = set()
    for row in (r for r in rows if r["label"] in logs):
        k, log = style[row["method"]], logs[row["label"]]
        values = smoothed([r["loss"] for r in log])
        shown = np.unique(np.linspace(0, len(log) - 1, min(POINTS, len(log))).astype(int))
        label = None if row["method"] in named else title(row["method"])
        axes.plot([log[i]["step"] for i in shown], [values[i] for i in shown], color=COLOURS[k % len(COLOURS)], linestyle=DASHES[(k - 1) % len(DASHES)],
                  linewidth=1.2, alpha=0.6 if label is None else 1, label=label)  # fmt: skip
        named.add(row["method"])
    axes.set_xlabel("optimiser step")
    _counted(axes)
    axes.set_ylabel("loss (nats a token, running mean)")
    _legend(axes)
    return figure


def smoothed(values: Sequence[float], share: float = 0.05) -> list[float]:
    """A trailing mean over a share of the curve: steps differ in their rows, so single losses jump."""
    window = max(1, round(len(values) * share))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return [float(x) for x in (sums[ends] - sums[starts]) / (ends - starts)]


def _lengths(results: Results) -> dict[str, list[float]]:
    """Percentiles of BLEU-4's tokens a reply: the references', then each method's first run's."""
    out: dict[str, list[float]] = {}
    for rows in results.groups().values():
        lengths = results.answers[rows[0]["run"]].statistics["bleu4"][:, :2]
        out.setdefault("reference", np.percentile(lengths[:, 1], SPREAD).tolist())
        out[rows[0]["label"]] = np.percentile(lengths[:, 0], SPREAD).tolist()
    return out


def _data(stats: Mapping[str, Any]) -> Any:
    bars = {f"{split} {name}": [p[f"p{q}"] for q in SPREAD] for split, s in stats["splits"].items() for name, p in s["tokens_by_source"].items()}
    figure = _boxes(bars, f"tokens a row: median, middle 50% and 90%; dotted: maximum length {stats['max_length']:,}")
    figure.axes[0].axvline(stats["max_length"], color="black", linestyle=":", linewidth=1)
    figure.axes[0].set_xlim(right=max(1.03 * stats["max_length"], figure.axes[0].get_xlim()[1]))
    return figure


def _boxes(bars: Mapping[str, Sequence[float]], label: str) -> Any:
    figure, (axes,) = _figure(1, height=1.2 + 0.32 * len(bars))
    for at, (p5, p25, p50, p75, p95) in enumerate(bars.values()):
        axes.plot([p5, p95], [at, at], color="black", linewidth=1)
        axes.barh(at, p75 - p25, left=p25, height=0.6, color=COLOURS[5], edgecolor="black", linewidth=0.6)
        axes.plot([p50] * 2, [at - 0.3, at + 0.3], color="black", linewidth=2)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel(label)
    _counted(axes)
    return figure


def _human(rows: Sequence[Row], rated: Row, style: Mapping[str, int]) -> Any:
    by_run = {Path(r["run"]).name: r for r in rows if plain(r, "rouge_l") is not None}
    criteria: Mapping[str, Row] = rated["criteria"]
    figure, axes = _figure(len(criteria), width=max(7.5, 2.4 * len(criteria) + 1.5), sharey=True)
    for ax, (criterion, found) in zip(axes, criteria.items(), strict=True):
        for run, score in found["runs"].items():
            if row := by_run.get(run):
                at = row["rouge_l"]["value"], score["value"]
                _point(ax, *at, style[row["method"]], xerr=errors(row["rouge_l"]), yerr=errors(score), label=row["label"])
        ax.set_xlabel("ROUGE-L")
        ax.set_title(criterion, fontsize=10)
        ax.set_ylim(-0.2, 5.2)
    axes[0].set_ylabel("mean human score (0–5)")
    _legend(axes[-1])
    return figure


def _counted(axes: Any) -> None:
    """Of what is counted there are no halves."""
    axes.xaxis.get_major_locator().set_params(integer=True)


def _legend(axes: Any) -> None:
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=9)
