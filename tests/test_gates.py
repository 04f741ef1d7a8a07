"""Gates can fail: each is shown a run that went wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kit.gates import failed, record, spans, supervision, training
from kit.prompts import IGNORE, Renderer

ROWS = [
    {"id": "a", "messages": [{"role": "user", "content": "Name a colour."}, {"role": "assistant", "content": "Blue, like the 海."}]},
    {"id": "b", "messages": [{"role": r, "content": t} for r, t in (("user", "Hi"), ("assistant", "Hello!"), ("user", "More"), ("assistant", "No."))]},
]


@pytest.fixture
def renderer(tokenizer: Any) -> Renderer:
    return Renderer(tokenizer, "chat", 64)


@pytest.mark.parametrize("format", ["chat", "alpaca"])
def test_the_kits_own_masks_pass(tokenizer: Any, gpt2_tokenizer: Any, format: str) -> None:
    for made in [Renderer(tokenizer, format, 64)] + ([Renderer(gpt2_tokenizer, format, 128)] if format == "alpaca" else []):
        assert failed(record(supervision(made, ROWS, made.examples(ROWS)))) == []


def test_a_reply_that_was_cut_is_no_failure(renderer: Renderer) -> None:
    rows = [{"id": "long", "messages": [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "word " * 200}]}, ROWS[0]]
    examples = renderer.examples(rows)
    assert examples[0].fit == "reply_cut"
    assert failed(record(supervision(renderer, rows, examples))) == []


def test_a_prompt_token_in_the_loss_fails(renderer: Renderer) -> None:
    whole, other = renderer.examples(ROWS)
    wrong = replace(whole, labels=list(whole.input_ids))
    assert failed(record(supervision(renderer, ROWS, [wrong, other])))[0].endswith("1 of 2 decoded rows; not: a")


def test_an_untrained_terminator_fails(renderer: Renderer) -> None:
    examples = [replace(e, labels=[IGNORE if token == renderer.terminator else token for token in e.labels]) for e in renderer.examples(ROWS)]
    assert [f.split(":")[0] for f in failed(record(supervision(renderer, ROWS, examples)))] == ["supervised text", "terminator"]


def test_rows_without_any_loss_fail(renderer: Renderer) -> None:
    examples = [replace(e, labels=[IGNORE] * len(e.labels)) for e in renderer.examples(ROWS)]
    assert len(failed(record(supervision(renderer, ROWS, examples)))) == 2


def test_spans_are_the_supervised_runs(renderer: Renderer) -> None:
    assert len(spans(renderer.examples(ROWS)[1])) == 2


def steps(losses: list[float], rate: float = 1e-3) -> list[dict[str, float]]:
    return [{"loss": loss, "learning_rate": rate, "grad_norm": 1.0} for loss in losses]


def verdicts(log: list[dict[str, float]], *, frozen: bool = False, fed: bool = True, value: float = 2.0) -> dict[str, bool | None]:
    import torch

    model = torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(model.weight, 2.0 if frozen else value)
    made = training(model, before={"weight": (4.0, 8.0)}, fed={"weight": fed}, log=log, peak_rate=1e-3)
    return {name: gate.passed for name, gate in made.items()}


def test_a_training_that_worked_passes() -> None:
    assert set(verdicts(steps([2.0] * 8 + [1.0] * 8), value=3.0).values()) == {True}


def test_each_failure_has_its_gate() -> None:
    good = steps([2.0] * 8 + [1.0] * 8)
    assert verdicts(good, frozen=True)["moved"] is False
    assert verdicts(good, value=3.0, fed=False)["gradients"] is False
    assert verdicts(good, value=float("nan"))["finite"] is False
    assert verdicts(steps([1.0] * 8 + [2.0] * 8), value=3.0)["loss_fell"] is False
    assert verdicts(steps([2.0] * 8 + [1.0] * 8, rate=1e-9), value=3.0)["learning_rate"] is False
    assert verdicts(steps([2.0, 1.0]), value=3.0)["loss_fell"] is None
