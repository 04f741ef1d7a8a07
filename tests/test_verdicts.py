"""Verdicts say only what the predictions support, and no confounded pair passes as a fair one."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
from test_report import PROVENANCE, made_run

from kit.config import RunConfig, recipes
from kit.files import read_json, write_json
from kit.methods import METHODS
from kit.report import markdown, write
from kit.report.answers import gather
from kit.report.content import document
from kit.report.rows import blank
from kit.report.tables import verdict_table
from kit.report.verdicts import best, both_ways, confounded, ledger, matrix, own_settings, verdicts
from kit.settings import resolve

Make = Callable[..., RunConfig]
GOOD, BAD = "the lake is blue", "a hill was red"


def replies(share: float, seed: int, n: int = 80) -> list[str]:
    rng = random.Random(seed)
    return [GOOD if rng.random() < share else BAD for _ in range(n)]


def said(tiny: Make) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(v["a"], v["b"], v["metric"]): v for v in verdicts(gather(tiny().run_dir.parent))[0]}


def test_a_clear_difference_a_tie_and_a_doubt(tiny: Make) -> None:
    made_run(tiny("--method", "qlora"), replies(0.9, 1))
    made_run(tiny("--method", "lora"), replies(0.2, 2))
    made_run(tiny("--method", "dora"), replies(0.15, 3))
    found = said(tiny)
    assert len(found) == 3 * 3
    assert found["qlora", "lora", "rouge_l"]["verdict"] == "better"
    assert found["qlora", "lora", "perplexity"]["verdict"] == "equivalent"  # the same likelihoods
    assert found["lora", "dora", "rouge_l"]["verdict"] == "cannot tell"
    assert found["lora", "dora", "rouge_l"]["needed"] > 80
    assert all(v["confounded"] == [] for v in found.values())
    assert ledger(gather(tiny().run_dir.parent)) == []


@pytest.mark.parametrize(
    ("flags", "trained", "reason"),
    [
        (("--epochs", "3"), {}, "epochs 1 and 3.0"),
        (("--limit-train", "50"), {}, "limit_train None and 50"),
        ((), {"tokens_supervised": 2000}, "1,000 and 2,000 supervised tokens"),
        (("--seed", "1"), {}, "seeds 0 and 1: train the missing ones"),
        ((), {"provenance": PROVENANCE | {"gpu": "Tesla T4"}}, "another GPU"),
        ((), {"provenance": PROVENANCE | {"cpu": "d"}}, "another CPU"),
        ((), {"provenance": PROVENANCE | {"data": "of before"}}, "another data"),
        ((), {"provenance": PROVENANCE | {"git": "abc"}}, "another code revision"),
        ((), {"provenance": PROVENANCE | {"model_revision": "abc"}}, "another model revision"),
        ((), {"provenance": PROVENANCE | {"versions": {"python": "4"}}}, "other versions of the libraries"),
        ((), {"gates": {"moved": {"passed": False, "detail": "0 of 84 trainable tensors changed"}}}, "not ranked; moved: 0 of 84 trainable tensors changed"),
    ],
)
def test_what_differs_beyond_the_method_is_named(tiny: Make, flags: tuple[str, ...], trained: dict[str, Any], reason: str) -> None:
    made_run(tiny("--method", "qlora"), replies(0.9, 1))
    made_run(tiny("--method", "lora", *flags), replies(0.2, 2), trained=trained)
    found = said(tiny)
    assert {tuple(v["confounded"]) for v in found.values()} == {(reason,)}
    assert ledger(gather(tiny().run_dir.parent)) == [("QLoRA", "LoRA", [reason])]


@pytest.mark.parametrize(
    ("methods", "tuned", "reasons"),
    [
        (("qlora", "lora"), (True, True), []),
        (("qlora", "lora"), (True, False), ["learning_rate 0.002 and 0.004", "tuned True and False"]),
        (("qlora", "hybrid"), (True, True), ["learning_rate 0.002 and 0.004"]),  # for which there is no sweep
    ],
)
def test_methods_at_their_swept_rates_are_ranked(tiny: Make, methods: tuple[str, str], tuned: tuple[bool, bool], reasons: list[str]) -> None:
    for method, by_sweep, rate in zip(methods, tuned, ("2e-3", "4e-3"), strict=True):
        made_run(tiny("--method", method, "--learning-rate", rate, *(["--tuned"] if by_sweep else [])), replies(0.5, 1))
    assert [v["confounded"] for v in said(tiny).values()] == [reasons] * 3


def test_a_pair_that_must_not_be_ranked_decides_no_other(tiny: Make) -> None:
    made_run(tiny("--method", "qlora"), replies(0.5, 1))
    made_run(tiny("--method", "lora"), replies(0.3, 2))
    alone = said(tiny)
    made_run(tiny("--method", "dora", "--epochs", "3"), replies(0.9, 3))
    together = said(tiny)
    assert together["qlora", "dora", "rouge_l"]["confounded"]
    assert all(together[pair] == v for pair, v in alone.items())


def test_what_only_leaks_show_is_told(tiny: Make) -> None:
    """QLoRA knows the 40 rows that resemble training rows, and no others."""
    leaks = {"flagged": 40, "ids": [f"alpaca-{i:03d}" for i in range(40)], "without": None}
    for method, known in (("qlora", 1.0), ("lora", 0.1)):
        made_run(tiny("--method", method), [*replies(known, 1, 40), *replies(0.5, 2, 40)], leaks=leaks)
    found = said(tiny)["qlora", "lora", "rouge_l"]
    assert (found["verdict"], found["clean"]["verdict"], found["clean"]["n"], found["clean"]["delta"]) == ("better", "equivalent", 40, 0.0)
    assert both_ways([found])["lora", "qlora", "rouge_l"]["clean"]["verdict"] == "equivalent"
    given = write.inputs(tiny())
    assert given.notes[0].endswith("Length and leaks has the scores without them, and 0 of the 2 differences stand without them")
    text = markdown.render("", document(given))
    assert "On the 40 test rows that resemble no training row, 2 of the 2 differences are not shown: QLoRA and LoRA on BLEU-4 (+0.0" in text
    assert "| better, without leaks equivalent |" in text
    older = made_run(tiny("--method", "lora"), [*replies(0.1, 1, 40), *replies(0.5, 2, 40)]) / "eval.json"
    write_json(older, read_json(older) | {"leaks": {"flagged": 14, "without": None}})  # which rows, it does not say
    assert said(tiny)["qlora", "lora", "rouge_l"]["clean"] is None
    write_json(older, read_json(older) | {"leaks": {"flagged": 0, "without": None}})
    assert said(tiny)["qlora", "lora", "rouge_l"]["clean"]["n"] == 40  # QLoRA's say which


HALF = {"precision": {"name": "bfloat16", "reason": "r"}}
ONE, OTHER = ({"generation": {"empty": 0, "unfinished": 0, "mean_reply_tokens": 3.0, "batch_tokens": n}} for n in (250, 500))


@pytest.mark.parametrize(
    ("first", "second", "reasons"),
    [
        ({}, {"provenance": PROVENANCE | {"gpu": "Tesla T4"}}, ["another GPU"]),
        ({}, {"gates": {"reloaded": {"passed": False, "detail": "0.1"}}}, ["not ranked; reloaded: 0.1"]),
        ({}, HALF, ["another precision"]),
        (ONE, OTHER, []),
        (ONE | HALF, OTHER | HALF, ["replies in other batches"]),
    ],
)
def test_how_a_run_was_evaluated_counts_as_how_it_was_trained_does(tiny: Make, first: dict[str, Any], second: dict[str, Any], reasons: list[str]) -> None:
    for method, changed in (("qlora", first), ("lora", second)):
        made_run(tiny("--method", method), replies(0.5, 1), **changed)
    assert {tuple(v["confounded"]) for v in said(tiny).values()} == {tuple(reasons)}


def test_where_nobody_knows_how_much_was_trained_nothing_is_ranked(tiny: Make) -> None:
    for method in ("qlora", "lora"):
        made_run(tiny("--method", method), replies(0.5, 1), trained={"tokens_supervised": None})
    assert {tuple(v["confounded"]) for v in said(tiny).values()} == {("supervised tokens not known",)}


def test_the_base_model_has_no_seeds_to_vary(tiny: Make) -> None:
    for method in ("base", "qlora"):
        made_run(tiny("--method", method), replies(0.1, 0))
    for seed, share in (("0", 0.4), ("1", 0.8)):
        made_run(tiny("--method", "lora", "--seed", seed), replies(share, 1))
    base, qlora = (said(tiny)[a, "lora", "rouge_l"] for a in ("base", "qlora"))
    assert base["high"] - base["low"] < 0.8 * (qlora["high"] - qlora["low"])


def test_a_run_on_fewer_rows_takes_none_from_the_others(tiny: Make) -> None:
    left_out = ["DoRA is left out of the verdicts: it answered 70 test rows and most others 80"]
    made_run(tiny("--method", "qlora"), replies(0.9, 1))
    made_run(tiny("--method", "dora"), replies(0.2, 3, n=70))
    assert verdicts(gather(tiny().run_dir.parent)) == ([], left_out)
    made_run(tiny("--method", "lora"), replies(0.2, 2))
    found, notes = verdicts(gather(tiny().run_dir.parent))
    assert {(v["a"], v["b"], v["n"]) for v in found} == {("qlora", "lora", 80)}
    assert notes == left_out


def test_a_run_on_more_rows_throws_out_none(tiny: Make) -> None:
    made_run(tiny("--method", "qlora"), replies(0.9, 1, n=40))
    made_run(tiny("--method", "lora"), replies(0.2, 2, n=40))
    made_run(tiny("--method", "dora"), replies(0.2, 3))
    found, notes = verdicts(gather(tiny().run_dir.parent))
    assert {(v["a"], v["b"], v["n"]) for v in found} == {("qlora", "lora", 40), ("qlora", "dora", 40), ("lora", "dora", 40)}
    assert notes == []


def test_seeds_with_counts_of_their_own_are_fair(tiny: Make) -> None:
    for method, share in (("qlora", 0.9), ("lora", 0.2)):
        for seed, tokens in (("0", 1000), ("1", 1010)):
            made_run(tiny("--method", method, "--seed", seed), replies(share, 1), trained={"tokens_supervised": tokens})
    assert {tuple(v["confounded"]) for v in said(tiny).values()} == {()}


@pytest.mark.parametrize("recipe", recipes())
@pytest.mark.parametrize("scale_down", [False, True])
def test_no_recipe_sets_its_methods_apart_by_more_than_themselves(recipe: str, scale_down: bool) -> None:
    """Alpha, which GaLore has none of, is smaller where its rank is."""
    flags = {"recipe": recipe, "scale_down": scale_down, "valid_per_source": 10}
    rows = [blank(m, 0) | {"ranked": True, "tokens_supervised": 1, "config": resolve(flags | {"method": m}).identity()} for m in METHODS]
    assert {tuple(confounded([a], [b])) for a, b in combinations(rows, 2)} == {()}


def test_what_makes_the_method_does_not_confound_it(tiny: Make) -> None:
    """high-rank's rank is the method; the base model has no training settings at all."""
    made_run(tiny("--method", "base"), replies(0.1, 0))
    made_run(tiny("--method", "lora"), replies(0.5, 1))
    made_run(tiny("--method", "highrank"), replies(0.6, 2))
    assert {tuple(v["confounded"]) for v in said(tiny).values()} == {()}
    made_run(tiny("--method", "lora"), replies(0.5, 1), trained={"provenance": PROVENANCE | {"gpu": "Tesla T4"}})
    assert {pair: tuple(v["confounded"]) for pair, v in said(tiny).items() if "lora" in pair and pair[2] == "rouge_l"} == {
        ("base", "lora", "rouge_l"): (), ("lora", "highrank", "rouge_l"): ("another GPU",),
    }  # fmt: skip
    # The same flag given to both is not the method's either, but equal.
    assert tiny("--method", "highrank").rank != tiny("--method", "lora").rank


