"""How far chance moves a score, or a difference of two: the studentised bootstrap over rows, exchange of rows, and few seeds.

Rows are given by a metric's statistics [n, k], of whose sums scores are functions. All tables are resampled with the same weights, so
that a difference is paired by row.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from kit.metrics import Metric

Array = npt.NDArray[np.float64]
RESAMPLES = 10_000
# Weights held at once: 8 MiB, within most processors' cache, where counting is three times as fast as in memory.
CHUNK = 2**20
ALPHA = 0.05
PADDING = 2
# Weights up to this many bytes are kept for the next table: 6,000 rows' are 60 MB.
KEPT = 2**27


def resampled(tables: Sequence[Array], sources: Sequence[str]) -> dict[str, list[Array]]:
    """{source: sums [1 + RESAMPLES, k] of each table [n, k]}: first the test rows' own, then those of bootstrap resamples.

    A test set holds a set number of rows of each source, so every source is resampled by itself: sums over sources are stratified.
    """
    names, sizes = np.asarray(sources), sorted(Counter(sources).items())
    table, cuts = np.hstack(tables), np.cumsum([t.shape[1] for t in tables])[:-1]
    drawn = (_kept if len(sources) * RESAMPLES <= KEPT else _weights)(tuple(n for _, n in sizes), RESAMPLES)
    out = {}
    for (source, _), weights in zip(sizes, drawn, strict=True):
        part = table[names == source]
        # The first is no product: numpy adds equal columns to equal sums, so that equal systems differ by exactly 0.
        sums = [part.sum(axis=0, keepdims=True), *(counts.astype(np.float64) @ part for counts in weights)]
        out[source] = np.split(np.concatenate(sums), cuts, axis=1)
    return out


def _weights(sizes: Sequence[int], resamples: int) -> Iterator[Iterator[npt.NDArray[np.uint8]]]:
    """For each number of rows n, in parts: [resamples, n], how often each row is drawn in n draws with replacement.

    Counting draws is much faster than multinomial(). No count comes near 256: of more rows than that, one is drawn so often once in 10^500.
    """
    rng = np.random.default_rng(0)

    def draws(n: int) -> Iterator[npt.NDArray[np.uint8]]:
        step = max(1, CHUNK // n)
        for done in range(0, resamples, step):
            size = min(step, resamples - done)
            drawn = rng.integers(n, size=(size, n), dtype=np.int32) + n * np.arange(size)[:, None]
            yield np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(np.uint8)

    return map(draws, sizes)


@lru_cache(maxsize=1)
def _kept(sizes: tuple[int, ...], resamples: int) -> list[list[npt.NDArray[np.uint8]]]:
    """The weights in memory, since a report resamples the same rows for every method."""
    return [list(weights) for weights in _weights(sizes, resamples)]


def exchanged(differences: Array) -> Array:
    """[RESAMPLES, c]: sums of row differences [n, c] of two methods, with each row's results left or exchanged by the toss of a coin."""
    rng, step = np.random.default_rng(2), max(1, CHUNK // len(differences))
    tosses = (rng.integers(2, size=(min(step, RESAMPLES - done), len(differences)), dtype=np.int8) for done in range(0, RESAMPLES, step))
    return np.concatenate([(2.0 * toss - 1) @ differences for toss in tosses])


def influence(metric: Metric, total: Array, rows: Array) -> Array:
    """[n]: how much of a total's score [k] is due to each of the rows [n, k]: the score with half of it more, minus with half of it less."""
    return np.asarray(metric.score(total + rows / 2) - metric.score(total - rows / 2))


def moments(influences: Array, sources: Sequence[str]) -> Array:
    """[n, 2]: influences from their source's mean, and squared. variance() of a score is made of their sums."""
    names, centred = np.asarray(sources), influences.copy()
    for source in set(sources):
        centred[names == source] -= centred[names == source].mean()
    return np.stack([centred, centred**2], axis=1)


def variance(sums: Mapping[str, Array], count: Mapping[str, int]) -> Array:
    """[1 + RESAMPLES]: the variance of a score over rows, from the resampled() sums of its moments() and the number of rows by source."""
    parts = [count[s] / max(count[s] - 1, 1) * (both[:, 1] - both[:, 0] ** 2 / count[s]) for s, both in sums.items()]
    return np.asarray(np.maximum(np.sum(parts, axis=0), 0))


@dataclass(frozen=True)
class Estimate:
    """A score, or a difference of two: its value, how far chance moves it ([RESAMPLES], by the studentised bootstrap and, for a difference, by
    exchange of rows, alone and with the seeds' noise), what examples and seeds each add to its
    variance, and in how many series of how many seeds (0 if these differ)."""

    value: float
    deviations: Array
    exchanges: Array
    examples: float
    seeds: float
    series: int
    repeats: int
    over: str

    def interval(self, alpha: float = ALPHA) -> tuple[float, float]:
        """Each end is the farther one of the equal-tailed and the symmetric interval (Hall 1988, "On symmetric bootstrap confidence
        intervals"): the first is the better for skewed rows, the second for heavy tails and for few distinct values."""
        low, high = np.quantile(self.deviations, [alpha / 2, 1 - alpha / 2])
        both = np.quantile(np.abs(self.deviations), 1 - alpha)
        return float(self.value - max(high, both)), float(self.value - min(low, -both))

    def p(self) -> float:
        """Of no difference, two-sided: the larger of the level at which the interval would reach 0, and of the share of exchanges with so large
        a difference. What is equal but for rounding is as large."""
        size = abs(self.value) * (1 - 1e-9)
        tail = min(np.count_nonzero(self.deviations >= self.value), np.count_nonzero(self.deviations <= self.value))
        far = max(np.count_nonzero(np.abs(moved) >= size) for moved in (self.deviations, *np.atleast_2d(self.exchanges)))
        return min(1.0, float(1 + max(2 * tail, far)) / (1 + RESAMPLES))

    def reach(self, alpha: float = ALPHA) -> float:
        """Where p < alpha begins: the mean of both directions."""
        low, high = self.interval(alpha)
        return max((high - low) / 2, float(np.quantile(np.abs(np.atleast_2d(self.exchanges)), 1 - alpha, axis=1).max()))


def estimate(score: Array, spread: Array, n: int, df: int, varied: Sequence[Array], exchanges: Array | None = None) -> Estimate:
    """From [1 + RESAMPLES] scores and their variances over n rows on `df` degrees of freedom, the methods' scores [seeds, 1 + RESAMPLES] whose
    seeds vary, and a difference's values after exchanges of rows.

    A resample deviates by so many of its own standard errors (the bootstrap-t; Efron and Tibshirani 1993, section 12.5; errors by the
    infinitesimal jackknife, Jaeckel 1972), which makes up for skew and for few rows. Now and then a resample has no variance: so each takes
    PADDING more rows of the test rows' variance, as uncertain as that is.

    A few seeds cannot be resampled: two have only three means, with half the variance. So the mean over seeds moves by their unbiased
    variance instead, and as Student's t, which allows for how little is known of it. Variances are pooled over both methods of a
    difference, as in Student's two-sample test (of methods with the same seeds, the differences seed by seed stand for both, as in the paired
    one); a method that ran once takes the other's. What varies by seed and example at once is in
    the seeds' variance already and is taken out of the examples', lest it count twice (Owen 2007, "The pigeonhole bootstrap").
    """
    rng, examples, seeds = np.random.default_rng(1), float(spread[0]), 0.0
    own = (n * spread[1:] + PADDING * examples * rng.chisquare(df, RESAMPLES) / df) / (n + PADDING)
    moved = (score[1:] - score[0]) * np.sqrt(examples / own if examples else 0.0)
    swapped = np.zeros(RESAMPLES) if exchanges is None else exchanges
    if seeds_df := sum(len(scores) - 1 for scores in varied):
        share = sum(1 / len(scores) for scores in varied) / seeds_df
        apart = np.concatenate([scores - scores.mean(axis=0) for scores in varied])  # each seed from its method's mean
        both = share * float(((apart[:, 1:] - apart[:, :1]) ** 2).mean(axis=1).sum())
        between = share * float((apart[:, 0] ** 2).sum())
        left = math.sqrt(max(0.0, 1 - both / examples)) if examples else 0.0
        noise = math.sqrt(between) * rng.standard_t(seeds_df, RESAMPLES)
        # With the seeds' noise and without it: noise breaks ties, and of a few rows that differ half of the exchanges may be ties.
        moved, swapped = left * moved + noise, np.stack([swapped, left * swapped + noise])
        seeds = max(0.0, between - both)
    repeats = len(varied[0]) if seeds_df and len({len(scores) for scores in varied}) == 1 else 0
    return Estimate(float(score[0]), moved, swapped, examples, seeds, len(varied), repeats, "seeds and examples" if seeds_df else "examples")


@lru_cache
def student(share: float, df: int) -> float:
    """A quantile above the median of Student's t, found by halving from its distribution for whole degrees of freedom."""
    low, high = 0.0, 1.0
    while _within(high, df) < 2 * share - 1:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, df) < 2 * share - 1 else (low, middle)
    return high


def _within(t: float, df: int) -> float:
    """The probability of no more than t from 0 (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(df))
    term = total = 1.0 if df % 2 == 0 else 0.0 if df == 1 else math.cos(angle)
    for i in range(2 + df % 2, df - 1, 2):
        term *= math.cos(angle) ** 2 * (i - 1) / i
        total += term
    within = math.sin(angle) * total
    return within if df % 2 == 0 else 2 / math.pi * (angle + within)
