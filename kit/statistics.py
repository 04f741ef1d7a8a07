"""Whether scores differ: intervals over examples and seeds, paired comparisons, Holm's correction, and what a test set can tell.

All starts from a metric's statistics [n, k]. Every metric, method and seed is resampled with the same weights, so that a difference is
paired by test row. Scores are averaged over seeds and compared on the metric's own scale (perplexity: 100 times its logarithm).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from kit.errors import UserError

if TYPE_CHECKING:
    from kit.metrics import Metric

Array = npt.NDArray[np.float64]
Run = Mapping[str, Array]  # {metric: statistics [n, k]} of one seed
RESAMPLES = 10_000
# Weights held at once: 32 MiB. In float64: float32 would be exact for counts alone, and drawing takes longer than the product.
CHUNK = 2**22
ALPHA, POWER = 0.05, 0.8
MANY = 10_000
ENDS = [ALPHA / 2, 1 - ALPHA / 2]
z = NormalDist().inv_cdf


def resampled(tables: Sequence[Array], sources: Sequence[str]) -> dict[str, list[Array]]:
    """{source: sums [1 + RESAMPLES, k] of each table [n, k]}: first the test rows' own, then those of bootstrap resamples.

    A test set holds a set number of rows of each source, so every source is resampled by itself: sums over sources are stratified.
    """
    if any(len(table) != len(sources) for table in tables):
        raise UserError("runs that are averaged or compared must answer the same test rows")
    names, rng = np.asarray(sources), np.random.default_rng(0)
    table, cuts = np.hstack(tables), np.cumsum([t.shape[1] for t in tables])[:-1]
    out = {}
    for source in sorted(set(sources)):
        part = table[names == source]
        step = max(1, CHUNK // len(part))
        # The first is no product: numpy adds equal columns to equal sums, so that equal systems differ by exactly 0.
        sums = [part.sum(axis=0, keepdims=True)]
        sums += [_weights(rng, min(step, RESAMPLES - done), len(part)) @ part for done in range(0, RESAMPLES, step)]
        out[source] = np.split(np.concatenate(sums), cuts, axis=1)
    return out


def _weights(rng: np.random.Generator, resamples: int, n: int) -> Array:
    """[resamples, n]: how often each of n rows is drawn in n draws with replacement; counting draws is much faster than multinomial()."""
    drawn = rng.integers(n, size=(resamples, n)) + n * np.arange(resamples)[:, None]
    return np.bincount(drawn.ravel(), minlength=resamples * n).reshape(resamples, n).astype(np.float64)


def _total(drawn: dict[str, list[Array]]) -> list[Array]:
    return [np.sum(parts, axis=0) for parts in zip(*drawn.values(), strict=True)]


@dataclass(frozen=True)
class Estimate:
    """A score, or a difference of two: its value, its deviations [RESAMPLES], and what examples and seeds each add to its variance."""

    value: float
    deviations: Array
    examples: float
    seeds: float
    over: str

    @property
    def interval(self) -> tuple[float, float]:
        low, high = self.value + np.quantile(self.deviations, ENDS)
        return float(low), float(high)


def estimate(score: Array, df: int, varied: Sequence[Array]) -> Estimate:
    """From [1 + RESAMPLES] scores on `df` degrees of freedom, and the methods' scores [seeds, 1 + RESAMPLES] whose seeds vary.

    A few seeds cannot be resampled: two have only three means, with half the variance. So the mean over seeds moves by their unbiased
    variance instead, and as Student's t, which allows for how little is known of it; examples do so too. Variances are pooled over
    both methods of a difference, as in Student's two-sample test; a method that ran once takes the other's. What varies by seed and
    example at once is in the seeds' variance already and is taken out of the examples', lest it count twice (Owen 2007, "The pigeonhole
    bootstrap").
    """
    moved, rng = score[1:] - score[0], np.random.default_rng(1)
    examples, seeds = float(moved.var()), 0.0
    moved = moved * np.sqrt(df / rng.chisquare(df, len(moved)))
    if seeds_df := sum(len(scores) - 1 for scores in varied):
        share = sum(1 / len(scores) for scores in varied) / seeds_df
        apart = np.concatenate([scores - scores.mean(axis=0) for scores in varied])  # each seed from its method's mean
        both = share * float(((apart[:, 1:] - apart[:, :1]) ** 2).mean(axis=1).sum())
        spread = share * float((apart[:, 0] ** 2).sum())
        moved = moved * math.sqrt(max(0.0, 1 - both / examples) if examples else 0.0) + math.sqrt(spread) * rng.standard_t(seeds_df, len(moved))
        seeds = max(0.0, spread - both)
    return Estimate(float(score[0]), moved, examples, seeds, "seeds and examples" if seeds_df else "examples")


def intervals(runs: Sequence[Run], sources: Sequence[str], metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """A method's scores with 95% intervals: {"all": {metric: {value, low, high, seeds, over, n}}, "per_source": {source: the same}}.

    `runs`: one for each seed, over the same test rows. What is not finite is None, and so are the ends where no source has two rows.
    """
    drawn = resampled([run[name] for name in metrics for run in runs], sources)
    count = Counter(sources)

    def block(sums: Sequence[Array], n: int, df: int) -> dict[str, Any]:
        starts = range(0, len(sums), len(runs))
        return {name: _interval(m, sums[i : i + len(runs)], df) | {"n": n} for (name, m), i in zip(metrics.items(), starts, strict=True)}

    per_source = {source: block(sums, count[source], count[source] - 1) for source, sums in drawn.items()}
    return {"all": block(_total(drawn), len(sources), len(sources) - len(count)), "per_source": per_source}


def _interval(metric: Metric, sums: Sequence[Array], df: int) -> dict[str, Any]:
    with np.errstate(all="ignore"):  # what overflows or divides by zero is null in the result
        scores = np.array([metric.score(s) for s in sums])
        found = estimate(scores.mean(axis=0), max(df, 1), [scores])
        shown = metric.show(np.array([found.value, *(found.interval if df else (math.nan, math.nan))]))
    known = [float(x) if np.isfinite(x) else None for x in shown]
    return dict(zip(("value", "low", "high"), known, strict=True)) | {"seeds": len(sums), "over": found.over}


def compare(methods: Mapping[str, Sequence[Run]], sources: Sequence[str], metrics: Mapping[str, Metric], *,
            pairs: Sequence[tuple[str, str]] = (), untrained: Collection[str] = ()) -> list[dict[str, Any]]:  # fmt: skip
    """Pairs of methods (all, if none are given) on every metric. One call is one family: Holm's correction covers all that it returns.

    `methods`: {method: its runs, one for each seed}, over the same test rows, whose sources are `sources`; `untrained` ones (the base
    model) have no seeds to vary. Raises UserError if rows are too few or a statistic is not finite. A comparison has

    - `metric`, `a`, `b`, `n` rows, their numbers of `seeds`, and what the interval and p are `over`;
    - `delta`, a minus b, its 95% interval `low`, `high`, the metric's `margin` and `detectable`, all in `unit`; `detectable` is the
      smallest difference that is found with 80% power at p < 0.05;
    - `p`, two-sided, by the paired bootstrap moved to a difference of 0 (Efron and Tibshirani 1993, section 16.4), and `p_holm`;
    - `verdict`: `equivalent` if the interval lies within the margin (stricter than two one-sided tests at 5%, which take the 90%
      interval), else `better` or `worse` for a (`different` on a metric without a better side) if p_holm < 0.05, else `cannot tell`;
    - `needed`: the examples that would decide an open verdict; None if it is decided, or if not even MANY times as many would do.
    """
    df = len(sources) - len(set(sources))
    if df < 1:
        raise UserError(f"{len(sources)} test rows are too few for a comparison; it takes at least 2 rows of a source")
    tables = {(m, name, i): run[name] for m, runs in methods.items() for i, run in enumerate(runs) for name in metrics}
    with np.errstate(all="ignore"):
        sums = dict(zip(tables, _total(resampled(list(tables.values()), sources)), strict=True))
        scores = {(m, name): np.array([metrics[name].score(sums[m, name, i]) for i in range(len(methods[m]))]) for m, name, _ in tables}
    for (method, name), drawn in scores.items():
        if not np.isfinite(drawn).all():
            raise UserError(f"{method}: {metrics[name].title} is not finite on all test rows; it cannot be compared")
    family = [(name, a, b) for name in metrics for a, b in pairs or combinations(methods, 2)]
    found = []
    for name, a, b in family:
        varied = [scores[m, name] for m in (a, b) if m not in untrained]
        found.append(estimate(scores[a, name].mean(axis=0) - scores[b, name].mean(axis=0), df, varied))
    ps = [float(1 + np.count_nonzero(np.abs(f.deviations) >= abs(f.value))) / (1 + RESAMPLES) for f in found]
    return [
        {"metric": name, "a": a, "b": b, "n": len(sources), "seeds": [len(methods[a]), len(methods[b])]} | _judged(metrics[name], f, p, p_holm, len(sources))
        for (name, a, b), f, p, p_holm in zip(family, found, ps, holm(ps), strict=True)
    ]


def _judged(metric: Metric, found: Estimate, p: float, p_holm: float, n: int) -> dict[str, Any]:
    low, high = found.interval
    margin, verdict, needed = metric.margin or 0.0, "cannot tell", None
    se = math.sqrt(found.examples + found.seeds)
    far = np.abs(found.deviations)
    reach = float(np.quantile(far, 1 - ALPHA))  # where p < 0.05 begins
    if -margin < low <= high < margin:
        verdict = "equivalent"
    elif p_holm < ALPHA:
        verdict = {None: "different", found.value > 0: "better"}.get(metric.higher_is_better, "worse")
    elif se > 0:
        # Within the margin the interval is to fit there; else the test is to pass with power, at the level that Holm's factor leaves of 5%.
        size, strict = abs(found.value), float(np.quantile(far, 1 - ALPHA * p / p_holm))
        wanted = (margin - size) / (reach / se) if size < margin else size / (strict / se + z(POWER))
        # More examples shrink their own part of the variance alone.
        room = wanted**2 - found.seeds
        needed = max(n + 1, math.ceil(n * found.examples / room)) if room * MANY > found.examples else None
    return {"unit": metric.unit, "delta": found.value, "low": low, "high": high, "p": p, "p_holm": p_holm, "verdict": verdict, "margin": metric.margin,
            "detectable": reach + z(POWER) * se, "needed": needed, "over": found.over}  # fmt: skip


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number: the i-th smallest of m times m - i + 1, never falling (Holm 1979)."""
    order = np.argsort(ps, kind="stable")
    raised = np.maximum.accumulate(np.asarray(ps)[order] * np.arange(len(ps), 0, -1)).clip(max=1)
    return [float(p) for p in raised[np.argsort(order)]]
