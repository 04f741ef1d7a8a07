"""References and terms: those that concern the runs and no others, each in every format."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from test_render import pages, squeezed
from test_report import Make, build, made_run
from test_study import row, say

from kit.config import load_recipe, recipes
from kit.forgetting import HUB
from kit.methods import METHODS
from kit.report import html, markdown, pdf
from kit.report.blocks import Bullets, Heading
from kit.report.references import OF_NAMES, PAPERS, TERMS, Topic, references, topics


def listed(*rows: Any, found: Any = (), rated: Any = None) -> dict[str, list[str]]:
    """{heading: items}."""
    made = references(rows, found, rated)
    return {h.text: list(b.items) for h, b in zip(made[::2], made[1::2], strict=True) if isinstance(h, Heading) and isinstance(b, Bullets)}


def test_every_method_has_its_papers_and_every_paper_is_of_something() -> None:
    from kit.report import references as module

    known = [*map(module._of, METHODS.values()), *OF_NAMES.values(), *(t for t in vars(module).values() if isinstance(t, Topic))]
    assert {key for topic in known for key in topic.papers} == PAPERS.keys()
    assert {term for topic in known for term in topic.terms} == TERMS.keys()


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_is_said_to_come_from_is_listed(method: str) -> None:
    for author, year in re.findall(r"\((\w+) et al\. (\d{4})\)", METHODS[method].about):
        assert [p for p in listed(row(method))["References"] if p.startswith(author) and f"({year})" in p], author


def test_a_report_lists_what_concerns_it_alone() -> None:
    found = listed(row("base"), row("qlora"), row("lora"), found=say(("qlora", "lora", "??-")))
    first = [p.split(",")[0] for p in found["References"]]
    assert first == ["Dettmers", "Efron", "Han", "Holm", "Hu", "Lin", "Mangrulkar", "Papineni", "Post", "Riezler", "von Werra"]
    assert [t.partition(":")[0] for t in found["Terms"]] == ["NF4", "equivalence margin", "Holm's correction", "nat"]
    assert listed(row("base", status="missing", bleu4=None, rouge_l=None, perplexity=None)) == {}
    more = {"forgetting": {"text": HUB["wikitext"].name}, "tasks": {"tasks": {}}, "chrf": {"value": 1.0}, "score_tokens": "13a"}
    whole = listed(row("combined", **more), rated={"criteria": {}})
    assert {p.split(",")[0] for p in whole["References"]} >= {"Yadav", "Yu", "Merity", "Gao", "Popović", "Krippendorff", "Cohen", "Wilson"}
    assert {t.partition(":")[0] for t in whole["Terms"]} == TERMS.keys() - {"NF4", "equivalence margin", "Holm's correction"}


@pytest.mark.parametrize("name", [n for n in recipes() if n != "tiny"])
def test_the_models_and_datasets_of_every_recipe_are_cited(name: str) -> None:
    recipe = load_recipe(name)
    config = {"model": recipe["model"], "source": recipe["source"]}
    assert len([t for t in topics([row("full", config=config)], (), None) if t in OF_NAMES.values()]) == 4


def test_references_and_terms_are_in_every_format(tiny: Make, tmp_path: Path) -> None:
    made_run(tiny("--method", "lora"), ["a", "b"])
    assert "\n## References\n\n- Efron, B., Tibshirani" in build(tiny())[2]
    blocks = references([row("galore")], (), None)
    said = ["References", "arXiv:2403.03507.", "Terms", "1.44 bits"]
    made = [markdown.render("T", blocks), html.render("T", blocks, tmp_path), " ".join(pages(pdf.render("T", blocks, tmp_path)))]
    assert [[s for s in said if squeezed(s) not in squeezed(text)] for text in made] == [[], [], []]
    assert '<ul class="quiet">' in made[1]
