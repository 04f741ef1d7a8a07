"""Metrics: equal to the libraries that define them, with right, wrong and empty answers, and honest intervals."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import unicodedata
from pathlib import Path

import numpy as np
import pytest

from kit.errors import UserError
from kit.metrics import (
    METRICS,
    as_evaluate,
    bleu_score,
    bleu_statistics,
    chrf_score,
    chrf_statistics,
    rouge_statistics,
    scores,
    scores_by_source,
    split_by,
    wilson,
)
from kit.tokens import vocabulary

# Right, wrong, empty and blank answers, and text that tokenisers, lower case and n-gram counting treat in their own ways.
ODD = [
    ("a b c d e", "a b c d e"), ("x y z", "a b c"), ("", "a b c"), ("a b c", ""), ("", ""), (" \n\t ", "a"), ("a", "a"), ("a b q d", "a b c d"),
    ("a b c", "a b c d e f"), ("a a a a a a", "a a b a a"), ("İstanbul ǅ ß ﬁn", "i̇stanbul ǆ SS fin"), ("naïve e\u0301te\u0301", "naïve été"),
    ("漢字かな 交じり文。", "漢字 交じり文"), ("👩‍👩‍👧 ok 👍🏽", "👩‍👧 ok 👍"), ("a\u00a0b\u2003c\u200bd", "a b c d"), ("\u202eabc\u202c\x00", "abc"),
    ("3.5 -\n4,000-5 <skipped> &amp;quot;", "3.5-4,000 - 5 &quot;"), ("𝔘𝔫𝔦 K", "Uni k"), ("\ud800 lone", "\ud800 lone surrogate"), ("end-\n", "end-"),
    ("a b c d e", "a b c d e f g"),
]  # fmt: skip


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


@pytest.mark.parametrize("pair", ODD)
def test_bleu_of_one_sentence_equals_sacrebleu(pair: tuple[str, str]) -> None:
    import sacrebleu

    expected = sacrebleu.corpus_bleu([pair[0]], [[pair[1]]]).score
    assert float(bleu_score(bleu_statistics(rows([pair])).sum(axis=0))) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("pair", ODD)
def test_bleu_of_a_reply_by_itself_equals_sacrebleus_of_a_sentence(pair: tuple[str, str]) -> None:
    import sacrebleu

    expected = sacrebleu.sentence_bleu(pair[0], [pair[1]]).score
    assert float(bleu_score(bleu_statistics(rows([pair]))[0], effective=True)) == pytest.approx(expected, abs=1e-9)


def test_rouge_l_equals_rouge_score() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    pairs = random_pairs(60)
    scorer = RougeScorer(["rougeL"], use_stemmer=False)
    expected = [100 * scorer.score(reference, prediction)["rougeL"].fmeasure for prediction, reference in pairs]
    assert rouge_statistics(rows(pairs))[:, 0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("pair", ODD)
def test_rouge_l_of_one_reply_equals_rouge_score(pair: tuple[str, str]) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    expected = 100 * RougeScorer(["rougeL"]).score(pair[1], pair[0])["rougeL"].fmeasure
    assert rouge_statistics(rows([pair]))[0, 0] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("pairs", [*([pair] for pair in ODD), ODD, random_pairs(150)])
def test_chrf_equals_sacrebleu(pairs: list[tuple[str, str]]) -> None:
    import sacrebleu

    expected = sacrebleu.corpus_chrf([p for p, _ in pairs], [[r for _, r in pairs]]).score
    assert float(chrf_score(chrf_statistics(rows(pairs)).sum(axis=0))) == pytest.approx(expected, abs=1e-9)


def test_statistics_equal_sacrebleus_for_every_row() -> None:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    pairs = [*random_pairs(150), *ODD]
    texts = [p for p, _ in pairs], [[r for _, r in pairs]]
    assert bleu_statistics(rows(pairs)).tolist() == BLEU()._extract_corpus_statistics(*texts)
    assert chrf_statistics(rows(pairs)).tolist() == CHRF()._extract_corpus_statistics(*texts)


def test_secondary_metrics() -> None:
    made = scores(rows([("a b a b", "a b a b"), (" c d\n", "c d"), ("e", "e f g, h"), ("", "i")]))
    assert made["exact_match"]["value"] == 50
    assert made["length_ratio"]["value"] == pytest.approx((4 + 2 + 1) / (4 + 2 + 5 + 1))
    assert made["distinct_1"]["value"] == pytest.approx((2 / 4 + 1 + 1) / 3)
    assert made["distinct_2"]["value"] == pytest.approx((2 / 3 + 1) / 2)
    assert {name: metric.margin for name, metric in METRICS.items() if not metric.secondary} == {"bleu4": 1, "rouge_l": 1, "perplexity": 2}


def test_the_length_ratio_is_sacrebleus() -> None:
    import sacrebleu

    pairs = random_pairs(60)
    expected = sacrebleu.corpus_bleu([p for p, _ in pairs], [[r for _, r in pairs]])
    assert scores(rows(pairs))["length_ratio"]["value"] == pytest.approx(expected.sys_len / expected.ref_len)


@pytest.mark.parametrize("pair", ODD)
def test_no_answer_gives_a_number_that_is_none(pair: tuple[str, str]) -> None:
    for name, score in scores(rows([pair] * 3)).items():
        ends = [score["value"], score["low"], score["high"]]
        assert ends == [None] * 3 or all(map(math.isfinite, ends)), name


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


def test_an_interval_ends_with_the_scale() -> None:
    made = scores(rows([("a b c d e", "a b c d e"), ("a b c d e", "a b c d e"), ("x", "y")]))
    assert (made["rouge_l"]["low"], made["rouge_l"]["high"]) == (0, 100)
    sure = [row | {"nll": nll} for row, nll in zip(rows([("a", "a")] * 3), (0.0, 0.0, 1.0), strict=True)]
    assert scores(sure)["perplexity"]["low"] == 1


@pytest.mark.parametrize(("value", "n", "ends"), [(0.0, 60, (0, 6.02)), (100.0, 60, (93.98, 100)), (50.0, 2, (9.45, 90.55)), (20.0, 10, (5.67, 50.98))])
def test_an_interval_of_a_proportion_is_wilsons(value: float, n: int, ends: tuple[float, float]) -> None:
    assert wilson(value, n) == pytest.approx(ends, abs=0.005)
    assert wilson(value, n)[0] <= value <= wilson(value, n)[1]


@pytest.mark.parametrize(("reply", "ends"), [("b", (0, 6.02)), ("a", (93.98, 100))])
def test_a_proportion_of_none_or_all_has_an_interval_with_a_width(reply: str, ends: tuple[float, float]) -> None:
    made = [row | {"source": "st"[i % 2]} for i, row in enumerate(rows([(reply, "a")] * 60))]
    found = scores_by_source(made)
    assert (found["all"]["exact_match"]["low"], found["all"]["exact_match"]["high"]) == pytest.approx(ends, abs=0.005)
    assert found["per_source"]["s"]["exact_match"]["high"] - found["per_source"]["s"]["exact_match"]["low"] == pytest.approx(11.35, abs=0.005)
    # Where no source has two rows there is no interval, here as elsewhere.
    assert scores([rows([("a", "a")])[0] | {"source": s} for s in "st"])["exact_match"]["low"] is None


def test_scores_that_overflow_are_null() -> None:
    made = [{"prediction": "a", "reference": "a", "nll": 1e6, "nll_tokens": 1}] * 2
    assert scores(made)["perplexity"]["value"] is METRICS["perplexity"].value(METRICS["perplexity"].statistics(made)) is None


@pytest.mark.parametrize(("pairs", "message"), [([], "no prediction"), ([("a", "a")], "only one prediction")])
def test_too_little_to_score_is_an_error(pairs: list[tuple[str, str]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        scores(rows(pairs))


def test_the_scores_of_a_source_are_those_of_its_rows() -> None:
    made = [row | {"source": "ab"[i % 2]} for i, row in enumerate(rows(random_pairs(38)))]
    both = scores_by_source(made)
    assert both["all"] == scores(made)
    for i, source in enumerate("ab"):
        alone = scores(made[i::2])
        for name, score in both["per_source"][source].items():
            assert (score["value"], score["n"], score["signature"]) == (alone[name]["value"], 20, alone[name]["signature"])
            assert score["low"] == pytest.approx(alone[name]["low"], abs=0.15 * (score["high"] - score["low"]))


EVALUATE = """
import json, sys
from kit.metrics import METRICS, as_evaluate, scores
import evaluate

