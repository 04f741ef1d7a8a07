"""METRICS: BLEU-4, ROUGE-L and perplexity over whole test sets, and secondary ones, with 95% intervals. A new metric is one entry here.

A metric turns every prediction into sufficient statistics once; a score is a function of their (weighted) sums, so that intervals and
comparisons (kit.statistics) cost one matrix product. Scores are on the scale that their field uses: BLEU, ROUGE and chrF 0-100.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from kit.config import CHOICES
from kit.errors import UserError, unknown
from kit.resampling import ALPHA
from kit.statistics import intervals
from kit.tokens import STANDARD, Symbols, vocabulary

Array = npt.NDArray[np.float64]
Row = dict[str, Any]
ORDER = 4
CHARACTERS = 6
BLOCK = 64  # rows whose n-grams are counted at once; sorting them stays within the processor's cache


def percent(scores: Array) -> Array:
    """An interval's end beyond the scale is its end."""
    return np.clip(scores, 0, 100)


@dataclass(frozen=True)
class Metric:
    """`statistics`: rows -> [n, k]; `score`: sums [..., k] -> [...], on the scale that seeds are averaged and methods compared on, in `unit`;
    `show`: from that scale to the reported one, rising. `signature` says what exactly was computed. Differences below `margin` do not
    matter; None if nobody can say. `inputs`: the columns that are read. `by_tokens`: `statistics` and `signature` also take a scheme of kit.tokens.
    `proportion`: the score is the percentage of rows that are right.
    """

    title: str
    higher_is_better: bool | None
    statistics: Callable[..., Array]
    score: Callable[[Array], Array]
    signature: Callable[..., str]
    show: Callable[[Array], Array] = percent
    unit: str = "points"
    margin: float | None = None
    secondary: bool = False
    inputs: tuple[str, str] = ("prediction", "reference")
    by_tokens: bool = False
    proportion: bool = False

    def value(self, statistics: Array) -> float | None:
        """The score of these rows as it is reported; None if it is not finite."""
        with np.errstate(all="ignore"):
            shown = float(self.show(self.score(statistics.sum(axis=0))))
        return shown if np.isfinite(shown) else None


def both_sides(rows: Sequence[Row], name: str, tokens: str) -> list[tuple[Symbols, Symbols]]:
    """Each row's prediction and reference as token numbers."""
    sides = (vocabulary(tokens).numbers([r[side] for r in rows], name) for side in ("prediction", "reference"))
    return list(zip(*sides, strict=True))


def overlaps(pairs: Sequence[tuple[Symbols, Symbols]], order: int) -> Array:
    """[n, order, 3]: for each pair of a prediction's and a reference's symbols, the n-grams in either and in both, up to the order.

    An n-gram is numbered by its rank among all pairs' (n-1)-grams and its last symbol, never hashed: the counts are exact.
    """
    return np.concatenate([_overlaps(pairs[i : i + BLOCK], order) for i in range(0, len(pairs), BLOCK)])


def _overlaps(pairs: Sequence[tuple[Symbols, Symbols]], order: int) -> Array:
    sequences = [symbols for pair in pairs for symbols in pair]
    symbols = np.concatenate(sequences)
    size = int(symbols.max(initial=0)) + 1
    lengths = np.array([len(s) for s in sequences])
    side = np.repeat(np.arange(len(sequences)), lengths)  # 2i is the prediction of pair i, 2i + 1 its reference
    left = np.repeat(np.cumsum(lengths), lengths) - np.arange(len(symbols))
    out = np.zeros((len(pairs), order, 3))
    rank = side // 2  # keeps pairs apart from the first order on
    start = np.arange(len(symbols))
    for n in range(order):
        out[:, n, :2] = np.maximum(lengths - n, 0).reshape(-1, 2)
        fits = left[start] > n
        start = start[fits]
        grams, rank = np.unique(rank[fits] * size + symbols[start + n], return_inverse=True)
        predicted = side[start] % 2 == 0
        both = np.minimum(np.bincount(rank[predicted], minlength=len(grams)), np.bincount(rank[~predicted], minlength=len(grams)))
        pair = np.zeros(len(grams), dtype=np.int64)
        pair[rank] = side[start] // 2
        out[:, n, 2] = np.bincount(pair, both, minlength=len(pairs))
        common = both[rank] > 0  # what one side does not have, it does not have with a symbol more
        start, rank = start[common], rank[common]
    return out


