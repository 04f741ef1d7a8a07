"""People beside the metrics in the report: who is preferred, whether the metrics agree, who scored what, and what a published set-up was judged by."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_report import Make, made_run
from test_study import row, say

from kit.files import read_json, write_json
from kit.rating.deck import Item, deck, items
from kit.rating.ledger import OVERALL, open_ledger
from kit.report import about, markdown, people, write
from kit.report.blocks import Table
from kit.report.content import document

WORDS = "the lake is blue and cold today".split()
SIGNS = {"+": "better", "-": "worse", "?": "cannot tell"}


def spoken(*criteria: str, raters: tuple[str, ...] = ("anna", "ben"), confounded: tuple[str, ...] = ()) -> dict[str, Any]:
    """People on LoRA against QLoRA, as `fluency +`."""
    said = [criterion.split() for criterion in criteria]
    pairs = [{"criterion": c, "a": "lora", "b": "qlora", "verdict": SIGNS.get(s), "confounded": [*confounded], "raters": [*raters]} for c, s in said]
    return {"pairs": pairs, "criteria": {"overall": {"alpha": {"value": 0.9}}}}


@pytest.mark.parametrize(
    ("criteria", "metrics", "text"),
    [
        (("fluency +",), "???", "People prefer LoRA to QLoRA on fluency, although BLEU-4, ROUGE-L and perplexity cannot tell them apart."),
        (("fluency +", "coherence ?"), "+??", "People prefer LoRA to QLoRA on fluency, and BLEU-4 agrees; ROUGE-L and perplexity cannot tell them apart."),
        (("fluency +",), "--=", "People prefer LoRA to QLoRA on fluency, but BLEU-4 and ROUGE-L say the reverse; "
                                "there is no difference that matters on perplexity."),
        (("fluency -", "coherence -"), "-+?", "People prefer QLoRA to LoRA on fluency and coherence, and BLEU-4 agrees; ROUGE-L says the reverse; "
                                              "perplexity cannot tell them apart."),
        (("fluency +", "coherence -"), "++?", "People prefer LoRA to QLoRA on fluency, and QLoRA to LoRA on coherence; LoRA is better on BLEU-4 and "
                                              "ROUGE-L; perplexity cannot tell them apart."),
        (("overall ?",), "+?-", "People cannot tell LoRA and QLoRA apart on overall, although LoRA is better on BLEU-4; QLoRA is better on perplexity; "
                                "ROUGE-L cannot tell them apart."),
        (("overall ?",), "???", "People cannot tell LoRA and QLoRA apart on overall; BLEU-4, ROUGE-L and perplexity cannot tell them apart."),
    ],
)  # fmt: skip
def test_people_and_metrics_agree_or_disagree_as_far_as_verdicts_go(criteria: tuple[str, ...], metrics: str, text: str) -> None:
    assert people.beside_metrics(spoken(*criteria), say(("lora", "qlora", metrics))) == [text]


def test_one_rater_is_not_people_and_what_has_no_verdict_is_not_spoken_of() -> None:
    metrics = say(("lora", "qlora", "???"))
    assert people.beside_metrics(spoken("fluency +", raters=("anna",)), [])[0] == "The only rater prefers LoRA to QLoRA on fluency."
    for rated in (spoken("fluency few"), spoken("fluency +", confounded=("another GPU",))):
        assert people.beside_metrics(rated, metrics) == people.advice(rated, metrics) == []


def test_the_recommendation_says_what_people_add() -> None:
    assert people.advice(None, []) == []
    (text,) = people.advice(spoken("fluency +"), say(("lora", "qlora", "-??")))
    assert text.startswith(
        "Replies were also scored by hand, by 2 raters, which tells 1 of 1 pair of methods apart (see Human scores). People prefer LoRA to QLoRA"
    )
    assert people.advice(spoken("fluency ?"), []) == [
        "Replies were also scored by hand, by 2 raters, which tells none of 1 pair of methods apart (see Human scores)."
    ]


def test_raters_who_contradict_each_other_are_no_verdict_of_people() -> None:
    rated = spoken("fluency ?") | {"criteria": {"fluency": {"alpha": {"value": -0.62}}, "overall": {"alpha": {"value": None}}}}
    (text,) = people.advice(rated, [])
    assert text.startswith(
        "The raters agree too little to rely on their mean (Krippendorff's alpha down to -0.620; even a tentative conclusion takes 0.667, "
        "1 is full agreement, 0 what chance gives). "
    )
    assert people.at_odds(rated | {"criteria": {"fluency": {"alpha": {"value": 0.7}}}}) == ""


def experiment(tiny: Make) -> Path:
    rng = random.Random(0)
    for method in ("base", "lora"):
        made_run(tiny("--method", method), [" ".join(w for w in WORDS if rng.random() < 0.5) + f" {i}" for i in range(20)])
    return tiny().run_dir.parent


def rate(folder: Path, rater: str, score: Callable[[Item], int], limit: int = 100) -> None:
    with open_ledger(folder, rater, OVERALL) as ledger:
        for card in deck(items(folder), rater, limit=limit, seed=0):
            ledger.add(card, {"overall": score(card)})


def report(tiny: Make) -> tuple[str, dict[str, Any]]:
    given = write.inputs(tiny())
    return markdown.render("", document(given)), write.summary(given)


def test_pairs_stand_in_the_report_and_in_the_summary(tiny: Make) -> None:
    folder = experiment(tiny)
    rng = random.Random(1)
    for rater in ("anna", "ben"):
        rate(folder, rater, lambda card: rng.randint(2, 3) + 2 * ("lora-s0" in card.runs))
    text, summary = report(tiny)
    (pair,) = summary["human"]["pairs"]
    assert [pair[k] for k in ("criterion", "a", "b", "verdict", "n", "raters", "confounded")] == ["overall", "base", "lora", "worse", 20, ["anna", "ben"], []]
    assert f"| overall | base | LoRA | worse | {pair['delta']:.2f} | \\[{pair['low']:.2f}, {pair['high']:.2f}\\] | {pair['p_holm']:.4f} | 20 |" in text
    assert text.count("People prefer LoRA to the base model on overall") == 2, "once in the recommendation, once beside the table"


def test_replies_raters_and_criteria_are_counted_apart(tiny: Make) -> None:
    folder = experiment(tiny)
    rate(folder, "anna", lambda _: 3)
    assert "40 different replies, scored from 0 to 5 on overall by anna, blind. With one rater" in report(tiny)[0]
    rate(folder, "ben", lambda _: 2)
    text = report(tiny)[0]
    assert "40 different replies, scored from 0 to 5 on overall by anna and ben, blind. Means with 95% intervals" in text
    assert "over replies, by Student's t; those of rank correlations are percentile bootstrap intervals over test rows." in text
    rate(folder, "cleo", lambda _: 2, limit=10)
    assert "on overall by anna (40 of them), ben (40 of them) and cleo (10 of them), blind." in report(tiny)[0]


def test_ratings_of_which_no_reply_is_left_make_no_table(tiny: Make) -> None:
    folder = experiment(tiny)
    rate(folder, "anna", lambda _: 3)
    for method in ("base", "lora"):
        made_run(tiny("--method", method), ["other"] * 20)
    text = report(tiny)[0]
    assert "### Human scores\n\n44 ratings are of replies that have changed since, and left out.\n\n## Discussion" in text
    assert people.who_scored({"stale": 1, "criteria": {}}) == "1 rating is of a reply that has changed since, and left out."


def test_a_confounded_pair_is_marked_and_not_preferred(tiny: Make) -> None:
    folder = experiment(tiny)
    made_run(tiny("--method", "base"), ["a lake"] * 20, data="other")
    rate(folder, "anna", lambda card: 1 + 3 * ("lora-s0" in card.runs))
    text = report(tiny)[0]
    assert "| overall | base | LoRA | worse (confounded) |" in text
    assert "prefers" not in text


def test_scores_by_other_tokens_are_not_pooled_with_human_scores(tiny: Make) -> None:
    folder = experiment(tiny)
    rng = random.Random(1)
    rate(folder, "anna", lambda _: rng.randint(0, 5))
    assert [*report(tiny)[1]["human"]["criteria"]["overall"]["correlation"]] == ["BLEU-4", "ROUGE-L"]
    path = folder / "lora-s0" / "eval.json"
    write_json(path, read_json(path) | {"score_tokens": "char"})
    correlation = report(tiny)[1]["human"]["criteria"]["overall"]["correlation"]
    assert {name: c["n"] for name, c in correlation.items()} == {f"{m} by {t} tokens": 20 for m in ("BLEU-4", "ROUGE-L") for t in ("13a", "char")}


# Published set-ups


def following(recipe: str, name: str) -> list[dict[str, Any]]:
    return [row("qlora", config={"recipe": recipe, "name": name})]


def test_what_a_published_study_measured_has_a_column_even_without_a_figure() -> None:
    *_, table = about.published(following("gptneo-t4", "gptneo-t4"))
    assert isinstance(table, Table)
    assert list(table.heads) == ["method", "perplexity", "human 0–5"]
    assert [[c.text for c in cells] for cells in table.rows] == [["QLoRA", "not stated", "not stated"]]
    *_, table = about.published(following("t4-lora-dora", "mine"))
    assert isinstance(table, Table)
    assert [c.text for c in table.rows[0]] == ["LoRA", "— → 10.72", "— → 44.13", "11", "1 h 12 min"]


def test_where_a_published_study_had_people_the_report_says_how_to_ask_some() -> None:
    _, hint = people.asked_for(following("gptneo-t4", "trial"))
    assert hint.text.endswith("There are no such scores here yet: make rate RATER=your-name RECIPE=gptneo-t4 NAME=trial")
    assert people.asked_for(following("qlora-galore", "qlora-galore")) == []
