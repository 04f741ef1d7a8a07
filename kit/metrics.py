"""METRICS: BLEU-4, ROUGE-L and perplexity over whole test sets, each with a 95% bootstrap interval. A new metric is one entry here.

A metric turns every prediction into sufficient statistics once; a score is a function of their (weighted) sums, so that an interval
costs one matrix product over resampled weights. All scores are on the scale that their field uses: BLEU and ROUGE 0-100.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from kit.errors import UserError

Array = npt.NDArray[np.float64]
Row = dict[str, Any]
RESAMPLES = 2000
ORDER = 4


@dataclass(frozen=True)
class Metric:
    """`statistics`: rows -> [n, k]; `score`: sums [..., k] -> [...]. `signature` says what exactly was computed."""

    title: str
    higher_is_better: bool
    statistics: Callable[[Sequence[Row]], Array]
    score: Callable[[Array], Array]
    signature: Callable[[], str]


def bleu_statistics(rows: Sequence[Row]) -> Array:
    """[n, 2 + 2 x 4]: hypothesis and reference lengths, then matched and total n-grams, from sacreBLEU (13a tokens, case kept)."""
    from sacrebleu.metrics.bleu import BLEU

    bleu = BLEU()
    # sacreBLEU's own per-sentence statistics; the public API only sums them.
    raw = bleu._extract_corpus_statistics([r["prediction"] for r in rows], [[r["reference"] for r in rows]])
    return np.asarray(raw, dtype=np.float64)


def bleu_score(sums: Array) -> Array:
    """Corpus BLEU-4 from summed statistics, sacreBLEU's formula with its "exp" smoothing (Papineni et al. 2002; Post 2018)."""
    hypothesis, reference = sums[..., 0], sums[..., 1]
    matched, total = sums[..., 2 : 2 + ORDER], sums[..., 2 + ORDER :]
    # The k-th order without a match counts 1 / 2^k matches; an order without n-grams makes the score 0.
    missing = (matched == 0) & (total > 0)
    smoothed = np.where(missing, 0.5 ** np.cumsum(missing, axis=-1), matched)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.log(smoothed / total)
        brevity = np.where(hypothesis < reference, 1 - reference / hypothesis, 0.0)
        score = 100 * np.exp(logs.mean(axis=-1) + brevity)
    return np.where((total == 0).any(axis=-1) | (matched.sum(axis=-1) == 0), 0.0, score)


def bleu_signature() -> str:
    import sacrebleu

    return f"corpus BLEU-4|nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|empty counts|sacrebleu {sacrebleu.__version__}"


def rouge_statistics(rows: Sequence[Row]) -> Array:
    """[n, 2]: the example's ROUGE-L F1 in percent (rouge_score's tokens, no stemming; LCS by rapidfuzz), and 1."""
    from rapidfuzz.distance import LCSseq
    from rouge_score.tokenizers import DefaultTokenizer

    tokenizer = DefaultTokenizer(use_stemmer=False)

    def f1(row: Row) -> float:
        prediction, reference = tokenizer.tokenize(row["prediction"]), tokenizer.tokenize(row["reference"])
        if not prediction or not reference:
            return 0.0
        common = LCSseq.similarity(prediction, reference)
        return 200.0 * common / (len(prediction) + len(reference))

    return np.array([[f1(row), 1.0] for row in rows])


def mean_score(sums: Array) -> Array:
    return np.asarray(sums[..., 0] / sums[..., 1], dtype=np.float64)


def perplexity_statistics(rows: Sequence[Row]) -> Array:
    """[n, 2]: the negative log-likelihood in nats of the reference reply (with its terminator), and its tokens."""
    return np.array([[r["nll"], r["nll_tokens"]] for r in rows], dtype=np.float64)


def perplexity_score(sums: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.asarray(np.exp(sums[..., 0] / sums[..., 1]), dtype=np.float64)


METRICS: dict[str, Metric] = {
    "bleu4": Metric("BLEU-4", True, bleu_statistics, bleu_score, bleu_signature),
    "rouge_l": Metric("ROUGE-L", True, rouge_statistics, mean_score, lambda: "mean ROUGE-L F1|tok:rouge_score|no stemming|empty counts 0"),
    "perplexity": Metric(
        "Perplexity", False, perplexity_statistics, perplexity_score, lambda: "exp(sum nll / sum tokens)|reference reply tokens and terminator"
    ),
}


def scores(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """Every metric over the rows: {metric: {value, low, high, n, signature}}, with 95% percentile bootstrap intervals over rows."""
    if not rows:
        raise UserError("there is no prediction to score")
    weights = np.random.default_rng(0).multinomial(len(rows), np.full(len(rows), 1 / len(rows)), size=RESAMPLES)
    out = {}
    for name, metric in METRICS.items():
        statistics = metric.statistics(rows)
        value = float(metric.score(statistics.sum(axis=0)))
        with np.errstate(invalid="ignore"):  # between two infinite scores lies NaN, which is reported as null below
            low, high = np.quantile(metric.score(weights @ statistics), [0.025, 0.975])
        known = {k: float(v) if np.isfinite(v) else None for k, v in {"value": value, "low": low, "high": high}.items()}
        out[name] = known | {"n": len(rows), "signature": metric.signature()}
    return out