def bleu_statistics(rows: Sequence[Row], tokens: str = STANDARD) -> Array:
    """[n, 2 + 2 x 4]: prediction and reference lengths, then matched and total n-grams of the prediction, case kept."""
    found = overlaps(both_sides(rows, "bleu", tokens), ORDER)
    return np.concatenate([found[:, 0, :2], found[:, :, 2], found[:, :, 0]], axis=1)


def bleu_score(sums: Array, *, effective: bool = False) -> Array:
    """Corpus BLEU-4 from summed statistics, sacreBLEU's formula with its "exp" smoothing (Papineni et al. 2002; Post 2018).

    `effective`: of the orders that have n-grams, as for single sentences, which may be too short for the others.
    """
    prediction, reference = sums[..., 0], sums[..., 1]
    matched, total = sums[..., 2 : 2 + ORDER], sums[..., 2 + ORDER :]
    # The k-th order without a match counts 1 / 2^k matches; an order without n-grams makes the score 0.
    missing = (matched == 0) & (total > 0)
    smoothed = np.where(missing, 0.5 ** np.cumsum(missing, axis=-1), matched)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(total > 0, np.log(smoothed / total), 0.0)
        brevity = np.where(prediction < reference, 1 - reference / prediction, 0.0)
        score = 100 * np.exp(logs.sum(axis=-1) / np.maximum((total > 0).sum(axis=-1), 1) + brevity)
    undefined = (total == 0).all(axis=-1) if effective else (total == 0).any(axis=-1)
    return np.where(undefined | (matched.sum(axis=-1) == 0), 0.0, score)


def bleu_signature(tokens: str = STANDARD) -> str:
    import sacrebleu

    return f"corpus BLEU-4|nrefs:1|case:mixed|eff:no|tok:{tokens}|smooth:exp|empty counts|sacrebleu {sacrebleu.__version__}"


def rouge_statistics(rows: Sequence[Row], tokens: str = STANDARD) -> Array:
    """[n, 2]: the example's ROUGE-L F1 in percent (no stemming; LCS by rapidfuzz), and 1."""
    from rapidfuzz.distance import LCSseq

    def f1(prediction: list[int], reference: list[int]) -> float:
        if not prediction or not reference:
            return 0.0
        return 200.0 * LCSseq.similarity(prediction, reference) / (len(prediction) + len(reference))

    return np.array([[f1(prediction.tolist(), reference.tolist()), 1.0] for prediction, reference in both_sides(rows, "rouge", tokens)])


def rouge_signature(tokens: str = STANDARD) -> str:
    by = "rouge_score" if tokens == STANDARD else f"{tokens}, lower case, without punctuation"
    return f"mean ROUGE-L F1|tok:{by}|no stemming|empty counts 0"


def chrf_statistics(rows: Sequence[Row]) -> Array:
    """[n, 3 x 6]: character n-grams of the prediction, of the reference and of both, for each order; white space does not count."""

    def characters(text: str) -> Symbols:
        return np.frombuffer("".join(text.split()).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.int64)

    found = overlaps([(characters(r["prediction"]), characters(r["reference"])) for r in rows], CHARACTERS)
    found[:, :, 0] *= found[:, :, 1] > 0  # as sacreBLEU: without a reference n-gram there is no wrong one
    return found.reshape(len(rows), -1)


