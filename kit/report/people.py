"""Human scores as blocks: means, which method people score higher beside what the metrics say, and agreement; no more than the verdicts support."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kit.report.about import recipe, values
from kit.report.blocks import Block, Bullets, Cell, Heading, Paragraph, Table
from kit.report.rows import MISSING, SCORES, Row, interval, number, title
from kit.report.verdicts import FLIPPED, Said, Verdict, both_ways
from kit.report.words import called, counted, name, names

Pair = tuple[str, str]
# More pairs than this are counted where they would crowd out what else is said.
MANY = 4
DECIDED = ("better", "worse")
# Krippendorff's lowest alpha for tentative conclusions (2004, section 11.4.2).
AGREED = 0.667


def asked_for(rows: Sequence[Row]) -> list[Block]:
    """A hint, where the recipe's published set-up was judged by people and this experiment was not."""
    scored = any("human" in p for p in recipe(rows).get("published", ()))
    if not scored or not any(r["status"] == "done" for r in rows):
        return []
    flags = " ".join(f"{flag}={value}" for flag, key in (("RECIPE", "recipe"), ("NAME", "name")) for value in values(key, rows)[:1])
    text = f"People scored the replies of the published set-up from 0 to 5. There are no such scores here yet: make rate RATER=your-name {flags}"
    return [Heading("Human scores", 3), Paragraph(text, "note")]


def who_scored(rated: Row) -> str:
    """How many replies were scored by whom and on what."""
    of = ("rating is of a reply that has changed since, and", "ratings are of replies that have changed since, and")
    stale = f"{counted(rated['stale'], *of)} left out." if rated["stale"] else ""
    if not rated["criteria"]:
        return stale
    each = rated["by_rater"]
    alike = set(each.values()) == {rated["replies"]}
    raters = names([rater if alike else f"{rater} ({n:,} of them)" for rater, n in each.items()])
    text = f"{rated['replies']:,} different replies, scored from 0 to 5 on {names([*rated['criteria']])} by {raters or 'nobody'}, blind."
    alone = "" if len(each) > 1 else "With one rater nothing shows whether another would say the same."
    how = "Means with 95% intervals over replies, by Student's t; those of rank correlations are percentile bootstrap intervals over test rows."
    return " ".join(filter(None, [text, alone, stale, how]))


def preferences(rated: Row, found: Sequence[Verdict]) -> list[Block]:
    """Each pair of methods on each criterion, and in sentences beside the metrics."""
    if not rated["pairs"]:
        return []
    heads = ["criterion", "a", "b", "verdict on a", "a − b", "95% interval", "p (Holm)", "rows"]
    caption = (
        "By people: differences paired by test row and rater, with the intervals and p of the metrics' verdicts; Holm's correction is over this table, "
        "confounded pairs apart. They are over test rows and hold for these raters; no margin is stated, so no pair is called equivalent."
    )
    table = Table(heads, [_row(v) for v in rated["pairs"]], caption, texts=4, wide=True)
    sentences, quarrel = beside_metrics(rated, found), at_odds(rated)
    return [table, *([Paragraph(quarrel.strip(), "note")] if quarrel else []), *([Bullets(sentences)] if sentences else [])]


def _row(v: Row) -> list[Cell]:
    ends = MISSING if v["low"] is None else f"[{number(v['low'], 2)}, {number(v['high'], 2)}]"
    verdict = (v["verdict"] or v["reason"]) + (" (confounded)" if v["confounded"] else "")
    named = [Cell(v["criterion"]), Cell(title(v["a"])), Cell(title(v["b"])), Cell(verdict)]
    return [*named, Cell(number(v["delta"], 2), v["delta"]), Cell(ends), Cell(number(v["p_holm"], 4), v["p_holm"]), Cell(f"{v['n']:,}", v["n"])]


def agreement(rated: Row) -> list[Block]:
    """How raters agree with each other and with themselves, and what the metrics have to do with their scores."""
    out = []
    for criterion, c in rated["criteria"].items():
        found = {"Krippendorff's alpha": c["alpha"]} | {f"weighted kappa of {p}": v for p, v in c["kappa"].items()}
        found |= {f"{rater} with themselves (weighted kappa)": v for rater, v in c["self_consistency"].items()}
        found |= {f"Spearman's rank correlation with {m}": v for m, v in c["correlation"].items()}
        out += [f"{criterion}, {what}: {interval(v)} ({v['reason'] or 'n = ' + str(v['n'])})" for what, v in found.items()]
    return [Bullets(out)] if out else []


def beside_metrics(rated: Row, found: Sequence[Verdict]) -> list[str]:
    """A sentence for each pair; of many pairs, for those that people tell apart."""
    pairs = told(rated)
    shown = pairs if len(pairs) <= MANY else apart(pairs)
    return [_sentence(rated, both_ways(found), pair, verdicts) for pair, verdicts in shown.items()]


