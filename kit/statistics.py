"""Whether scores differ: intervals over examples and seeds, paired comparisons, Holm's correction, and what a test set can tell.

All starts from a metric's statistics [n, k]; kit.resampling says how far chance moves their scores. Scores are averaged over seeds and
compared on the metric's own scale (perplexity: 100 times its logarithm).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import combinations
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kit.errors import UserError
from kit.resampling import ALPHA, Array, Estimate, estimate, exchanged, influence, moments, resampled, student, variance

if TYPE_CHECKING:
    from kit.metrics import Metric

Rows = npt.NDArray[np.intp]
Run = Mapping[str, Array]  # {metric: statistics [n, k]} of one seed
POWER = 0.8
# Of fewer rows nobody knows what the next ones would be like, however little these differ.
FEW = 30
MANY = 10_000
MOST_SEEDS = 50
# Pairing halves what is known of the seeds' variance: of fewer seeds it finds less than it gains, unless methods rise and fall together on all of them.
PAIRED_FROM = 5
z, below = NormalDist().inv_cdf, NormalDist().cdf
METHOD_NOTE = (
    "Intervals are 95% studentised bootstrap intervals over the test rows of each source; the spread between several seeds counts too, by "
    "Student's t; methods with five seeds or more are compared seed by seed. "
    "p is the larger of two: the level at which the interval would reach 0, and paired approximate randomisation, which exchanges each row's results between "
    "the methods at random. Better and worse are decided by p with Holm's correction, equivalence by the interval and before them: "
    "what lies within the margin is equivalent whatever its p. "
    "Pairs that must not be ranked are corrected apart and weigh on no other. Intervals, and with them equivalence, are those of one comparison each and are "
    "not corrected for their number; the smallest difference that can be found, and the rows that would decide, are for the correction at its strictest."
)


def _total(drawn: dict[str, list[Array]]) -> list[Array]:
    return [np.sum(parts, axis=0) for parts in zip(*drawn.values(), strict=True)]


def _check(tables: Iterable[Array], sources: Sequence[str]) -> None:
    if any(len(table) != len(sources) for table in tables):
        raise UserError("runs that are averaged or compared must answer the same test rows")


def _influences(metric: Metric, tables: Sequence[Array], parts: Sequence[Rows]) -> Array:
    """[n]: each row's influence on the score of its part, the mean over runs' tables [n, k]."""
    out = np.empty(len(tables[0]))
    for part in parts:
        out[part] = np.mean([influence(metric, table[part].sum(axis=0), table[part]) for table in tables], axis=0)
    return out


def intervals(runs: Sequence[Run], sources: Sequence[str], metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """A method's scores with 95% intervals: {"all": {metric: {value, low, high, seeds, over, n}}, "per_source": {source: the same}}.

    `runs`: one for each seed, over the same test rows. What is not finite is None, and so are the ends where no source has two rows.
    Simulated, intervals of one run cover 93 to 97% from 50 rows on, be they of skewness 6, often 0, or of very different lengths. No method
    knows of rare rows that it did not see: of 20 rows of skewness 6 intervals cover 91%, of 8 85%; of 50 with hardly a 4-gram in common,
    BLEU's cover 90%; and rows that are all equal have an interval without width. Over three seeds they cover up to 98%, over two 99%.
    """
    names, count = np.asarray(sources), Counter(sources)
    tables = [[run[name] for run in runs] for name in metrics]
    kept = [table for found in tables for table in found]
    _check(kept, sources)
    everything, each = [np.arange(len(names))], [np.flatnonzero(names == source) for source in count]
    with np.errstate(all="ignore"):
        kept += [moments(_influences(m, found, parts), sources) for parts in (everything, each) for m, found in zip(metrics.values(), tables, strict=True)]
    drawn = resampled(kept, sources)
    k, end = len(runs), len(runs) * len(metrics)

    def block(sums: Sequence[Array], spreads: Sequence[Array], n: int, df: int) -> dict[str, Any]:
        with np.errstate(all="ignore"):  # what overflows or divides by zero is null in the result
            scores = [np.array([metric.score(s) for s in sums[i * k : (i + 1) * k]]) for i, metric in enumerate(metrics.values())]
            return {name: _interval(metrics[name], s, v, n, df) for name, s, v in zip(metrics, scores, spreads, strict=True)}

    per_source = {s: block(sums, [variance({s: both}, count) for both in sums[end + len(metrics) :]], count[s], count[s] - 1) for s, sums in drawn.items()}
    spreads = [variance({s: sums[end + i] for s, sums in drawn.items()}, count) for i in range(len(metrics))]
    return {"all": block(_total(drawn), spreads, len(names), len(names) - len(count)), "per_source": per_source}


def _interval(metric: Metric, scores: Array, spread: Array, n: int, df: int) -> dict[str, Any]:
    found = estimate(scores.mean(axis=0), spread, n, max(df, 1), [scores])
    shown = metric.show(np.array([found.value, *(found.interval() if df else (math.nan, math.nan))]))
    known = [float(x) if np.isfinite(x) else None for x in shown]
    return dict(zip(("value", "low", "high"), known, strict=True)) | {"seeds": len(scores), "over": found.over, "n": n}


def compare(methods: Mapping[str, Sequence[Run]], sources: Sequence[str], metrics: Mapping[str, Metric], *,
            pairs: Sequence[tuple[str, str]] = (), apart: Collection[tuple[str, str]] = (), untrained: Collection[str] = (),
            seeds: Mapping[str, Sequence[Any]] | None = None) -> list[dict[str, Any]]:  # fmt: skip
    """Pairs of methods (all, if none are given) on every metric. One call is one family: Holm's correction covers all that it returns, but for
    the pairs `apart` (those that nobody may rank), which are a family of their own and weigh on no other.

    `methods`: {method: its runs, one for each seed}, over the same test rows, whose sources are `sources`; `untrained` ones (the base
    model) have no seeds to vary. Methods whose `seeds` are the same, in the same order, and PAIRED_FROM or more, are compared seed by seed:
    a seed gives both the same initial values and order of rows. Raises UserError if rows are too few or a statistic is not finite. A comparison has

    - `metric`, `a`, `b`, `n` rows, their numbers of `seeds`, and what the interval and p are `over`;
    - `delta`, a minus b, its 95% interval `low`, `high`, the metric's `margin` and `detectable`, all in `unit`; `detectable` is the
      smallest difference that is found with 80% power whatever the other comparisons show (at 5% divided by their number), as the mean of
      both directions (alone, for differences of skewness 6, 92% in the one and 70% in the other);
    - `p`, two-sided: the larger of the level at which the interval would reach 0 and of paired approximate randomisation (Riezler and
      Maxwell 2005), which for any number of rows errs at most one time in twenty if either method could have given either's (a corpus
      score's to first order); simulated, at most 5% but for chance, whatever the rows, and 6% for 50 whose differences have mean 0 and skewness 6;
    - `p_holm`, which decides, also where the interval leaves out 0;
    - `verdict`: `equivalent` if the interval lies within the margin (stricter than two one-sided tests at 5%, which take the 90%
      interval; never where both scores are 0, or within the margin of it, which is no measurement, nor on fewer than FEW rows), else
      `better` or `worse` for a (`different` on a metric without a better side) if p_holm < 0.05, else `cannot tell`;
    - `needed`: the examples that would decide an open verdict; None if it is decided, or if not even MANY times as many would do; then
      `needed_seeds` is the number of seeds of each method that would, on these examples, up to MOST_SEEDS.
    """
    df = len(sources) - len(set(sources))
    if df < 1:
        raise UserError(f"{len(sources)} test rows are too few for a comparison; it takes at least 2 rows of a source")
    tables = {(m, name, i): run[name] for m, runs in methods.items() for i, run in enumerate(runs) for name in metrics}
    _check(tables.values(), sources)
    family = [(name, a, b) for name in metrics for a, b in pairs or combinations(methods, 2)]
    with np.errstate(all="ignore"):
        differences, spreads = _contributions(tables, metrics, family, sources)
        drawn = resampled([*tables.values(), *spreads], sources)
        totals = dict(zip(tables, _total(drawn), strict=False))
        scores = {(m, name): np.array([metrics[name].score(totals[m, name, i]) for i in range(len(methods[m]))]) for m, name, _ in tables}
    for (method, name), made in scores.items():
        if not np.isfinite(made).all():
            raise UserError(f"{method}: {metrics[name].title} is not finite on all test rows; it cannot be compared")
    found, count, exchanges = [], Counter(sources), exchanged(differences)
    for i, (name, a, b) in enumerate(family):
        both = seeds is not None and seeds[a] == seeds[b] and len(seeds[a]) >= PAIRED_FROM
        varied = [scores[a, name] - scores[b, name]] if both else [scores[m, name] for m in (a, b) if m not in untrained]
        spread = variance({s: sums[len(tables) + i] for s, sums in drawn.items()}, count)
        score = scores[a, name].mean(axis=0) - scores[b, name].mean(axis=0)
        found.append(estimate(score, spread, len(sources), df, varied, exchanges[:, i]))
    ps, aside = [f.p() for f in found], [(a, b) in apart for _, a, b in family]
    silent = [_silent(metrics[name], scores[a, name], scores[b, name]) for name, a, b in family]
    size = Counter(aside)
    return [
        {"metric": name, "a": a, "b": b, "n": len(sources), "seeds": [len(methods[a]), len(methods[b])]}
        | _judged(metrics[name], f, (p, p_holm), n=len(sources), family=size[group], silent=nothing)
        for (name, a, b), f, p, p_holm, nothing, group in zip(family, found, ps, corrected(ps, aside), silent, aside, strict=True)
    ]


def _silent(metric: Metric, *scores: Array) -> bool:
    """Whether nothing was measured: scores of 0, or so near the floor that no difference between them could leave the margin."""
    floor = (metric.margin or 0.0) if metric.higher_is_better else 0.0
    return all(float(np.abs(s[:, 0]).max()) <= floor for s in scores)


def corrected(ps: Sequence[float], aside: Sequence[bool]) -> list[float]:
    """Holm's correction of those aside and of the others, each by themselves."""
    raised = {group: iter(holm([p for p, g in zip(ps, aside, strict=True) if g == group])) for group in (False, True)}
    return [next(raised[group]) for group in aside]