rows = json.load(sys.stdin)
named = {"prediction": "predictions", "reference": "references"}
for name, metric in METRICS.items():
    module = as_evaluate(name)
    assert isinstance(module, evaluate.Metric)
    given = {named.get(column, column): [row[column] for row in rows] for column in metric.inputs}
    for _ in range(2):
        assert module.compute(**given) == {name: scores(rows)[name]["value"]}, name
"""


def test_evaluate_modules_give_the_same_scores(tmp_path: Path) -> None:
    """In a process of its own: evaluate imports transformers, which must come after Unsloth where other tests use it."""
    made = [row | {"nll": float(i)} for i, row in enumerate(rows(random_pairs(20)))]
    offline = {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1", "HF_METRICS_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", EVALUATE], input=json.dumps(made), env={**os.environ, **offline}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(UserError, match="did you mean 'bleu4'"):
        as_evaluate("bleu")


def test_words_are_the_tokens_of_sacrebleu() -> None:
    """Word by word as by line, whatever stands beside a space."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    rng, whole = random.Random(3), Tokenizer13a()
    pieces = [*"a9.,-&<>'\t\u00a0漢\r\n", "  ", " .", ". ", "-\n", "<skipped>", "&amp;", "&lt;", "3.5", "x,"]
    texts = ["".join(rng.choices(pieces, k=rng.randint(0, 14))) for _ in range(3000)]
    words = vocabulary("13a")
    wanted = [[words.tokens[token] for token in whole(t.rstrip()).split()] for t in texts]
    assert [found.tolist() for found in words.numbers(texts, "bleu")] == wanted


