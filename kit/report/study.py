"""The report's text, from rows and verdicts alone: it never says more than the verdicts do, and ranks no pair that differs in more than the method."""

from __future__ import annotations

from collections.abc import Sequence

from kit.config import BASE
from kit.methods import METHODS
from kit.metrics import METRICS
from kit.report.ranking import CLEARLY, COST, ahead, cheapest, contenders, fairly_with, families, forgotten, front
from kit.report.rows import COLUMNS, MEAN, SCORES, Row, number, plain
from kit.report.verdicts import Said, Verdict, beats, best, both_ways
from kit.report.words import BUILT_IN, built_in, called, change, counted, name, names, on, percent, sentence

# Where a reader should be told: replies this much longer or shorter than the references, and this share of them unfinished.
LONG, UNFINISHED = 0.2, 0.05
# More methods than this are not listed pair by pair.
MANY = 4


def headline(rows: Sequence[Row], found: Sequence[Verdict]) -> str:
    """The answer in a sentence or two."""
    said, tuned = both_ways(found), [r["method"] for r in contenders(rows)]
    done = [r for r in rows if r["status"] == "done"]
    if not done:
        text = "No run has been evaluated yet, so there is nothing to compare."
    elif all(r["method"] == BASE for r in done):
        text = "Only the base model has been evaluated, so nothing can be said about a method yet."
    elif not tuned:
        text = "No tuned run passed all of its checks, so no method is ranked."
    elif len(tuned) == 1 and (BASE, tuned[0], SCORES[0]) not in said:
        text = f"{name(tuned[0])} is the only method that can be ranked, and there is nothing to compare it with."
    elif len(tuned) < 3:
        text = pair(rows, said, tuned[0], tuned[1] if len(tuned) > 1 else BASE)
    else:
        text = _field(rows, said, tuned)
    if len(tuned) > 1:
        text += _lost(said, tuned)
    return sentence(f"{text} {BUILT_IN}" if built_in(rows) else text)


def _lost(said: Said, tuned: Sequence[str]) -> str:
    """What the base model is better at, since tuning is then not simply worth it."""
    if all(ahead(said, BASE, m) for m in tuned):
        return " None is worth using here: the base model is ahead of each."
    worse: dict[tuple[str, ...], list[str]] = {}
    for m in tuned:
        if on_these := tuple(k for k in SCORES if beats(said, BASE, m, k)):
            worse.setdefault(on_these, []).append(name(m))
    return f" The base model is better than {'; than '.join(f'{names(those)} on {called(k)}' for k, those in worse.items())}." if worse else ""


def pair(rows: Sequence[Row], said: Said, a: str, b: str) -> str:
    """One method against another: what is better, what is worse, what cannot be told, and what it costs."""
    found = [said[a, b, m] for m in SCORES if (a, b, m) in said]
    if not found:
        return f"{name(a)} and {name(b)} cannot be compared yet (see the notes)."
    if reasons := found[0]["confounded"]:  # their numbers are in the order of the methods
        a, b = sorted((a, b), key=[BASE, *METHODS].index) if {a, b} <= {BASE, *METHODS} else (a, b)
        return f"{sentence(name(a))} and {name(b)} differ in more than the method ({'; '.join(reasons)}), so neither is ranked above the other."
    if sum(v["verdict"] == "worse" for v in found) > sum(v["verdict"] == "better" for v in found) and b != BASE:
        return pair(rows, said, b, a)
    parts = []
    for word in ("better", "worse"):
        if those := [v for v in found if v["verdict"] == word]:
            parts.append(f"{word} than {name(b)} on {names([on(v) for v in those])}")
    text = f"On this data {name(a)} is {', and '.join(parts)}" if parts else f"On this data no difference between {name(a)} and {name(b)} is shown"
    for verdict, words in (("equivalent", "no difference that matters"), ("cannot tell", "cannot tell")):
        if those := [v for v in found if v["verdict"] == verdict]:
            text += f"; {called([v['metric'] for v in those])}: {words}"
    costs = relative_costs(rows, a, b)
    return f"{text}; {'it' if parts else name(a)} needs, {_measured(rows, a, b)}, {names(costs)}." if costs else f"{text}."