def _contributions(tables: Mapping[tuple[str, str, int], Array], metrics: Mapping[str, Metric], family: Sequence[tuple[str, str, str]],
                   sources: Sequence[str]) -> tuple[Array, list[Array]]:  # fmt: skip
    """For every comparison: how rows add to the difference [n, c], by the score midway between the methods, so that exchanging a row's results
    turns its sign and nothing else; and moments() of their influences on the methods' own scores."""
    runs: dict[tuple[str, str], list[Array]] = {}
    for (method, name, _), table in tables.items():
        runs.setdefault((method, name), []).append(table)
    mean = {key: np.mean(found, axis=0) for key, found in runs.items()}
    own = {(m, name): _influences(metrics[name], found, [np.arange(len(sources))]) for (m, name), found in runs.items()}
    differences = [influence(metrics[name], (mean[a, name] + mean[b, name]).sum(axis=0) / 2, mean[a, name] - mean[b, name]) for name, a, b in family]
    return np.stack(differences, axis=1), [moments(own[a, name] - own[b, name], sources) for name, a, b in family]


def _judged(metric: Metric, found: Estimate, ps: tuple[float, float], *, n: int, family: int, silent: bool) -> dict[str, Any]:
    (p, p_holm), (low, high) = ps, found.interval()
    margin, verdict, needed, seeds = metric.margin or 0.0, "cannot tell", None, None
    se, level = math.sqrt(found.examples + found.seeds), ALPHA / family
    measured = not silent and n >= FEW
    if -margin < low <= high < margin:
        verdict = "equivalent" if measured else verdict
    elif p_holm < ALPHA:
        verdict = {None: "different", found.value > 0: "better"}.get(metric.higher_is_better, "worse")
    elif se > 0:
        # The standard error with which the test would pass, or the interval fit into the margin, in 4 of 5 cases: whichever takes fewer examples.
        size = abs(found.value)
        wanted = max(size / (found.reach(level) / se + z(POWER)), _fitting(margin, size, (high - low) / 2 / se))
        # More examples shrink their own part of the variance alone.
        room = wanted**2 - found.seeds
        needed = max(n + 1, math.ceil(n * found.examples / room)) if room * MANY > found.examples else None
        seeds = _seeds_needed(found, level) if needed is None else None
    return {"unit": metric.unit, "delta": found.value, "low": low, "high": high, "p": p, "p_holm": p_holm, "verdict": verdict, "margin": metric.margin,
            "detectable": found.reach(level) + z(POWER) * se, "needed": needed, "needed_seeds": seeds,
            "over": found.over}  # fmt: skip


