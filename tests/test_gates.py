"""Gates can fail: each is shown a run that went wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from kit import gates
from kit.gates import Before, Gate, before, close, failed, record, spans, supervision, training
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
    for made in [Renderer(tokenizer, format, 128)] + ([Renderer(gpt2_tokenizer, format, 128)] if format == "alpaca" else []):
        assert failed(record(supervision(made, ROWS, made.examples(ROWS)))) == []


def test_a_reply_that_was_cut_is_no_failure(renderer: Renderer) -> None:
    rows = [{"id": "long", "messages": [{"role": "user", "content": "Go"}, {"role": "assistant", "content": "word " * 200}]}, ROWS[0]]
    examples = renderer.examples(rows)
    assert examples[0].fit == "reply_cut"
    assert failed(record(supervision(renderer, rows, examples))) == []
    # But that of all is: nobody would learn to end a reply.
    assert failed(record(supervision(renderer, rows[:1], examples[:1])))[0].endswith("carries a loss in 0 of 1 rows (1 cut)")


def test_a_prompt_and_a_reply_that_were_cut_are_no_failure(renderer: Renderer) -> None:
    rows = [{"id": "long", "messages": [{"role": "user", "content": "Go " * 200}, {"role": "assistant", "content": "word " * 200}]}, ROWS[0]]
    examples = renderer.examples(rows)
    assert examples[0].fit == "prompt_cut_and_reply_cut"
    assert failed(record(supervision(renderer, rows, examples))) == []


def test_a_prompt_token_in_the_loss_fails(renderer: Renderer) -> None:
    whole, other = renderer.examples(ROWS)
    wrong = replace(whole, labels=list(whole.input_ids))
    assert failed(record(supervision(renderer, ROWS, [wrong, other])))[0].endswith("1 of 2 decoded rows; not: a")


def test_an_untrained_terminator_fails(renderer: Renderer) -> None:
    examples = [replace(e, labels=[IGNORE if token == renderer.terminator else token for token in e.labels]) for e in renderer.examples(ROWS)]
    for some in (examples, [examples[0], renderer.examples(ROWS)[1]]):
        assert [f.split(":")[0] for f in failed(record(supervision(renderer, ROWS, some)))] == ["supervised text", "terminator"]


def test_rows_without_any_loss_fail(renderer: Renderer) -> None:
    examples = [replace(e, labels=[IGNORE] * len(e.labels)) for e in renderer.examples(ROWS)]
    assert len(failed(record(supervision(renderer, ROWS, examples)))) == 2


def test_spans_are_the_supervised_runs(renderer: Renderer) -> None:
    assert len(spans(renderer.examples(ROWS)[1])) == 2


def verdicts(**changed: Any) -> dict[str, bool | None]:
    return {name: gate.passed for name, gate in judged(**changed).items()}


def judged(*, steps: int = 16, rate: float = 1e-3, end: float = 1.0, fed: bool = True, value: float | tuple[float, float] = 3.0, bias: float = 1.0,
           skipped: int = 0) -> dict[str, Gate]:  # fmt: skip
    import torch

    model = torch.nn.Linear(2, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor(value))
        model.bias.copy_(torch.tensor(bias))
    log = [{"learning_rate": rate, "grad_norm": None if i < skipped else 1.0} for i in range(steps)]
    start = Before({"weight": (4.0, 8.0**0.5), "bias": (0.0, 0.0)}, 2.0)  # both weights 2
    fed_by_name = {"weight": fed, "bias": True}
    return training(model, start=start, end=end, fed=fed_by_name, log=log, peak_rate=1e-3)


def test_a_training_that_worked_passes() -> None:
    assert set(verdicts().values()) == {True}
    assert set(verdicts(skipped=2).values()) == {True}  # a loss scaler finding its scale
    assert verdicts(value=(1.0, 3.0))["moved"]  # though the sum is as before


@pytest.mark.parametrize(
    ("gate", "wrong"),
    [("moved", {"value": 2.0, "bias": 0.0}), ("moved", {"bias": 0.0}), ("gradients", {"fed": False}), ("gradients", {"fed": False, "steps": 3}),
     ("finite", {"value": float("nan")}), ("finite", {"skipped": 4}), ("loss_fell", {"end": 2.1}), ("loss_fell", {"end": float("nan")}),
     ("learning_rate", {"rate": 1e-9}), ("learning_rate", {"rate": 2e-3})],
)  # fmt: skip
def test_each_failure_has_its_gate(gate: str, wrong: dict[str, Any]) -> None:
    assert verdicts(**wrong)[gate] is False


@pytest.mark.parametrize(("precision", "bound"), [("float32", 1e-4), ("float16", 0.02), ("bfloat16", 0.08)])
def test_two_computations_agree_if_they_do_on_average(precision: str, bound: float) -> None:
    for share, passed in ((0.9, True), (1.1, False)):
        assert close([[0.0, 0.0], [3 * share * bound]], [[0.0, 0.0], [0.0]], precision, "").passed is passed


def test_the_loss_is_the_mean_over_the_tokens_of_the_last_replies(renderer: Renderer, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    examples, asked = renderer.examples(ROWS), []
    monkeypatch.setattr(gates, "probe", lambda _model, rows, _pad: asked.extend(rows) or [[-1.0, -3.0, -3.0], [-1.0]])
    assert before(torch.nn.Linear(1, 1), examples, 0).loss == 2.0
    assert asked == [(e.input_ids[: -len(spans(e)[-1])], spans(e)[-1]) for e in examples]


def test_a_short_run_is_not_judged_by_its_learning_rate() -> None:
    assert verdicts(steps=2)["learning_rate"] is None
    assert judged(steps=2)["learning_rate"].detail == "peak 1.00e-03 of 1.00e-03 asked for; judged from 16 steps on"
    assert judged(steps=16)["learning_rate"].detail == "peak 1.00e-03 of 1.00e-03 asked for"
    assert failed(record({"learning_rate": Gate(None, "too short")})) == []


def test_nobody_is_blamed_for_what_two_steps_cannot_do() -> None:
    """As the first half of a hybrid of four steps: the rate begins at zero. But what changed nothing at all was no training."""
    found = verdicts(steps=2, fed=False, value=2.0, bias=0.0, end=2.0)
    assert {name for name, passed in found.items() if passed is None} == {"gradients", "loss_fell", "learning_rate"}
    assert found["moved"] is False
    assert verdicts(steps=2, value=float("nan"))["finite"] is False