def test_the_matrix_and_the_table_show_both_directions(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    made_run(tiny("--method", "qlora"), replies(0.9, 1))
    made_run(tiny("--method", "lora", "--epochs", "2"), replies(0.2, 2))
    given = write.inputs(tiny())
    assert matrix(given.found) == [["QLoRA", "·", "++=*"], ["LoRA", "−−=*", "·"]]
    verdict_table(given.found)
    shown = capsys.readouterr().out
    assert "++=*" in shown
    assert "−−=*" in shown
    text = markdown.render("", document(given))
    assert "| better (confounded) |" in text
    assert "within the margin (BLEU-4 1 point, ROUGE-L 1 point, perplexity 2%)" in text
    assert "what lies within the margin is equivalent whatever its p" in text
    assert "QLoRA and LoRA: epochs 1 and 2.0" in text
    assert "Of the pairs of methods, 1 differs in more than the method: listed" in text


def test_the_seeds_of_a_method_share_its_settings(tiny: Make) -> None:
    """A method's own settings may differ from another method's, and not from one of its seeds to the next."""
    for method in ("lora", "highrank"):
        for seed in ("0", "1"):
            rank = ("--rank", "8") if (method, seed) == ("highrank", "1") else ()
            made_run(tiny("--method", method, "--seed", seed, *rank), replies(0.5, 1, 20))
    assert ledger(gather(tiny().run_dir.parent)) == [("LoRA", "high-rank LoRA", ["rank 48 and 8"])]


def test_the_recipes_block_for_a_method_is_the_methods_own() -> None:
    assert own_settings("qlora", "h100-qlora-highrank") == {"rank", "alpha", "target_modules"}
    assert own_settings("lora", "h100-qlora-highrank") == set()


def test_both_ways_mirror_a_verdict() -> None:
    v = {"a": "x", "b": "y", "metric": "rouge_l", "delta": 2.0, "low": 1.0, "high": 4.0, "verdict": "better", "confounded": []}
    said = both_ways([v])
    assert said["x", "y", "rouge_l"] == v
    assert said["y", "x", "rouge_l"] == v | {"a": "y", "b": "x", "delta": -2.0, "low": -4.0, "high": -1.0, "verdict": "worse"}


def test_best_takes_a_fair_win_over_every_other_ranked_method() -> None:
    rows = [{"method": m, "status": "done", "ranked": True} for m in ("base", "lora", "dora")]
    win = {"a": "lora", "metric": "rouge_l", "delta": 2.0, "low": 1.0, "high": 3.0, "verdict": "better", "confounded": []}
    draw = win | {"a": "base", "b": "dora", "verdict": "cannot tell"}

    def found(second: dict[str, Any]) -> str | None:
        return best(rows, both_ways([win | {"b": "base"}, win | {"b": "dora"} | second, draw]), "rouge_l")

    assert found({}) == "lora"
    assert found({"verdict": "cannot tell"}) is None
    assert found({"confounded": ["other seeds"]}) is None
    rows.append({"method": "qlora", "status": "done", "ranked": True})
    alone = [win | {"a": a, "b": b, "confounded": ["tokens"]} for a, b in (("lora", "qlora"), ("dora", "qlora"))]
    rest = [win | {"b": "base"}, win | {"b": "dora"}, draw, win | {"a": "base", "b": "qlora", "verdict": "worse"}]
    assert best(rows, both_ways([*rest, *alone]), "rouge_l") == "lora"  # qlora can fairly be compared with neither
    assert best(rows, both_ways([*rest, alone[0], alone[1] | {"confounded": [], "verdict": "worse"}]), "rouge_l") is None
    rows.pop()
    rows[2]["ranked"] = False  # then it is no rival
    assert found({"confounded": ["not ranked"]}) == "lora"
    assert best(rows[1:], both_ways([win | {"b": "dora", "confounded": ["not ranked"]}]), "rouge_l") is None  # of one
    rows[2]["ranked"] = True
    assert best(rows, both_ways([win | {"b": "base"}]), "rouge_l") == "lora"  # DoRA was left out of the verdicts
    assert best([*rows, rows[1] | {"ranked": False}], both_ways([win | {"b": "base"}, win | {"b": "dora"}, draw]), "rouge_l") is None  # a seed failed a check
    rows[1]["ranked"] = False
    assert found({}) is None
