"""The model card: metadata that the hub's library takes, results as they were measured, and no text or place of others in it.

Checked with huggingface_hub's own parser and model-index reader; its `validate` asks the hub itself, so no test calls it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kit import card
from kit.config import RunConfig
from kit.files import write_json
from kit.methods import METHODS

Make = Callable[..., RunConfig]
GATE = {"passed": True, "detail": "fine"}
TRAINED: dict[str, Any] = {
    "steps": 8, "trainable_params": 322_560, "train_wall_s": 3.0, "peak_memory_gib": 1.5, "micro_batch": 2, "accumulation": 4,
    "precision": {"name": "float32"}, "gates": {"moved": GATE}, "provenance": {"gpu": "A | B", "cpu": None, "versions": {"torch": "2.10.0"}, "data": "d"},
}  # fmt: skip


def score(value: float | None) -> dict[str, Any]:
    return {"value": value, "low": value, "high": value, "n": 1234}


def scored(**values: float | None) -> dict[str, Any]:
    scores = {"bleu4": score(12.5), "rouge_l": score(30.25), "perplexity": score(4.0)} | {k: score(v) for k, v in values.items()}
    return {"all": scores, "per_source": {"tulu": scores}, "gates": {}, "provenance": {"data": "d"}}


def manifest(origin: str = "allenai/tulu-v2-sft-mixture", revision: str | None = "c" * 40) -> dict[str, Any]:
    return {"sources": {"tulu": {"origin": origin, "revision": revision, "train": 600}}}


@pytest.fixture
def made(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[str, Any]]:
    """(the card's text, the hub library's reading of it) for flags and records."""

    def make(*flags: str, data: dict[str, Any] | None = None, results: dict[str, Any] | None = None, **changes: Any) -> tuple[str, Any]:
        from huggingface_hub import ModelCard

        monkeypatch.setattr("kit.dataset.manifest_of", lambda _: data or manifest())
        monkeypatch.setattr("kit.dataset.manifest_hash", lambda _: "d")
        text = card.text(tiny(*flags), TRAINED | changes, results)
        return text, ModelCard(text).data

    return make


GEMMA = ("--model", "google/gemma-3-1b-it")


def test_the_hub_reads_what_the_card_says(made: Callable[..., Any]) -> None:
    _, data = made(*GEMMA, "--method", "dora", results=scored())
    read = data.to_dict()
    assert (read["base_model"], read["base_model_relation"], read["library_name"]) == ("google/gemma-3-1b-it", "adapter", "peft")
    assert (read["license"], read["pipeline_tag"], read["datasets"]) == ("gemma", "text-generation", ["allenai/tulu-v2-sft-mixture"])
    assert {"dora", "lora", "unsloth"} <= set(read["tags"])
    results = {(r.dataset_type, r.metric_type): (r.metric_value, r.dataset_revision) for r in data.eval_results}
    assert results["mixture", "bleu"] == (12.5, None)
    assert results["allenai/tulu-v2-sft-mixture", "rouge"] == (30.25, "c" * 40)
    assert len(results) == 6


@pytest.mark.parametrize(
    ("method", "scale", "rates"), [("lora", "alpha / rank", []), ("rslora", "alpha / sqrt(rank)", []), ("loraplus", "alpha / rank", ["0.032"])]
)
def test_what_makes_an_adapter_is_among_its_settings(made: Callable[..., Any], method: str, scale: str, rates: list[str]) -> None:
    text, _ = made("--method", method)
    assert f"| scale | `{scale}` |" in text
    assert re.findall(r"\| learning rate of B \| `(.*)` \|", text) == rates


def test_a_combination_has_no_scale_of_its_own(made: Callable[..., Any]) -> None:
    """Its parts' differ, and what PEFT saves of it has another alpha."""
    text, _ = made("--method", "combined", "--rslora")
    assert "| rank | `48` |" in text
    assert not re.findall(r"\| (?:alpha|scale) \|", text)


def test_what_was_forgotten_stands_beside_what_was_known(made: Callable[..., Any]) -> None:
    lost = {"text": "builtin", "perplexity": score(3.0), "perplexity_before": score(2.0)}
    assert (
        "On general text (`builtin`) its perplexity is 3.00 [3.00, 3.00], the base model's 2.00 [2.00, 2.00]."
        in made(results=scored() | {"forgetting": lost})[0]
    )
    assert "its perplexity is 3.00 [3.00, 3.00].\n" in made(results=scored() | {"forgetting": lost | {"perplexity_before": None}})[0]


def test_before_evaluation_it_has_no_results(made: Callable[..., Any]) -> None:
    text, data = made(*GEMMA)
    assert data.eval_results is None
    assert "Not evaluated yet." in text