def _measured(rows: Sequence[Row], a: str, b: str) -> str:
    """How often costs were measured: they carry no interval."""
    return "measured once" if any(r["seed"] != MEAN for r in rows if r["method"] in (a, b)) else "on average over its seeds"


def relative_costs(rows: Sequence[Row], a: str, b: str) -> list[str]:
    """What a needs more or less of than b, as measured."""
    by_method = {r["method"]: r for r in reversed(rows) if r["status"] == "done"}
    out = []
    for key, (what, _) in COST.items():
        x, y = by_method[a][key], by_method[b][key]
        if x is not None and y:
            share, clear = round(100 * (x / y - 1)), not CLEARLY <= x / y <= 1 / CLEARLY
            out.append(f"{abs(share)}% {'less' if share < 0 else 'more'} {what}" if clear else f"about as much {what}")
    return out


def _field(rows: Sequence[Row], said: Said, tuned: Sequence[str]) -> str:
    """Three methods or more: who is better than all others on which metric, and who needs the least."""
    winners = {m: best(rows, said, m) for m in SCORES}
    pairs = [v for (a, b, m), v in said.items() if m == SCORES[0] and a < b]
    unfair = sum(bool(v["confounded"]) for v in pairs)
    some = unfair or any((m, other, SCORES[0]) not in said for m in tuned for other in tuned if other != m)
    others = "every method that it can fairly be compared with" if some else "every other ranked method"
    parts = [f"{name(w)} is better than {'every ranked method' if w == BASE and not some else others} on {called([m for m in SCORES if winners[m] == w])}"
             for w in dict.fromkeys(w for w in winners.values() if w)]  # fmt: skip
    if open_ones := [m for m in SCORES if not winners[m]]:
        where = "any metric" if len(open_ones) == len(SCORES) else " or ".join(COLUMNS[m].title for m in open_ones)
        parts.append(f"no method is shown to be better than all others on {where}")
    parts += _front_of_all(said, tuned) if open_ones else []
    fair = len(families(said, tuned)) == 1
    parts += [f"{name(r['method'])} needs the least {COST[key][0]}, {COST[key][1](r[key])}" for key in COST if fair and (r := cheapest(rows, tuned, key))]
    text = f"On this data {'; '.join(parts)}."
    differ, are = ("differs", "is") if unfair == 1 else ("differ", "are")
    return text + (f" {unfair} of {len(pairs)} pairs {differ} in more than the method and {are} not ranked (see Fairness)." if unfair else "")


def _front_of_all(said: Said, tuned: Sequence[str]) -> list[str]:
    """Who is not behind, where all that can fairly be ranked can be ranked together."""
    found = families(said, tuned)
    first = front(said, found[0])
    if any(fairly_with(said, f[0], tuned) for f in found[1:]) or not 0 < len(first) < len(found[0]) or all(ahead(said, BASE, m) for m in tuned):
        return []
    scope = "" if len(found) == 1 else f" that can be ranked with {'it' if len(first) == 1 else 'them'}"
    return [f"no method is shown to be ahead of {names([name(m) for m in first])}, and each other one{scope} is behind some method"]


