"""What to use, as far as verdicts and measured costs carry."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations

from kit.config import BASE
from kit.report.ranking import CLEARLY, COST, ahead, cheapest, contenders, fairly_with, families, forgotten, front
from kit.report.rows import COLUMNS, SCORES, Row, number
from kit.report.verdicts import Said, Verdict, beats, both_ways
from kit.report.words import BUILT_IN, built_in, called, change, name, names, sentence


def recommendation(rows: Sequence[Row], found: Sequence[Verdict]) -> list[str]:
    """What to use, as far as verdicts and measured costs carry; methods that cannot fairly be compared are recommended apart or not at all."""
    said, tuned = both_ways(found), [r["method"] for r in contenders(rows)]
    last = [f"{BUILT_IN} This recommendation shows its form alone."] if built_in(rows) else []
    if not tuned:
        return ["There is no recommendation, because no tuned method can be ranked."]
    if len(tuned) == 1:
        if ahead(said, BASE, tuned[0]):
            return [" ".join([sentence(f"{name(tuned[0])} is not worth using."), *_against_base(said, tuned)]), *last]
        against = said.get((tuned[0], BASE, SCORES[0]))
        only = f"{name(tuned[0])} is the only method that can be ranked"
        if against and not against["confounded"]:
            only += ": this says whether it is worth using, and not whether another would be better"
        return [sentence(f"{only}."), *_against_base(said, tuned), *last]
    fair = families(said, tuned)
    if all(ahead(said, BASE, m) for m in tuned):
        return ["Use none of them: the base model, which was not tuned, is ahead of each (better on a metric, worse on none).", *last]
    out = [text for family in fair if len(family) > 1 for text in _within(rows, said, family, alone=len(fair) == 1)]
    single = {f[0]: fairly_with(said, f[0], tuned) for f in fair if len(f) == 1}
    if apart := [name(m) for m, others in single.items() if not others]:
        out.append(f"Not ranked against any other method (see Fairness): {names(apart)}.")
    out += [f"{name(m)} can fairly be compared with {names([name(b) for b in others])} alone: see Results." for m, others in single.items() if others]
    if not any(len(f) > 1 for f in fair):
        out.append("There is no recommendation, because no two methods can fairly be ranked.")
    return [*map(sentence, out), *last]


def _within(rows: Sequence[Row], said: Said, family: Sequence[str], *, alone: bool) -> list[str]:
    first = front(said, family)
    among = "" if alone else f"among {names([name(m) for m in family])}, "
    worth = [m for m in first if not ahead(said, BASE, m)]
    if not first:
        return [sentence(f"{among}the verdicts contradict each other, and there is no recommendation.")]
    if not worth:
        return [sentence(f"{among}use none: the base model is ahead of {names([name(m) for m in first])}, which no other method is ahead of.")]
    if len(worth) == 1:
        text = _alone_in_front(said, worth[0], family)
    elif conflicts := _conflicts(said, worth):
        text = f"the metrics disagree, so it depends on which counts: {'; '.join(conflicts)}. {_by_cost(rows, worth, decides=False)}"
    elif all(v["verdict"] == "equivalent" for (a, b, _), v in said.items() if a in worth and b in worth):
        text = f"no difference that matters between {names([name(m) for m in worth])} on any metric. {_by_cost(rows, worth, decides=_gains(said, worth))}"
    else:
        between = "them" if set(worth) == set(family) and not alone else names([name(m) for m in worth])
        text = f"the scores do not decide between {between}: none is shown to be ahead of another, which does not make them equal. "
        text += _by_cost(rows, worth, decides=False)
    return [sentence(among + text), *_price(rows, said, family, worth), *_forgets(rows, family, worth), *_against_base(said, first)]


def _gains(said: Said, methods: Sequence[str]) -> bool:
    """Whether all are shown to be ahead of the base model, or were not compared with it."""
    return all((m, BASE, SCORES[0]) not in said or ahead(said, m, BASE) for m in methods)


def _alone_in_front(said: Said, method: str, family: Sequence[str]) -> str:
    others, first = [m for m in family if m != method], front(said, family)
    if not _gains(said, [method]):
        if up := [m for m in SCORES if beats(said, method, BASE, m)]:
            down = [m for m in SCORES if beats(said, BASE, method, m)]
            return (f"{name(method)} is not behind any other method, but better than the base model on {called(up)} and worse on {called(down)}: "
                    "whether tuning is worth it depends on which counts.")  # fmt: skip
        return f"{name(method)} is not behind any other method, but no gain over the base model is shown: nothing here says that tuning is worth it."
    if len(first) > 1:
        return f"use {name(method)}: the base model is ahead of {names([name(m) for m in first if m != method])}."
    if len(others) == 1:
        return f"use {name(method)}: {name(others[0])} is worse on {called([m for m in SCORES if beats(said, method, others[0], m)])} and better on nothing."
    return f"use {name(method)}: none is shown to be ahead of it, and each other one is behind some method (worse on a metric, better on none)."


def _conflicts(said: Said, front: Sequence[str]) -> list[str]:
    """What each method in front is better on than another one in front."""
    return [f"{name(a)} is better than {name(b)} on {called(up)}" for a, b in permutations(front, 2) if (up := [m for m in SCORES if beats(said, a, b, m)])]


def _by_cost(rows: Sequence[Row], front: Sequence[str], *, decides: bool = True) -> str:
    least = {key: r for key in COST if (r := cheapest(rows, front, key))}
    if not least:
        return "What they need does not decide either."
    methods = list(dict.fromkeys(r["method"] for r in least.values()))
    needs = {m: names([f"the least {COST[k][0]} ({COST[k][1](r[k])})" for k, r in least.items() if r["method"] == m]) for m in methods}
    if len(methods) == 1:
        return f"Of these {name(methods[0])} needs {needs[methods[0]]}{': use it' if decides else ', if that is what counts'}."
    return f"Choose by what is short: {names([name(m) + ' needs ' + needs[m] for m in methods])}."


def _price(rows: Sequence[Row], said: Said, tuned: Sequence[str], front: Sequence[str]) -> list[str]:
    """A method that is behind but needs the least memory of all, and what it gives up."""
    least = cheapest(rows, tuned, "peak_memory_gib")
    if not least or least["method"] in front:
        return []
    better = next((b for b in front if ahead(said, b, least["method"])), None)
    if better is None:
        return []
    lost = [f"{COLUMNS[m].title} {change(said[least['method'], better, m])}" for m in SCORES if beats(said, better, least["method"], m)]
    needs = f"{name(least['method'])} needs the least memory of all ({number(least['peak_memory_gib'], 2, ' GiB')})"
    return [f"{needs}, at the price of {names(lost)} against {name(better)}."]


def _forgets(rows: Sequence[Row], tuned: Sequence[str], front: Sequence[str]) -> list[str]:
    """What methods in front cost elsewhere, where another one clearly costs less."""
    out = []
    for found in forgotten([r for r in contenders(rows) if r["method"] in tuned]).values():
        after = {r["method"]: p for r in found if (p := r["forgetting"]["perplexity"]["value"]) is not None}
        least = min(after, key=lambda m: after[m], default=None)
        if least and (worse := [m for m in front if m in after and after[least] < CLEARLY * after[m]]):
            before = number(found[0]["forgetting"]["perplexity_before"]["value"], 2)
            who, verb = names([name(m) for m in worse]), "costs" if len(worse) == 1 else "cost"
            after_each = names([f"{number(after[m], 2)} with {name(m)}" for m in worse])
            out.append(f"Elsewhere {who} {verb} more: on general text, where the base model's perplexity is {before}, it is {after_each}, and "
                       f"{number(after[least], 2)} with {name(least)}.")  # fmt: skip
    return out


def _against_base(said: Said, methods: Sequence[str]) -> list[str]:
    """A sentence for all methods of which the same can be said."""
    same: dict[tuple[str, ...], list[str]] = {}
    for m in methods:
        found = [said.get((m, BASE, metric)) for metric in SCORES]
        verdicts = tuple(v["verdict"] if v else "unknown" for v in found)
        same.setdefault((*verdicts, *(found[0]["confounded"] if found[0] else ())), []).append(m)
    return [sentence(_standing(verdicts[: len(SCORES)], verdicts[len(SCORES) :], those)) for verdicts, those in same.items()]


def _standing(verdicts: Sequence[str], reasons: Sequence[str], methods: Sequence[str]) -> str:
    """How methods stand against the base model: one verdict a metric, and the reasons why they must not be ranked."""
    who, (verb, does) = names([name(m) for m in methods]), ("is", "does") if len(methods) == 1 else ("are", "do")
    if "unknown" in verdicts:
        return f"Whether {who} {verb} better than not tuning at all is not known: the base model was not compared with {'it' if verb == 'is' else 'them'}."
    if reasons:
        return f"Whether {who} {verb} better than not tuning at all cannot be said: {'; '.join(reasons)}."
    words = {word: called([m for m, v in zip(SCORES, verdicts, strict=True) if v == word]) for word in ("better", "worse") if word in verdicts}
    if words:
        return f"Against the base model {who} {verb} {', and '.join(f'{word} on {metrics}' for word, metrics in words.items())}."
    same = set(verdicts) == {"equivalent"}
    return f"{who} {f'{does} not differ by what matters' if same else f'{verb} not shown to differ'} from the base model on any metric."