def chrf_score(sums: Array) -> Array:
    """Corpus chrF2 from summed statistics, sacreBLEU's formula: precision and recall averaged over orders (Popovic 2015)."""
    prediction, reference, both = np.moveaxis(sums.reshape(*sums.shape[:-1], CHARACTERS, 3), -1, 0)
    orders = np.maximum(((prediction > 0) & (reference > 0)).sum(axis=-1), 1)
    # An order without n-grams has no common ones either, and adds 0 to both.
    precision = (both / np.maximum(prediction, 1)).sum(axis=-1) / orders
    recall = (both / np.maximum(reference, 1)).sum(axis=-1) / orders
    return np.asarray(100 * 5 * precision * recall / np.maximum(4 * precision + recall, np.finfo(float).tiny))


def exact_statistics(rows: Sequence[Row]) -> Array:
    """[n, 2]: 100 if prediction and reference are the same but for space around them, and 1."""
    return np.array([[100.0 * (r["prediction"].strip() == r["reference"].strip()), 1.0] for r in rows])


def length_statistics(rows: Sequence[Row], tokens: str = STANDARD) -> Array:
    """[n, 2]: BLEU's tokens of prediction and reference."""
    return np.array([[len(side) for side in sides] for sides in both_sides(rows, "bleu", tokens)], dtype=np.float64)


def distinct_statistics(rows: Sequence[Row], tokens: str = STANDARD, *, n: int) -> Array:
    """[n, 2]: the reply's share of distinct n-grams in BLEU's tokens, and 1; a shorter reply has none and does not count."""
    found = [reply.tolist() for reply in vocabulary(tokens).numbers([r["prediction"] for r in rows], "bleu")]
    replies = [list(zip(*(reply[i:] for i in range(n)), strict=False)) for reply in found]
    return np.array([[len(set(grams)) / len(grams), 1.0] if grams else [0.0, 0.0] for grams in replies])


def ratio(sums: Array) -> Array:
    return np.asarray(sums[..., 0] / sums[..., 1], dtype=np.float64)


def perplexity_statistics(rows: Sequence[Row]) -> Array:
    """[n, 2]: the negative log-likelihood in nats of the reference reply (with its terminator), and its tokens."""
    return np.array([[r["nll"], r["nll_tokens"]] for r in rows], dtype=np.float64)


def as_is(scores: Array) -> Array:
    return scores


METRICS: dict[str, Metric] = {
    "bleu4": Metric("BLEU-4", True, bleu_statistics, bleu_score, bleu_signature, margin=1.0, by_tokens=True),
    "rouge_l": Metric("ROUGE-L", True, rouge_statistics, ratio, rouge_signature, margin=1.0, by_tokens=True),
    # Compared as 100 ln: differences are per cent, in either direction the same (log percentages, Tornqvist et al. 1985); means are geometric.
    "perplexity": Metric(
        "Perplexity", False, perplexity_statistics, lambda sums: 100 * ratio(sums), lambda: "exp(sum nll / sum tokens)|reference reply tokens and terminator",
        show=lambda scores: np.maximum(np.exp(scores / 100), 1.0), unit="log %", margin=2.0, inputs=("nll", "nll_tokens"),
    ),
    "chrf": Metric("chrF", True, chrf_statistics, chrf_score, lambda: "corpus chrF2|nrefs:1|case:mixed|nc:6|nw:0|space:no", secondary=True),
    "exact_match": Metric("Exact match", True, exact_statistics, ratio, lambda: "% equal|case:mixed|outer space stripped", secondary=True,
                          proportion=True),
    "length_ratio": Metric(
        "Length ratio", None, length_statistics, ratio, lambda tokens=STANDARD: f"sum of reply / sum of reference tokens|tok:{tokens}",
        show=lambda scores: np.maximum(scores, 0.0), unit="", secondary=True, by_tokens=True,
    ),
    # Per reply, unlike Li et al. (2016), whose share of a whole corpus falls with its size.
    **{
        f"distinct_{n}": Metric(
            f"Distinct-{n}", None, partial(distinct_statistics, n=n), ratio, lambda tokens=STANDARD: f"mean distinct / all n-grams of a reply|tok:{tokens}",
            show=as_is, unit="", secondary=True, by_tokens=True,
        )
        for n in (1, 2)
    },
}  # fmt: skip


