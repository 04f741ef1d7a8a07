"""What training costs as rows, length and rank grow: one of them grows, the others stay, the methods take turns step by step."""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kit.bench.harness import summary
from kit.bench.train import NEVER, kit_trainer
from kit.bench.turns import Job, Step, alternate, sides
from kit.config import BASE, RunConfig
from kit.console import say
from kit.hub import load_tokenizer
from kit.methods import METHODS
from kit.prompts import IGNORE, Example
from kit.report.figures import COLOURS, MARKERS
from kit.settings import sibling

COMPARED = ("lora", "qlora", "dora")
# Length comes last: it takes the most memory, some of which the process keeps.
AXES = {"rows": (32, 64, 128, 256), "rank": (4, 8, 16, 32), "length": (64, 128, 256, 512)}
# What stays while another grows.
STANDARD = {"rows": 32, "length": 128, "rank": 8}


def scaling(config: RunConfig, rounds: int) -> dict[str, Any]:
    """Seconds a step, seconds an epoch, tokens a second and peak memory at every point; the first step of a point warms up.

    Each method has a process of its own. In it peaks begin anew at every point, and the points of an axis grow, so that what an earlier
    point left behind is less than what the next one takes.
    """
    methods = COMPARED if config.method == BASE else (config.method,)
    points = [(axis, value) for axis, values in AXES.items() for value in values]
    jobs = {m: [job(sibling(config, m), axis, value, rounds) for axis, value in points] for m in methods}
    made: dict[tuple[str, str, int], list[Step]] = {}
    with sides(jobs) as opened:
        for number, (axis, value) in enumerate(points):
            timed = alternate(opened, jobs[methods[0]][number].config.max_steps or 0)
            made |= {(m, axis, value): steps[1:] for m, steps in timed.items()}
            say(f"{axis} {value}: " + ", ".join(f"{m} {statistics.median(s.seconds for s in steps[1:]):.3f} s a step" for m, steps in timed.items()))
    return told(made, {name: work[0].config.micro_batch * work[0].config.accumulation for name, work in jobs.items()})


def job(config: RunConfig, axis: str, value: int, rounds: int) -> Job:
    """Training on rows of one length, of which every second half carries the loss."""
    point = STANDARD | {axis: value}
    tokenizer: Any = load_tokenizer(config.model, config.revision)
    rng = random.Random(0)
    rows = [rng.choices(range(len(tokenizer)), k=point["length"]) for _ in range(point["rows"])]
    examples = [Example(ids, [IGNORE] * (len(ids) // 2) + ids[len(ids) // 2 :], "whole") for ids in rows]
    own = dataclasses.replace(config, rank=point["rank"], max_length=point["length"], save_steps=NEVER)
    work = Job(kit_trainer, own, examples)
    return dataclasses.replace(work, config=dataclasses.replace(own, max_steps=1 + rounds * work.steps))


def told(made: dict[tuple[str, str, int], list[Step]], effective: dict[str, int]) -> dict[str, Any]:
    """The summary: a variant is "METHOD AXIS VALUE"; ratios to LoRA at the far end of every axis."""
    names = {key: " ".join(map(str, key)) for key in made}
    times = {names[key]: [s.seconds for s in steps] for key, steps in made.items()}
    far = [(axis, values[-1]) for axis, values in AXES.items()]
    pairs = [(names[m, axis, value], names["lora", axis, value]) for m, axis, value in made if m != "lora" and (axis, value) in far and "lora" in effective]
    found = summary("scaling", times, {names[key]: steps[-1].peak_gib for key, steps in made.items()}, pairs)
    for (method, axis, value), steps in made.items():
        variant = found["variants"][names[method, axis, value]]
        rows = value if axis == "rows" else STANDARD["rows"]
        variant |= {"method": method, "axis": axis, "value": value, "epoch_s": variant["median_s"] * rows / effective[method],
                    "tokens_per_s": statistics.median(s.tokens / s.seconds for s in steps)}  # fmt: skip
    return found | {"standard": STANDARD}


def draw(found: dict[str, Any], path: Path) -> list[Path]:
    """The figure beside a JSON file, as PNG and SVG."""
    import matplotlib

    figure, files = chart(found), [path.with_suffix(".png"), path.with_suffix(".svg")]
    with matplotlib.rc_context({"svg.hashsalt": "kit", "svg.fonttype": "none"}):
        figure.savefig(files[0], dpi=150, metadata={"Software": None})
        figure.savefig(files[1], metadata={"Date": None, "Creator": None})
    return files


def chart(found: dict[str, Any]) -> Any:
    """An axis a column, a cost a row, a method a line with its own marker."""
    from matplotlib.figure import Figure

    costs = {"epoch_s": "time of an epoch (s)", "tokens_per_s": "tokens a second", "peak_memory_gib": "peak memory (GiB)"}
    shown = {"rows": "training rows", "length": "tokens a row", "rank": "rank"}
    figure = Figure(figsize=(9, 7.5), layout="constrained")
    grid = figure.subplots(len(costs), len(shown), sharey="row", sharex="col")
    points = list(found["variants"].values())
    methods = list(dict.fromkeys(p["method"] for p in points))
    for column, (axis, name) in enumerate(shown.items()):
        for row, (cost, label) in enumerate(costs.items()):
            axes = grid[row][column]
            for k, method in enumerate(methods):
                line = [p for p in points if (p["axis"], p["method"]) == (axis, method)]
                axes.plot([p["value"] for p in line], [p[cost] for p in line], color=COLOURS[k + 1], marker=MARKERS[k], markeredgecolor="black",
                          linestyle=("-", "--", ":")[k % 3], label=METHODS[method].title)  # fmt: skip
            decorate(axes, line, name if row == len(costs) - 1 else "", label if column == 0 else "")
    # A row shares its heights, which the first limit would freeze: after all is drawn.
    for axes in grid[:, 0]:
        axes.set_ylim(bottom=0)
    figure.legend(*grid[0][0].get_legend_handles_labels(), loc="outside upper center", ncols=len(methods), frameon=False)
    rest = ", ".join(f"{v} {shown[k]}" if k != "rank" else f"rank {v}" for k, v in found["standard"].items())
    figure.supxlabel(f"while one grows the others are: {rest}", fontsize=9)
    return figure


def decorate(axes: Any, points: Sequence[dict[str, Any]], across: str, up: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks([p["value"] for p in points], [str(p["value"]) for p in points])
    axes.minorticks_off()
    axes.set_xlabel(across)
    axes.set_ylabel(up)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
