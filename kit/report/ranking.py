"""Who can be ranked, who is ahead, and who needs the least: what the sentences of the report rest on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from kit.config import BASE
from kit.report.rows import SCORES, Row, duration, number
from kit.report.verdicts import Said, beats

COST: dict[str, tuple[str, Callable[[float], str]]] = {
    "peak_memory_gib": ("memory", lambda v: number(v, 2, " GiB")), "train_wall_s": ("training time", duration),
}  # fmt: skip
# A cost is measured once, without an interval: shares closer to 1 are no difference.
CLEARLY = 0.95


def contenders(rows: Sequence[Row]) -> list[Row]:
    """The tuned methods that can be ranked: evaluated, and no run of theirs failed a check."""
    unfit = {r["method"] for r in rows if r["status"] == "done" and not r["ranked"]}
    done = {r["method"]: r for r in reversed(rows) if r["status"] == "done" and r["method"] not in {BASE, *unfit}}
    return list(reversed(done.values()))


def ahead(said: Said, a: str, b: str) -> bool:
    """Whether a is fairly shown to be better than b on one metric at least, and is worse on none."""
    return any(beats(said, a, b, m) for m in SCORES) and not any((a, b, m) in said and said[a, b, m]["verdict"] == "worse" for m in SCORES)


def families(said: Said, methods: Sequence[str]) -> list[list[str]]:
    """The methods in groups within which all pairs are fair; a method joins the first group that it fits."""
    out: list[list[str]] = []
    for m in methods:
        fits = (f for f in out if all((v := said.get((m, other, SCORES[0]))) and not v["confounded"] for other in f))
        if (home := next(fits, None)) is not None:
            home.append(m)
        else:
            out.append([m])
    return out


def fairly_with(said: Said, method: str, tuned: Sequence[str]) -> list[str]:
    return [b for b in tuned if b != method and (v := said.get((method, b, SCORES[0]))) and not v["confounded"]]


def front(said: Said, family: Sequence[str]) -> list[str]:
    """The methods that no other one is ahead of."""
    return [a for a in family if not any(ahead(said, b, a) for b in family if b != a)]


def cheapest(rows: Sequence[Row], methods: Sequence[str], key: str) -> Row | None:
    """The row that needs the least, if that is known of all and it is clearly less than the others: a cost is measured once a run, without an
    interval. Of several seeds none may need as much as a seed of another method."""

    def ends(row: Row) -> tuple[float, float]:
        return row.get("ranges", {}).get(key) or (row[key], row[key])

    known = sorted((r for r in contenders(rows) if r["method"] in methods and r[key] is not None), key=lambda r: r[key])
    if not known or len(known) < len(methods):
        return None
    least, *others = known
    return least if all(least[key] < CLEARLY * r[key] and ends(least)[1] < ends(r)[0] for r in others) else None


def forgotten(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """{SHA-256 of a text: tuned runs with perplexities on it before and after}; runs may have been measured on different texts."""
    out: dict[str, list[Row]] = {}
    for r in rows:
        if r["method"] != BASE and (f := r["forgetting"]) and f.get("perplexity_before"):
            out.setdefault(f["sha256"], []).append(r)
    return out