def split_by(tokens: str) -> dict[str, Metric]:
    """METRICS with words split by a scheme of kit.tokens; UserError for an unknown one."""
    if tokens not in CHOICES["score_tokens"]:
        raise UserError(unknown("score_tokens", tokens, CHOICES["score_tokens"]))

    def using(metric: Metric) -> Metric:
        return (
            replace(metric, statistics=partial(metric.statistics, tokens=tokens), signature=partial(metric.signature, tokens)) if metric.by_tokens else metric
        )

    return {name: using(metric) for name, metric in METRICS.items()}


def scores(rows: Sequence[Row], tokens: str = STANDARD) -> dict[str, dict[str, Any]]:
    """Every metric over the rows: {metric: {value, low, high, n, signature}}, with 95% intervals over rows: bootstrap ones, of proportions Wilson's."""
    return dict(scores_by_source(rows, tokens)["all"])


def scores_by_source(rows: Sequence[Row], tokens: str = STANDARD) -> dict[str, Any]:
    """{"all": scores over all rows, "per_source": {source: scores over its rows}}; raises UserError if there are fewer than 2 rows."""
    if len(rows) < 2:
        raise UserError(f"there is {'only one' if rows else 'no'} prediction to score; an interval takes at least 2")
    metrics = split_by(tokens)
    statistics = {name: metric.statistics(rows) for name, metric in metrics.items()}
    out = intervals([statistics], [r.get("source", "") for r in rows], metrics)
    for block in (out["all"], *out["per_source"].values()):
        for name, score in block.items():
            score["signature"] = metrics[name].signature()
            if metrics[name].proportion and score["low"] is not None:
                score["low"], score["high"] = wilson(score["value"], score["n"])
    return out


def wilson(value: float, n: int) -> tuple[float, float]:
    """The 95% score interval of a percentage of n rows (Wilson 1927, "Probable inference, the law of succession, and statistical inference").

    Rows that are all right or all wrong leave a bootstrap nothing to vary; this interval has a width then too.
    """
    z, share = NormalDist().inv_cdf(1 - ALPHA / 2), value / 100
    middle = share + z**2 / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + (z / (2 * n)) ** 2)
    low, high = (100 * end / (1 + z**2 / n) for end in (middle - half, middle + half))
    # Rounding can put an end on the value's wrong side by a hair, and so beyond the scale.
    return max(0.0, min(low, value)), min(100.0, max(high, value))


def as_evaluate(name: str) -> Any:
    """The metric as an `evaluate.Metric` that needs no network; raises UserError for an unknown name.

    compute(predictions=[...], references=[...]), for perplexity compute(nll=[...], nll_tokens=[...]), returns {name: the value of scores()}.
    """
    if name not in METRICS:
        raise UserError(unknown("metric", name, METRICS))
    import datasets
    import evaluate

    metric = METRICS[name]
    kinds = {"prediction": ("predictions", "string"), "reference": ("references", "string"), "nll": ("nll", "float64"), "nll_tokens": ("nll_tokens", "int64")}
    features = datasets.Features({column: datasets.Value(kind) for column, kind in (kinds[i] for i in metric.inputs)})

    class Module(evaluate.Metric):
        def _info(self) -> Any:
            return evaluate.MetricInfo(description=metric.signature(), citation="", inputs_description="", features=features)

        def _compute(self, **columns: Any) -> dict[str, float | None]:
            rows = [dict(zip(metric.inputs, values, strict=True)) for values in zip(*(columns[f] for f in features), strict=True)]
            return {name: metric.value(metric.statistics(rows))}

    Module.__name__ = name
    return Module(keep_in_memory=True)
