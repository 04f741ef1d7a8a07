"""Is a difference real, and is the comparison fair? Paired verdicts over the runs' predictions, and the ledger of what else differs."""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

from kit.config import BASE, TRAINING_FIELDS, load_recipe, recipes
from kit.errors import UserError
from kit.methods import METHODS
from kit.metrics import METRICS
from kit.report.answers import Results, common, sources
from kit.report.rows import SCORES, Row, title
from kit.statistics import compare

Verdict = dict[str, Any]
Said = dict[tuple[str, str, str], Verdict]
# What must be the same in two runs beyond their settings, by the name a reader sees.
ALIKE = {"data": "data", "gpu": "GPU", "cpu": "CPU", "versions": "versions", "git": "code revision", "model_revision": "model revision"}


def verdicts(results: Results) -> tuple[list[Verdict], list[str]]:
    """kit.statistics.compare over every pair of methods (seeds together), each with `confounded`: the reasons why it must not be ranked, and
    `clean`: the same on the test rows that resemble no training row, if some do.

    The second list says why there are none, or which methods are left out, since a few rows of one would be too few for all.
    """
    groups = results.groups()
    if len(groups) < 2:
        return [], []
    answers = {m: [results.answers[r["run"]] for r in found] for m, found in groups.items()}
    answered = {m: len(common(found)) for m, found in answers.items()}
    often = Counter(answered.values())
    most, notes = max(often, key=lambda n: (often[n], n)), []  # those of most methods: one run on more rows throws out none
    for m in [m for m, n in answered.items() if n < most]:
        notes.append(f"{title(m)} is left out of the verdicts: it answered {answered[m]:,} test rows and most others {most:,}")
        del answers[m], groups[m]
    if len(groups) < 2:
        return [], notes
    if not (ids := common([a for found in answers.values() for a in found])):
        return [], [*notes, "no verdicts: the runs have no test row in common"]
    metrics = {name: METRICS[name] for name in SCORES}
    reasons = between(groups)

    def compared(ids: Sequence[str]) -> list[Verdict]:
        statistics = {m: [a.of(ids) for a in found] for m, found in answers.items()}
        return compare(statistics, sources(next(iter(answers.values()))[0], ids), metrics, untrained=[BASE],
                       apart={pair for pair, why in reasons.items() if why}, seeds={m: [r["seed"] for r in found] for m, found in groups.items()})  # fmt: skip

    try:
        found = [v | {"confounded": reasons[v["a"], v["b"]], "clean": None} for v in compared(ids)]
    except UserError as error:
        return [], [*notes, f"no verdicts: {error}"]
    leaks = [r["leaks"] for rows in groups.values() for r in rows if r["method"] != BASE and r["leaks"]]
    known = all(len(x.get("ids") or ()) == x["flagged"] for x in leaks)  # an older evaluation has their number alone
    flagged = {i for x in leaks for i in x.get("ids") or ()} if known else set()
    if flagged & set(ids):
        with contextlib.suppress(UserError):  # too few rows are left
            without = compared([i for i in ids if i not in flagged])
            found = [v | {"clean": {k: c[k] for k in ("n", "delta", "low", "high", "p_holm", "verdict")}} for v, c in zip(found, without, strict=True)]
    return found, notes


def between(groups: Mapping[str, Sequence[Row]]) -> dict[tuple[str, str], list[str]]:
    """{(method, method): why the pair must not be ranked} of all pairs."""
    return {(a, b): confounded(groups[a], groups[b]) for a, b in combinations(groups, 2)}


def confounded(first: Sequence[Row], second: Sequence[Row]) -> list[str]:
    """Why a difference between two methods' runs may not be the methods': gates that failed, and what differs beyond the methods themselves."""
    both = [*first, *second]
    base = any(r["method"] == BASE for r in both)
    reasons = list(dict.fromkeys(r["reason"] or "not ranked" for r in both if not r["ranked"]))
    own = (own_settings(group[0]["method"], group[0]["config"].get("recipe")) for group in (first, second))
    allowed = {"method", "seed"}.union(*own, TRAINING_FIELDS if base else (), ("learning_rate",) if all(map(swept, both)) else ())
    for key in sorted({k for r in both for k in r["config"]}):
        # What belongs to a method may differ between methods, not between one method's seeds.
        groups = [both] if key not in allowed else [] if key in ("method", "seed") else [first, second]
        for group in groups:
            values = list(dict.fromkeys(repr(r["config"].get(key)) for r in group if uses(r["method"], key)))
            reasons += [f"{key} {' and '.join(values)}"] if len(values) > 1 else []
    seeds = [sorted(r["seed"] for r in group) for group in (first, second)]
    if not base and seeds[0] != seeds[1]:
        reasons.append(f"seeds {' and '.join(', '.join(map(str, those)) for those in seeds)}: train the missing ones")
    for key, name in ALIKE.items():
        # Training is held against training, which the base model has none of, and evaluation against evaluation.
        stages = ("evaluated",) if base else ("provenance", "evaluated")
        if any(len({repr((r[stage] or {}).get(key)) for r in both}) > 1 for stage in stages):
            reasons.append(f"another {name}" if key != "versions" else "other versions of the libraries")
    if len({(r["generation"] or {}).get("batch_tokens") for r in both}) > 1 and any((r["precision"] or {}).get("name") != "float32" for r in both):
        reasons.append("replies in other batches")
    if len({r["score_tokens"] for r in both}) > 1:
        reasons.append("scored by other tokens")
    if len({(r["precision"] or {}).get("name") for r in both}) > 1:
        reasons.append("another precision")
    tokens = list(dict.fromkeys(r["tokens_supervised"] for r in both))
    # Seeds draw their rows in orders of their own: both methods must have seen the same, not every seed.
    each = [{r["tokens_supervised"] for r in group} for group in (first, second)]
    if not base and (each[0] != each[1] or None in tokens):
        reasons.append(" and ".join(f"{n:,}" for n in tokens) + " supervised tokens" if None not in tokens else "supervised tokens not known")
    return reasons