# What the metrics of words are for by other tokens than 13a: right, half right and wrong, in scripts with and without spaces.
SCRIPTS = [
    ("今天天气很好，我们去公园吧。", "今天天气很好，我们去散步吧。"), ("今日は公園へ行きます。", "今日は海へ行きます。"), ("สวัสดีครับ", "สวัสดีค่ะ"),
    ("हिन्दी में यह वाक्य है।", "हिन्दी में वह वाक्य है।"), ("Где живёт цапля? У озера.", "Цапля живёт у озера."), ("نعم، هذا صحيح.", "نعم، هذا خطأ."),
    ("the lake, 3.5 km", "the lake, 3.5 m"), ("at .5 km, -4 C", "at . 5 km, - 4 C"), ("", "漢字"),
]  # fmt: skip


class Splitting:
    """A tokenizer for rouge_score that splits as sacreBLEU does, without punctuation."""

    def __init__(self, scheme: str) -> None:
        from sacrebleu.metrics import BLEU

        self.splitter = BLEU(tokenize=scheme).tokenizer

    def tokenize(self, text: str) -> list[str]:
        return [token for token in self.splitter(text.lower()).split() if not all(unicodedata.category(c)[0] in "PSCZ" for c in token)]


@pytest.mark.parametrize("scheme", ["intl", "zh", "char"])
def test_other_tokens_give_the_scores_of_sacrebleu_and_rouge_score(scheme: str) -> None:
    import sacrebleu
    from rouge_score.rouge_scorer import RougeScorer

    pairs = [*SCRIPTS, *random_pairs(40)]
    found, metrics = scores(rows(pairs), scheme), split_by(scheme)
    bleu = sacrebleu.corpus_bleu([p for p, _ in pairs], [[r for _, r in pairs]], tokenize=scheme)
    assert found["bleu4"]["value"] == pytest.approx(bleu.score, abs=1e-9)
    assert found["length_ratio"]["value"] == pytest.approx(bleu.sys_len / bleu.ref_len)
    scorer = RougeScorer(["rougeL"], tokenizer=Splitting(scheme))
    wanted = [100 * scorer.score(r, p)["rougeL"].fmeasure for p, r in pairs]
    assert metrics["rouge_l"].statistics(rows(pairs))[:, 0].tolist() == pytest.approx(wanted, abs=1e-9)
    assert wanted[0] > 0 or scheme == "intl"  # rouge_score's own tokens give 0
    assert scores(rows(pairs))["rouge_l"]["value"] < found["rouge_l"]["value"]
    assert all(f"tok:{scheme}" in found[name]["signature"] for name in ("bleu4", "rouge_l", "length_ratio", "distinct_1"))
    assert {name: score for name, score in found.items() if name in ("chrf", "perplexity", "exact_match")} == {
        name: score for name, score in scores(rows(pairs)).items() if name in ("chrf", "perplexity", "exact_match")
    }


def test_vowel_signs_count() -> None:
    assert scores(rows([("का कि कु के", "की को कै कं")] * 2), "char")["rouge_l"]["value"] < 70


def test_unknown_tokens_are_named() -> None:
    with pytest.raises(UserError, match="unknown score_tokens 'zhh'; did you mean 'zh'"):
        scores(rows(random_pairs(3)), "zhh")
