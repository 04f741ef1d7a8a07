"""Which of two methods people score higher: differences paired by test row and rater, by the procedure of the metrics' own verdicts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from kit.config import BASE
from kit.metrics import Array, Metric, as_is, ratio
from kit.rating.agreement import FEWEST
from kit.rating.ledger import QUESTIONS, Rating
from kit.resampling import ALPHA
from kit.statistics import compare, corrected

Row = dict[str, Any]
Given = dict[str, dict[str, dict[str, int]]]  # {run: {test row: {rater: score}}}
WORST, BEST = 0, 5
# Nobody has said which differences between people's scores do not matter: no margin, and so no pair is called equivalent.
SCORE = Metric("Human score", True, lambda rows: np.array([[r, 1.0] for r in rows]), ratio, lambda: "mean of scores from 0 to 5", show=as_is)


def comparisons(ratings: Sequence[Rating], methods: Mapping[str, Sequence[str]], apart: Collection[tuple[str, str]] = ()) -> list[Row]:
    """Every pair of the methods, {method: its runs}, that people scored, on every criterion; together one family for Holm's correction, but for
    the pairs `apart`, which nobody may rank and which are a family of their own.

    Each is {criterion, a, b, n, raters, delta, low, high, p, p_holm, verdict, over, reason}: `delta` is a minus b over `n` test rows, of which
    each counts the raters who scored all of its replies, so that a strict rater is strict with both methods. Without a `verdict` there is a `reason`.
    """
    first = [r for r in ratings if r.runs and not r.repeat]
    found = []
    for criterion in QUESTIONS:
        given = _scores(first, criterion)
        runs = {m: scored for m, those in methods.items() if (scored := _scored(those, given))}
        found += [{"criterion": criterion, "a": a, "b": b} | _pair(given, {m: runs[m] for m in (a, b)}) for a, b in combinations(runs, 2)]
    return _corrected(found, apart)


def _scores(ratings: Sequence[Rating], criterion: str) -> Given:
    out: Given = {}
    for rating in ratings:
        if criterion in rating.scores:
            for run in rating.runs:
                out.setdefault(run, {}).setdefault(rating.row, {})[rating.rater] = rating.scores[criterion]
    return out


def _scored(runs: Sequence[str], given: Given) -> list[str]:
    """The runs that were rated. A seed that was made later and happens to share a reply or two was not, and would leave the others hardly a common row."""
    counts = {run: len(given.get(run, {})) for run in runs}
    most = max(counts.values(), default=0)
    return [run for run, n in counts.items() if n and 2 * n >= most]


def _pair(given: Given, runs: Mapping[str, Sequence[str]]) -> Row:
    both = [given[run] for those in runs.values() for run in those]
    common = sorted(set.intersection(*map(set, both)))
    raters = {row: sorted(set.intersection(*(set(scores[row]) for scores in both))) for row in common}
    raters = {row: those for row, those in raters.items() if those}
    known = {"n": len(raters), "raters": sorted({rater for those in raters.values() for rater in those})}
    if not raters:
        return known | _untold(None, "no rater scored both on one test row")
    tables = {m: [{"score": _table(given[run], raters)} for run in those] for m, those in runs.items()}
    if len(raters) < FEWEST:
        a, b = (np.mean([SCORE.value(run["score"]) for run in those]) for those in tables.values())
        return known | _untold(float(a - b), f"fewer than {FEWEST} rows")
    seeds = {m: [run.partition("-s")[2] for run in those] for m, those in runs.items()}
    # Rows are drawn for rating whatever their source, so they are resampled as one.
    (v,) = compare(tables, [""] * len(raters), {"score": SCORE}, untrained=[BASE], seeds=seeds)
    ends = {end: float(np.clip(v[end], WORST - BEST, BEST - WORST)) for end in ("low", "high")}
    return known | {k: v[k] for k in ("delta", "p", "p_holm", "verdict", "over")} | ends | {"reason": None}


def _table(scores: Mapping[str, Mapping[str, int]], raters: Mapping[str, Sequence[str]]) -> Array:
    """[n, 2]: each row's mean over its raters, and 1."""
    return SCORE.statistics([np.mean([scores[row][rater] for rater in those]) for row, those in raters.items()])


def _untold(delta: float | None, reason: str) -> Row:
    return dict.fromkeys(("low", "high", "p", "p_holm", "verdict", "over")) | {"delta": delta, "reason": reason}


def _corrected(found: Sequence[Row], apart: Collection[tuple[str, str]]) -> list[Row]:
    """With Holm's correction over all pairs that were tested and are not apart, and over those that are; each was judged alone before."""
    tested = [v for v in found if v["verdict"]]
    raised = iter(corrected([v["p"] for v in tested], [(v["a"], v["b"]) in apart for v in tested]))
    return [v | _judged(v["verdict"], next(raised)) if v["verdict"] else v for v in found]


def _judged(alone: str, p_holm: float) -> Row:
    return {"p_holm": p_holm, "verdict": alone if p_holm < ALPHA else "cannot tell"}
