"""Metrics: equal to the libraries that define them, with right, wrong and empty answers, and honest intervals."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from kit.errors import UserError
from kit.metrics import METRICS, bleu_score, bleu_statistics, rouge_statistics, scores


def rows(pairs: list[tuple[str, str]]) -> list[dict[str, object]]:
    return [{"prediction": p, "reference": r, "nll": 2.0, "nll_tokens": 4} for p, r in pairs]


def random_pairs(n: int) -> list[tuple[str, str]]:
    rng = random.Random(0)
    words = "the a lake river, walks by? 3.5 Anna's UPPER lower-case naïve 漢字 e.g. (yes)".split()
    text = lambda: " ".join(rng.choice(words) for _ in range(rng.randint(1, 30)))  # noqa: E731
    pairs = [(text(), text()) for _ in range(n)]
    return [*pairs, ("", text()), (pairs[0][0], pairs[0][0])]


def test_bleu_equals_sacrebleu() -> None:
    import sacrebleu

    pairs = random_pairs(60)
    expected = sacrebleu.corpus_bleu([p for p, _ in pairs], [[r for _, r in pairs]]).score
    assert float(bleu_score(bleu_statistics(rows(pairs)).sum(axis=0))) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("pair", [("a b c d e", "a b c d e"), ("x y z", "a b c"), ("", "a b c"), ("a", "a"), ("a b q d", "a b c d"), ("a b c", "a b c d e f")])
def test_bleu_of_one_sentence_equals_sacrebleu(pair: tuple[str, str]) -> None:
    import sacrebleu

    expected = sacrebleu.corpus_bleu([pair[0]], [[pair[1]]]).score
    assert float(bleu_score(bleu_statistics(rows([pair])).sum(axis=0))) == pytest.approx(expected, abs=1e-9)


def test_rouge_l_equals_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    pairs = random_pairs(60)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected = [100 * scorer.score(reference, prediction)["rougeL"].fmeasure for prediction, reference in pairs]
    assert rouge_statistics(rows(pairs))[:, 0] == pytest.approx(expected, abs=1e-9)


def test_right_wrong_and_empty_answers() -> None:
    text = "the heron lives by the lake"
    right, wrong, empty = (scores(rows([(p, text)] * 3)) for p in (text, "nothing of it", ""))
    assert right["bleu4"]["value"] == pytest.approx(100)
    assert right["rouge_l"]["value"] == 100
    assert wrong["bleu4"]["value"] == wrong["rouge_l"]["value"] == 0
    assert empty["bleu4"]["value"] == empty["rouge_l"]["value"] == 0


def test_perplexity_is_weighted_by_tokens() -> None:
    made = [{"prediction": "a", "reference": "a", "nll": nll, "nll_tokens": n} for nll, n in ((1.0, 1), (30.0, 10))]
    assert scores(made)["perplexity"]["value"] == pytest.approx(math.exp(31 / 11))


def test_intervals_hold_the_value_and_narrow_with_more_rows() -> None:
    few, many = scores(rows(random_pairs(30))), scores(rows(random_pairs(600)))
    for metric in METRICS:
        for score in (few[metric], many[metric]):
            assert score["low"] <= score["value"] <= score["high"]
            assert score["signature"]
    assert many["rouge_l"]["high"] - many["rouge_l"]["low"] < 0.5 * (few["rouge_l"]["high"] - few["rouge_l"]["low"])


def test_the_interval_of_a_mean_has_the_textbook_width() -> None:
    values = np.random.default_rng(1).normal(50, 10, 400)
    made = [{"prediction": "", "reference": "x", "nll": v, "nll_tokens": 1} for v in values]
    score = scores(made)["perplexity"]
    width = math.log(score["high"]) - math.log(score["low"])
    assert width == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)


def test_scores_that_overflow_are_null() -> None:
    made = [{"prediction": "a", "reference": "a", "nll": 1e6, "nll_tokens": 1}] * 2
    assert scores(made)["perplexity"]["value"] is None


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(UserError, match="no prediction"):
        scores([])