def test_a_score_that_is_missing_is_no_result(made: Callable[..., Any]) -> None:
    text, data = made(*GEMMA, results=scored(perplexity=None))
    assert {r.metric_type for r in data.eval_results} == {"bleu", "rouge"}
    assert "| Perplexity | — | — |" in text
    assert "nan" not in text.lower().replace("finance", "")


def test_other_data_than_the_runs_are_not_named_as_its(made: Callable[..., Any]) -> None:
    """Its folder may have been built anew, from a later commit of a dataset, say, when the run is exported."""
    assert "c" * 40 in made()[0]
    text, data = made(provenance=TRAINED["provenance"] | {"data": "earlier"})
    assert "c" * 40 not in text
    assert data.datasets is None


def test_what_resembles_training_rows_is_told(made: Callable[..., Any]) -> None:
    without = scored(bleu4=7.5)["all"]
    text = made(results=scored() | {"leaks": {"flagged": 200, "ids": [], "without": without}})[0]
    assert "200 of these rows resemble training rows; without them: BLEU-4 7.50 [7.50, 7.50], ROUGE-L 30.25 [30.25, 30.25], " in text
    assert "1,234 of these rows resemble training rows." in made(results=scored() | {"leaks": {"flagged": 1234, "ids": [], "without": None}})[0]
    assert "resemble" not in made(results=scored() | {"leaks": {"flagged": 0, "ids": [], "without": None}})[0]


def test_the_base_models_scores_stand_beside_those_of_the_same_data_and_model(made: Callable[..., Any], tiny: Make) -> None:
    path = tiny("--method", "base").run_dir / "eval.json"
    write_json(path, scored(bleu4=1.25))
    assert "| BLEU-4 | 1.25 [1.25, 1.25] | 12.50 [12.50, 12.50] |" in made(results=scored())[0]
    for other in ({"provenance": {"data": "other"}}, {"provenance": {"data": "d", "model_revision": "other"}}, {"score_tokens": "zh"}):
        write_json(path, scored(bleu4=1.25) | other)
        assert "| BLEU-4 | — | 12.50 [12.50, 12.50] |" in made(results=scored())[0]
    text = made(results=scored() | {"score_tokens": "zh"})[0]
    assert "| BLEU-4 | 1.25 [1.25, 1.25] | 12.50 [12.50, 12.50] |" in text
    assert "BLEU-4 and ROUGE-L from 0 to 100 (zh tokens)" in text


@pytest.mark.parametrize(
    ("model", "licence"),
    [("google/gemma-3-1b-it", "gemma"), ("unsloth/gemma-3-1b-it", "gemma"), ("EleutherAI/gpt-neo-1.3B", "mit"), ("lab/unknown-1b", "other"),
     ("builtin", "apache-2.0")],
)  # fmt: skip
def test_the_base_models_licence_binds(made: Callable[..., Any], model: str, licence: str) -> None:
    text, data = made("--model", model)
    assert data.license == licence
    assert "licence" in text.partition("## Limits and licence")[2]
    if licence == "other":
        assert data.to_dict()["license_link"] == f"https://huggingface.co/{model}"


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_a_valid_card(made: Callable[..., Any], method: str) -> None:
    text, data = made("--method", method, results=scored())
    assert data.library_name == ("transformers" if METHODS[method].full else "peft")
    assert "base_model" not in data.to_dict()  # the built-in model is not on the hub
    for snippet in re.findall("```python\n(.*?)```", text, re.DOTALL):
        compile(snippet, "card", "exec")


def test_no_place_of_this_machine_is_in_it(made: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / "private" / "my-model"
    folder.mkdir(parents=True)
    text, data = made("--model", str(folder), data=manifest(str(tmp_path / "private" / "my data.jsonl"), None), results=scored())
    assert str(tmp_path) not in text
    assert "my-model" in text
    assert "`my data.jsonl`" in text
    assert "base_model" not in data.to_dict()
    assert "datasets" not in data.to_dict()


def test_foreign_text_is_no_markup(made: Callable[..., Any]) -> None:
    name = "a`b|<script>alert(1)<script>\n---\n# x \x1b[31m.jsonl"
    text, _ = made(data=manifest(name, None), results=scored())
    from markdown_it import MarkdownIt

    html = MarkdownIt("commonmark").enable("table").render(text.split("\n---\n", 1)[1])
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert html.count("<h1>") == 1
    assert "\x1b" not in text
    assert "<code>A | B</code>" in html  # the GPU's name, in a table


def test_a_failed_check_is_told(made: Callable[..., Any]) -> None:
    text, _ = made(gates={"loss_fell": {"passed": False, "detail": "4 -> 5"}})
    assert "Checks of the run that failed: loss fell: 4 -> 5. Do not trust it." in text