def _fitting(margin: float, size: float, reach: float) -> float:
    """The standard error with which the interval around a difference, which reaches so many of them to either side, fits into the margin in 4 of 5 cases;
    0 if with none. It can leave the margin at both ends, which counts most where there is no difference."""
    if size >= margin:
        return 0.0
    least, most = 0.0, margin / reach
    for _ in range(50):
        se = (least + most) / 2
        fits = below((margin - size) / se - reach) + below((margin + size) / se - reach) - 1
        least, most = (se, most) if fits > POWER else (least, se)
    return least


def _seeds_needed(found: Estimate, level: float) -> int | None:
    """The seeds of each method with which a difference of this size would be found in 4 of 5 cases; None if it takes more than MOST_SEEDS."""
    for n in range(found.repeats + 1, MOST_SEEDS + 1) if found.seeds and found.repeats else ():
        between, df = found.seeds * found.repeats / n, (n - 1) * (found.series if n < PAIRED_FROM else 1)
        reach = math.hypot(z(1 - level / 2) * math.sqrt(found.examples), student(1 - level / 2, df) * math.sqrt(between))
        if reach + z(POWER) * math.sqrt(found.examples + between) <= abs(found.value):
            return n
    return None


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number: the i-th smallest of m times m - i + 1, never falling (Holm 1979)."""
    order = np.argsort(ps, kind="stable")
    raised = np.maximum.accumulate(np.asarray(ps)[order] * np.arange(len(ps), 0, -1)).clip(max=1)
    return [float(p) for p in raised[np.argsort(order)]]