@functools.cache
def own_settings(method: str, recipe: str | None) -> frozenset[str]:
    """The settings that belong to a method: its entry's, its parts', and the recipe's block for it. They differ because the methods do."""
    block: Mapping[str, Any] = load_recipe(recipe).get("methods", {}).get(method, {}) if recipe and recipe in recipes() else {}
    return frozenset(METHODS[method].settings if method in METHODS else ()) | frozenset(block)


def swept(row: Row) -> bool:
    """Whether the run was made with --tuned: its rate is the one that its method's own sweep found best, and belongs to the method."""
    return bool(row["config"].get("tuned")) and row["method"] in METHODS and not METHODS[row["method"]].parts


def uses(method: str, setting: str) -> bool:
    return method not in METHODS or setting not in METHODS[method].unused


def ledger(results: Results) -> list[tuple[str, str, list[str]]]:
    """(method, method, reasons) of every pair of evaluated methods that is not fair to rank."""
    return [(title(a), title(b), reasons) for (a, b), reasons in between(results.groups()).items() if reasons]


def by_reason(unfair: Sequence[tuple[str, str, list[str]]]) -> list[str]:
    """A line for each set of reasons, with all the pairs that it keeps apart."""
    grouped: dict[str, list[str]] = {}
    for a, b, reasons in unfair:
        grouped.setdefault("; ".join(reasons), []).append(f"{a} and {b}")
    return [f"{', '.join(pairs)}: {reasons}" for reasons, pairs in grouped.items()]


SIGNS = {"better": "+", "worse": "−", "equivalent": "=", "cannot tell": "?", "different": "≠"}
LEGEND = "+ better, − worse, = equivalent, ? cannot tell; * not ranked: the pair differs in more than the method, or failed a check."


def matrix(found: Sequence[Verdict]) -> list[list[str]]:
    """[title, a sign for each metric against every method]: what can be said of each method, against the others in the same order."""
    said, metrics = both_ways(found), list(dict.fromkeys(v["metric"] for v in found))
    methods = list(dict.fromkeys(m for v in found for m in (v["a"], v["b"])))

    def mark(a: str, b: str) -> str:
        shown = [v for m in metrics if (v := said.get((a, b, m)))]
        return "".join(SIGNS[v["verdict"]] for v in shown) + ("*" if shown and shown[0]["confounded"] else "") or "·"

    return [[title(a), *(mark(a, b) for b in methods)] for a in methods]


FLIPPED = {"better": "worse", "worse": "better"}


def both_ways(found: Sequence[Verdict]) -> Said:
    """{(a, b, metric): verdict on a against b} for either order."""

    def mirrored(v: Verdict) -> Verdict:
        return v | {"delta": -v["delta"], "low": -v["high"], "high": -v["low"], "verdict": FLIPPED.get(v["verdict"], v["verdict"])}

    def turned(v: Verdict) -> Verdict:
        return mirrored(v) | {"a": v["b"], "b": v["a"]} | ({"clean": mirrored(v["clean"])} if v.get("clean") else {})

    return {(v["a"], v["b"], v["metric"]): v for v in found} | {(v["b"], v["a"], v["metric"]): turned(v) for v in found}


def best(rows: Sequence[Row], said: Said, metric: str) -> str | None:
    """The method that is shown to be better than every other ranked one on a metric, in comparisons that are all fair; None if there is no such.

    A method that can fairly be compared with no other tuned one (combined, which saw the tokens of two trainings) is no rival while two others can.
    """
    ranked = [m for m in dict.fromkeys(r["method"] for r in rows) if all(r["ranked"] for r in rows if r["method"] == m and r["status"] == "done")]
    ranked = [m for m in ranked if any(a == m for a, _, _ in said)]
    tuned = [m for m in ranked if m != BASE]
    rivals = [a for a in tuned if any((v := said.get((a, b, metric))) and not v["confounded"] for b in tuned if b != a)]
    ranked = [m for m in ranked if m == BASE or m in rivals] if len(rivals) > 1 else ranked
    return next((a for a in ranked if len(ranked) > 1 and all(beats(said, a, b, metric) for b in ranked if b != a)), None)


def beats(said: Said, a: str, b: str, metric: str) -> bool:
    """Whether a is shown to be better than b, and fairly."""
    v = said.get((a, b, metric))
    return v is not None and v["verdict"] == "better" and not v["confounded"]