def advice(rated: Row | None, found: Sequence[Verdict]) -> list[str]:
    """What people's scores add to the recommendation."""
    pairs = told(rated) if rated else {}
    if not rated or not pairs:
        return []
    decided = apart(pairs)
    by = f"{n} raters" if (n := len({rater for v in rated["pairs"] for rater in v["raters"]})) > 1 else "one rater"
    told_apart = f"which tells {len(decided) or 'none'} of {counted(len(pairs), 'pair', 'pairs')} of methods apart (see Human scores)."
    text = f"{at_odds(rated)}Replies were also scored by hand, by {by}, {told_apart}"
    sentences = [_sentence(rated, both_ways(found), pair, said) for pair, said in decided.items()]
    return [" ".join([text, *(sentences if len(sentences) <= MANY else ())])]


def at_odds(rated: Row) -> str:
    """A sentence before all others where raters hardly agree: then not being told apart may be their quarrel."""
    least = min((a for c in rated["criteria"].values() if (a := c["alpha"]["value"]) is not None), default=1.0)
    if least >= AGREED:
        return ""
    return (
        f"The raters agree too little to rely on their mean (Krippendorff's alpha down to {least:.3f}; even a tentative conclusion takes {AGREED}, "
        "1 is full agreement, 0 what chance gives). "
    )


def told(rated: Row) -> dict[Pair, dict[str, str]]:
    """{(a, b): {criterion: verdict on a}} of the pairs that can be ranked and have a verdict."""
    out: dict[Pair, dict[str, str]] = {}
    for v in rated["pairs"]:
        if v["verdict"] and not v["confounded"]:
            out.setdefault((v["a"], v["b"]), {})[v["criterion"]] = v["verdict"]
    return out


def apart(pairs: Mapping[Pair, dict[str, str]]) -> dict[Pair, dict[str, str]]:
    return {pair: said for pair, said in pairs.items() if not {*said.values()}.isdisjoint(DECIDED)}


def _sentence(rated: Row, said: Said, pair: Pair, verdicts: Mapping[str, str]) -> str:
    (a, b), words = pair, [*verdicts.values()]
    if "worse" in words and "better" not in words:
        return _sentence(rated, said, (b, a), {criterion: FLIPPED.get(word, word) for criterion, word in verdicts.items()})
    for_a, for_b = (names([criterion for criterion, word in verdicts.items() if word == decided]) for decided in DECIDED)
    raters = {rater for v in rated["pairs"] if {v["a"], v["b"]} == {a, b} for rater in v["raters"]}
    who, prefer = ("People", "prefer") if len(raters) > 1 else ("The only rater", "prefers")
    metrics = _by_verdict(said, pair)
    if not for_a:
        return f"{who} cannot tell {name(a)} and {name(b)} apart on {names([*verdicts])}{_facts(metrics, pair, although=True)}."
    if for_b:
        return f"{who} {prefer} {name(a)} to {name(b)} on {for_a}, and {name(b)} to {name(a)} on {for_b}{_facts(metrics, pair, although=False)}."
    return f"{who} {prefer} {name(a)} to {name(b)} on {for_a}{_echo(metrics)}."


def _by_verdict(said: Said, pair: Pair) -> dict[str, list[str]]:
    """{verdict on a: the metrics that have it}, where the pair can be ranked."""
    out: dict[str, list[str]] = {}
    for metric in SCORES:
        if (v := said.get((*pair, metric))) and not v["confounded"]:
            out.setdefault(v["verdict"], []).append(metric)
    return out


def _echo(metrics: Mapping[str, list[str]]) -> str:
    """Whether the metrics say the same as people, who prefer a."""
    facts = [f"{called(those)} {_verb(those, 'agrees')}" for word, those in metrics.items() if word == "better"]
    facts += [f"{called(those)} {_verb(those, 'says')} the reverse" for word, those in metrics.items() if word == "worse"]
    lead = ", and " if "better" in metrics else ", but " if "worse" in metrics else ", although "
    facts += _undecided(metrics)
    return lead + "; ".join(facts) if facts else ""


def _facts(metrics: Mapping[str, list[str]], pair: Pair, *, although: bool) -> str:
    """What the metrics say where people are for neither, or for each on something; `although` if what they decide is more than people do."""
    decided = [f"{name(method)} is better on {called(metrics[word])}" for method, word in zip(pair, DECIDED, strict=True) if word in metrics]
    facts = [*decided, *_undecided(metrics)]
    return (", although " if decided and although else "; ") + "; ".join(facts) if facts else ""


def _undecided(metrics: Mapping[str, list[str]]) -> list[str]:
    out = [f"{called(metrics['cannot tell'])} cannot tell them apart"] if "cannot tell" in metrics else []
    return out + ([f"there is no difference that matters on {called(metrics['equivalent'])}"] if "equivalent" in metrics else [])


def _verb(subjects: Sequence[str], singular: str) -> str:
    return singular if len(subjects) == 1 else singular.removesuffix("s")