def results(rows: Sequence[Row], found: Sequence[Verdict]) -> list[str]:
    """A sentence or two for each metric: against the base model, then between methods."""
    said, tuned, out = both_ways(found), [r["method"] for r in contenders(rows)], []
    for metric in SCORES:
        parts = ["0 for every run: it measures nothing here"] if _at_floor(rows, metric) else []
        parts += _all_against_base(said, tuned, metric)
        fair = [v for (a, b, m), v in said.items() if m == metric and not v["confounded"] and a in tuned and b in tuned and tuned.index(a) < tuned.index(b)]
        if len(tuned) > MANY:  # the matrix and the table of verdicts tell pair by pair
            parts += [_leader(rows, said, metric)] if fair else []
        else:
            wins = [(a, [b for b in tuned if b != a and beats(said, a, b, metric)]) for a in tuned]
            parts += [f"{name(a)} is better than {names([name(b) for b in over])}" for a, over in wins if over]
            for verdict, words in (("equivalent", "no difference that matters between"), ("cannot tell", "cannot tell:")):
                if pairs := "; ".join(f"{name(v['a'])} and {name(v['b'])}" for v in fair if v["verdict"] == verdict):
                    parts.append(f"{words} {pairs}")
        if parts:
            out.append(f"{sentence(COLUMNS[metric].title)}. " + ". ".join(map(sentence, parts)) + ".")
    return out or ["No two runs can be compared yet." if not found else "No two runs can fairly be compared (see Fairness)."]


def _at_floor(rows: Sequence[Row], metric: str) -> bool:
    found = [plain(r, metric) for r in rows if r["status"] == "done" and r[metric]]
    return bool(found) and not any(found)


def _all_against_base(said: Said, tuned: Sequence[str], metric: str) -> list[str]:
    known = [v for m in tuned if (v := said.get((m, BASE, metric))) and not v["confounded"]]
    by_word = {word: [v for v in known if v["verdict"] == word] for word in ("better", "worse", "equivalent", "cannot tell")}
    parts = [f"{word} than the base model: {_listed(those)}" for word, those in by_word.items() if those and word in ("better", "worse")]
    for word, words in (("equivalent", "no difference that matters from the base model"), ("cannot tell", "cannot be told from the base model")):
        parts += [f"{words}: {names([name(v['a']) for v in by_word[word]])}"] if by_word[word] else []
    return parts


def _listed(those: Sequence[Verdict]) -> str:
    """Methods with their differences; of many, the smallest and the largest."""
    if len(those) <= MANY:
        return names([f"{name(v['a'])} ({change(v)})" for v in those])
    least, *_, most = sorted(those, key=lambda v: abs(v["delta"]))
    return f"{names([name(v['a']) for v in those])}, from {change(least)} ({name(least['a'])}) to {change(most)} ({name(most['a'])})"


def _leader(rows: Sequence[Row], said: Said, metric: str) -> str:
    leader = best(rows, said, metric)
    return f"{name(leader)} is better than every method that it can fairly be compared with" if leader else "no method is shown to be better than all others"


def discussion(rows: Sequence[Row], found: Sequence[Verdict]) -> list[str]:
    """What limits and explains the results; each paragraph only if there is something to say."""
    tuned = contenders(rows)
    out = [*_power(found), *_seeds(rows, found), *_leaky(found)]
    if odd := [(r, x) for r in tuned if (x := plain(r, "length_ratio")) is not None and abs(x - 1) > LONG]:
        lengths = names([f"{r['label']} writes {x:.2f} times as much" for r, x in odd])
        out.append(f"Replies and references differ in length, which BLEU-4 weighs: {lengths} as the references.")
    made = [(r, g["unfinished"], r["bleu4"]["n"]) for r in tuned if (g := r["generation"]) and (r["bleu4"] or {}).get("n")]
    if cut := [f"{r['label']}, {n:,.0f} of {of:,}" for r, n, of in made if n > UNFINISHED * of]:
        out.append(f"Replies that reached the longest allowed length and were cut: {'; '.join(cut)}.")
    for forgot in forgotten(rows).values():
        text = forgot[0]["forgetting"]["text"]
        before = number(forgot[0]["forgetting"]["perplexity_before"]["value"], 2)
        out.append(f"On general text ({text}) perplexity went from {before} to "
                   + names([f"{number(r['forgetting']['perplexity']['value'], 2)} with {r['label']}" for r in forgot]) + ".")  # fmt: skip
    missing = [r["label"] for r in rows if r["status"] != "done"]
    return [sentence(text) for text in out] + ([f"Not among the results, for the reasons in the notes: {names(missing)}."] if missing else [])


