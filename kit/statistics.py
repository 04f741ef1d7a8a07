"""Whether scores differ: intervals over examples and seeds, paired comparisons, Holm's correction, and what a test set can tell.

All starts from a metric's statistics [n, k]. Every metric, method and seed is resampled with the same weights, so that a difference is
paired by test row. Scores are averaged over seeds and compared on the metric's own scale (perplexity: 100 times its logarithm).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
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
PADDING = 2
z = NormalDist().inv_cdf


def resampled(tables: Sequence[Array], sources: Sequence[str]) -> dict[str, list[Array]]:
    """{source: sums [1 + RESAMPLES, k] of each table [n, k]}: first the test rows' own, then those of bootstrap resamples.

    A test set holds a set number of rows of each source, so every source is resampled by itself: sums over sources are stratified.
    """
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


def _check(tables: Iterable[Array], sources: Sequence[str]) -> None:
    if any(len(table) != len(sources) for table in tables):
        raise UserError("runs that are averaged or compared must answer the same test rows")


def _influence(metric: Metric, total: Array, rows: Array) -> Array:
    """[n]: what each of the rows [n, k] adds to the score of a total [k], by the score with half of it more and half of it less."""
    return np.asarray(metric.score(total + rows / 2) - metric.score(total - rows / 2))


def _moments(influence: Array, sources: Sequence[str]) -> Array:
    """[n, 2]: each row's influence from its source's mean, and the square: sums of these give the variance of a score, resampled or not."""
    names, centred = np.asarray(sources), influence.copy()
    for source in set(sources):
        centred[names == source] -= centred[names == source].mean()
    return np.stack([centred, centred**2], axis=1)


def _variance(moments: Mapping[str, Array], count: Mapping[str, int]) -> Array:
    """[1 + RESAMPLES]: the variance of a score over rows, from the sums of _moments() for each source."""
    parts = (count[s] / max(count[s] - 1, 1) * (m[:, 1] - m[:, 0] ** 2 / count[s]) for s, m in moments.items())
    return np.maximum(np.sum(list(parts), axis=0), 0)


def exchanged(differences: Array) -> Array:
    """[RESAMPLES, c]: sums of row differences [n, c] between two methods, each row's results left or exchanged by the toss of a coin."""
    rng, step = np.random.default_rng(2), max(1, CHUNK // len(differences))
    tosses = (rng.integers(2, size=(min(step, RESAMPLES - done), len(differences)), dtype=np.int8) for done in range(0, RESAMPLES, step))
    return np.concatenate([(2.0 * toss - 1) @ differences for toss in tosses])


@dataclass(frozen=True)
class Estimate:
    """A score, or a difference of two: its value, how far chance moves it ([RESAMPLES] by the studentised bootstrap, and for a difference by
    exchanging rows), and what examples and seeds each add to its variance."""

    value: float
    deviations: Array
    exchanges: Array
    examples: float
    seeds: float
    over: str

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """Each end is the farther of the equal-tailed and of the symmetric interval's (Hall 1992, sections 3.5 and 3.6): the one is right
        for skewed rows and too narrow for heavy tails or few distinct values, the other the reverse."""
        low, high = np.quantile(self.deviations, [alpha / 2, 1 - alpha / 2])
        both = np.quantile(np.abs(self.deviations), 1 - alpha)
        return float(self.value - max(high, both)), float(self.value - min(low, -both))

    def p(self) -> float:
        """Of no difference: the largest that the interval's two tests and the exchange of rows give. Ties count, rounding aside."""
        size = abs(self.value) * (1 - 1e-9)
        tail = min(np.count_nonzero(self.deviations >= self.value), np.count_nonzero(self.deviations <= self.value))
        far = max(np.count_nonzero(np.abs(moved) >= size) for moved in (self.deviations, self.exchanges))
        return min(1.0, float(1 + max(2 * tail, far)) / (1 + RESAMPLES))

    def reach(self, alpha: float = ALPHA) -> float:
        """The difference, in either direction alike, where p < alpha begins."""
        low, high = self.interval(alpha)
        return max((high - low) / 2, float(np.quantile(np.abs(self.exchanges), 1 - alpha)))


def estimate(score: Array, variance: Array, n: int, df: int, varied: Sequence[Array], exchanges: Array | None = None) -> Estimate:
    """From [1 + RESAMPLES] scores and their variances over n rows on `df` degrees of freedom, the methods' scores [seeds, 1 + RESAMPLES] whose
    seeds vary, and a difference's values when rows are exchanged.

    A resample's deviation counts in its own standard error (Hall 1992, section 3.10.1), which takes two more rows of the mean variance,
    as uncertain as that is: few rows, or few that differ, now and then draw a resample without any variance.

    A few seeds cannot be resampled: two have only three means, with half the variance. So the mean over seeds moves by their unbiased
    variance instead, and as Student's t, which allows for how little is known of it. Variances are pooled over both methods of a
    difference, as in Student's two-sample test; a method that ran once takes the other's. What varies by seed and example at once is in
    the seeds' variance already and is taken out of the examples', lest it count twice (Owen 2007, "The pigeonhole bootstrap").
    """
    rng, examples, seeds = np.random.default_rng(1), float(variance[0]), 0.0
    drawn = (n * variance[1:] + PADDING * examples * rng.chisquare(df, RESAMPLES) / df) / (n + PADDING)
    moved = (score[1:] - score[0]) * np.sqrt(examples / drawn if examples else 0.0)
    swapped = np.zeros(RESAMPLES) if exchanges is None else exchanges
    if seeds_df := sum(len(scores) - 1 for scores in varied):
        share = sum(1 / len(scores) for scores in varied) / seeds_df
        apart = np.concatenate([scores - scores.mean(axis=0) for scores in varied])  # each seed from its method's mean
        both = share * float(((apart[:, 1:] - apart[:, :1]) ** 2).mean(axis=1).sum())
        spread = share * float((apart[:, 0] ** 2).sum())
        left = math.sqrt(max(0.0, 1 - both / examples)) if examples else 0.0
        noise = math.sqrt(spread) * rng.standard_t(seeds_df, RESAMPLES)
        moved, swapped = left * moved + noise, left * swapped + noise
        seeds = max(0.0, spread - both)
    return Estimate(float(score[0]), moved, swapped, examples, seeds, "seeds and examples" if seeds_df else "examples")


def intervals(runs: Sequence[Run], sources: Sequence[str], metrics: Mapping[str, Metric]) -> dict[str, Any]:
    """A method's scores with 95% intervals: {"all": {metric: {value, low, high, seeds, over, n}}, "per_source": {source: the same}}.

    `runs`: one for each seed, over the same test rows. What is not finite is None, and so are the ends where no source has two rows.
    """
    names, count = np.asarray(sources), Counter(sources)
    tables = {name: [run[name] for run in runs] for name in metrics}
    kept = [table for found in tables.values() for table in found]
    _check(kept, sources)
    with np.errstate(all="ignore"):
        for parts in ([names == names], [names == source for source in count]):  # rows count for the score of all, and for their source's
            for name, found in tables.items():
                influence = np.empty(len(names))
                for part in parts:
                    influence[part] = np.mean([_influence(metrics[name], t[part].sum(axis=0), t[part]) for t in found], axis=0)
                kept.append(_moments(influence, sources))
    drawn = resampled(kept, sources)
    first, k, m = len(kept) - 2 * len(metrics), len(runs), len(metrics)

    def block(sums: Sequence[Array], moments: Sequence[Mapping[str, Array]], n: int, df: int) -> dict[str, Any]:
        parts = enumerate(zip(metrics.items(), moments, strict=True))
        return {name: _interval(metric, sums[i * k : (i + 1) * k], _variance(found, count), n, df) | {"n": n} for i, ((name, metric), found) in parts}

    per_source = {s: block(sums, [{s: found} for found in sums[first + m :]], count[s], count[s] - 1) for s, sums in drawn.items()}
    moments = [{s: sums[i] for s, sums in drawn.items()} for i in range(first, first + m)]
    return {"all": block(_total(drawn), moments, len(names), len(names) - len(count)), "per_source": per_source}


def _interval(metric: Metric, sums: Sequence[Array], variance: Array, n: int, df: int) -> dict[str, Any]:
    with np.errstate(all="ignore"):  # what overflows or divides by zero is null in the result
        scores = np.array([metric.score(s) for s in sums])
        found = estimate(scores.mean(axis=0), variance, n, max(df, 1), [scores])
        shown = metric.show(np.array([found.value, *(found.interval() if df else (math.nan, math.nan))]))
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
    _check(tables.values(), sources)
    family = [(name, a, b) for name in metrics for a, b in pairs or combinations(methods, 2)]
    with np.errstate(all="ignore"):
        differences, moments = _contributions(tables, metrics, family, sources)
        drawn = resampled([*tables.values(), *moments], sources)
        sums = dict(zip(tables, _total(drawn), strict=False))
        scores = {(m, name): np.array([metrics[name].score(sums[m, name, i]) for i in range(len(methods[m]))]) for m, name, _ in tables}
    for (method, name), made in scores.items():
        if not np.isfinite(made).all():
            raise UserError(f"{method}: {metrics[name].title} is not finite on all test rows; it cannot be compared")
    found, count, exchanges = [], Counter(sources), exchanged(differences)
    for i, (name, a, b) in enumerate(family):
        varied = [scores[m, name] for m in (a, b) if m not in untrained]
        variance = _variance({s: parts[len(tables) + i] for s, parts in drawn.items()}, count)
        score = scores[a, name].mean(axis=0) - scores[b, name].mean(axis=0)
        found.append(estimate(score, variance, len(sources), df, varied, exchanges[:, i]))
    ps = [f.p() for f in found]
    return [
        {"metric": name, "a": a, "b": b, "n": len(sources), "seeds": [len(methods[a]), len(methods[b])]} | _judged(metrics[name], f, p, p_holm, len(sources))
        for (name, a, b), f, p, p_holm in zip(family, found, ps, holm(ps), strict=True)
    ]


def _contributions(tables: Mapping[tuple[str, str, int], Array], metrics: Mapping[str, Metric], family: Sequence[tuple[str, str, str]],
                   sources: Sequence[str]) -> tuple[Array, list[Array]]:  # fmt: skip
    """For every comparison, how rows contribute to a difference: [n, c] from midway between the methods, which changes its sign when a row's
    results are exchanged; and _moments() of their influences on either method's own score."""
    runs: dict[tuple[str, str], list[Array]] = {}
    for (method, name, _), table in tables.items():
        runs.setdefault((method, name), []).append(table)
    mean = {key: np.mean(found, axis=0) for key, found in runs.items()}
    own = {(m, name): np.mean([_influence(metrics[name], t.sum(axis=0), t) for t in found], axis=0) for (m, name), found in runs.items()}
    differences = [_influence(metrics[name], (mean[a, name] + mean[b, name]).sum(axis=0) / 2, mean[a, name] - mean[b, name]) for name, a, b in family]
    return np.stack(differences, axis=1), [_moments(own[a, name] - own[b, name], sources) for name, a, b in family]


def _judged(metric: Metric, found: Estimate, p: float, p_holm: float, n: int) -> dict[str, Any]:
    low, high = found.interval()
    margin, verdict, needed = metric.margin or 0.0, "cannot tell", None
    se = math.sqrt(found.examples + found.seeds)
    if -margin < low <= high < margin:
        verdict = "equivalent"
    elif p_holm < ALPHA:
        verdict = {None: "different", found.value > 0: "better"}.get(metric.higher_is_better, "worse")
    elif se > 0:
        # Within the margin the interval is to fit there; else the test is to pass with power, at the level that Holm's factor leaves of 5%.
        size = abs(found.value)
        wanted = (margin - size) / ((high - low) / 2 / se) if size < margin else size / (found.reach(ALPHA * p / p_holm) / se + z(POWER))
        # More examples shrink their own part of the variance alone.
        room = wanted**2 - found.seeds
        needed = max(n + 1, math.ceil(n * found.examples / room)) if room * MANY > found.examples else None
    return {"unit": metric.unit, "delta": found.value, "low": low, "high": high, "p": p, "p_holm": p_holm, "verdict": verdict, "margin": metric.margin,
            "detectable": found.reach() + z(POWER) * se, "needed": needed, "over": found.over}  # fmt: skip


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number: the i-th smallest of m times m - i + 1, never falling (Holm 1979)."""
    order = np.argsort(ps, kind="stable")
    raised = np.maximum.accumulate(np.asarray(ps)[order] * np.arange(len(ps), 0, -1)).clip(max=1)
    return [float(p) for p in raised[np.argsort(order)]]