def _power(found: Sequence[Verdict]) -> list[str]:
    undecided = [v for v in found if v["verdict"] == "cannot tell" and not v["confounded"]]
    if not undecided:
        return []
    n, sizes, open_ones = undecided[0]["n"], [], counted(len(undecided), "open comparison", "open comparisons")
    for metric in SCORES:
        if known := sorted(v["detectable"] for v in undecided if v["metric"] == metric and possible(v)):
            logs = METRICS[metric].unit == "log %"
            least, most = (f"{percent(d) if logs else d:,.1f}" for d in (known[0], known[-1]))
            sizes.append(f"{least if least == most else f'{least} to {most}'}{'%' if logs else ' points'} on {COLUMNS[metric].title}")
    text = "Cannot tell does not mean equal"
    if sizes:
        text += f": with these {n:,} test rows a difference has to be {names(sizes)}, by pair, to be found in 4 of 5 cases, after correction for all pairs"
    out = [text + "."]
    if hopeless := sum(not possible(v) for v in undecided):
        out.append(f"In {hopeless} of the {open_ones} no difference at all could be found: more seeds or rows are needed.")
    if needed := [v["needed"] for v in undecided if v["needed"] is not None]:
        most = f" to {max(needed):,}" if max(needed) > min(needed) else ""
        rows = f"{min(needed):,}{most} rows"
        out.append(f"If the differences are as large as they look, {rows} would decide {len(needed)} of the {open_ones}.")
    if seeds := [v["needed_seeds"] for v in undecided if v["needed_seeds"] is not None]:
        most = f" to {max(seeds)}" if max(seeds) > min(seeds) else ""
        out.append(f"Where no number of rows would, {min(seeds)}{most} seeds of each method would decide {len(seeds)} of the {len(undecided)}.")
    return [" ".join(out)]


def possible(v: Verdict) -> bool:
    """Whether the difference that the test could find exists on the metric's scale; with nothing to go by, it is 0."""
    return bool(v["detectable"] > 0 and (v["unit"] != "points" or v["detectable"] < 100))


def standing(found: Sequence[Verdict]) -> tuple[list[Verdict], list[Verdict]]:
    """The differences that are fairly shown, and of these the ones that are not shown without the test rows that resemble training rows."""
    shown = [v for v in found if v.get("clean") and v["verdict"] in ("better", "worse") and not v["confounded"]]
    return shown, [v for v in shown if v["clean"]["verdict"] != v["verdict"]]


def _leaky(found: Sequence[Verdict]) -> list[str]:
    shown, gone = standing(found)
    if not gone:
        return []
    n, verb, differences = gone[0]["clean"]["n"], "is" if len(gone) == 1 else "are", counted(len(shown), "difference", "differences")
    which = [f"{name(v['a'])} and {name(v['b'])} on {COLUMNS[v['metric']].title} ({change(v | v['clean'])})" for v in gone]
    listed = f": {'; '.join(which)}" if len(which) <= MANY else " (the table of differences names them)"
    return [f"On the {n:,} test rows that resemble no training row, {len(gone)} of the {differences} {verb} not shown{listed}."]


def _seeds(rows: Sequence[Row], found: Sequence[Verdict]) -> list[str]:
    alone = [r["label"] for r in contenders(rows) if r["seed"] != "mean"]
    if not found or not alone:
        return []
    who = "Every method" if len(alone) == len(contenders(rows)) > 1 else names(alone)
    return [f"{who} ran with one seed only: how much another seed would change is not in {'its' if len(alone) == 1 else 'these'} intervals."]
