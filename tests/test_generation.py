"""Batched generation against transformers' own, one prompt at a time; batches by tokens; what happens when memory runs out."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import config

from kit import evaluation, generation
from kit.config import RunConfig
from kit.errors import UserError
from kit.evaluation import evaluate
from kit.files import read_json, read_jsonl
from kit.generation import cut, generate, take, token_log_probs
from kit.model import load_base
from kit.prompts import Exam, Renderer

Make = Callable[..., RunConfig]


def test_batches_hold_at_most_so_many_tokens_padding_counted() -> None:
    assert take([10, 10, 10], 20) == 2
    assert take([5, 10, 1], 20) == 2
    assert take([50, 1], 20) == 1  # a row of its own, where it alone is too much
    lengths = [9, 7, 7, 3, 8, 1, 1]
    parts = list(cut(lengths, 16))
    assert [i for part in parts for i in range(len(lengths))[part]] == list(range(len(lengths)))
    assert all(len(lengths[part]) * max(lengths[part]) <= 16 for part in parts)
    assert list(cut([], 16)) == []


def test_no_part_of_the_prompts_is_kept_while_the_next_one_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU a part's keys and values take gibibytes."""
    import torch
    import transformers

    kept: list[weakref.ref[Any]] = []

    class Cache(transformers.DynamicCache):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            kept.append(weakref.ref(self))

    class Model:
        device = torch.device("cpu")

        def __call__(self, input_ids: Any, past_key_values: Any, **_: Any) -> Any:
            assert [cache() for cache in kept[:-1]] == [None] * (len(kept) - 1)
            past_key_values.update(*(torch.zeros(*input_ids.shape, 1, 1).transpose(1, 2) for _ in "kv"), 0)
            return SimpleNamespace(logits=torch.zeros(len(input_ids), 1, 4), past_key_values=past_key_values)

    monkeypatch.setattr(transformers, "DynamicCache", Cache)
    monkeypatch.setattr(generation, "READ", 8)
    cache, _, first = generation._read(Model(), [[1, 2, 3]] * 5, 0, 4)
    assert (len(kept), len(first), cache.get_seq_length()) == (3, 5, 3)


def test_a_reply_ends_where_the_format_the_tokenizer_or_the_model_say(tokenizer: Any) -> None:
    renderer = Renderer(tokenizer, "chat", 256)
    for own, more in (([1, 106], {1, 106}), (7, {7}), (None, set())):
        assert generation.ends(SimpleNamespace(eos_token_id=own), renderer) == sorted({*renderer.stop_ids, *more})


# Bytes a token of keys and values and of the weights in 16 bits, by the models' configurations; on a T4 Gemma 3's keys and values are in float32.
@pytest.mark.parametrize(("recipe", "per_token", "weights"), [("t4", 26 * 256 * 2 * 4, 2.0e9), ("gptneo-t4", 24 * 2048 * 2 * 2, 2.6e9)])
def test_the_evaluation_of_a_recipe_for_a_t4_fits_into_one_by_count(recipe: str, per_token: int, weights: float) -> None:
    held = generation.GPU_READ + config("--recipe", recipe).eval_tokens
    assert weights + held * per_token < 13 * 2**30


def plain(model: Any, prompt: list[int], stop: list[int], n: int) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, do_sample=False, eos_token_id=stop, pad_token_id=0)
    return [token for token in made[0, len(prompt) :].tolist() if token not in stop]


@pytest.mark.parametrize(("name", "form", "window"), [("builtin", "chat", 512), ("builtin", "chat", 8), ("builtin-gptneo", "alpaca", None)])
def test_replies_are_those_of_transformers_one_by_one(name: str, form: str, window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts of 2 to 90 tokens read in several parts; with a window of 8, most of them are longer than the layers look back."""
    from transformers import AutoModelForCausalLM

    from kit.hub import load_tokenizer, loadable
    from kit.model import import_unsloth

    import_unsloth()
    settings = {} if window is None else {"sliding_window": window}
    model = AutoModelForCausalLM.from_pretrained(loadable(name), dtype="float32", **settings).eval()
    renderer = Renderer(load_tokenizer(name), form, 128)
    text = renderer.contents([{"messages": [{"content": "Explain how rivers shape the land and give three examples of it. " * 4}]}])[0][0]
    prompts = [text[-n:] for n in (70, 41, 40, 17, 5, 2)]
    monkeypatch.setattr(generation, "READ", 90)
    made = generate(model, prompts, stop=renderer.stop_ids, pad=0, max_new_tokens=20)
    assert [reply.ids for reply in made] == [plain(model, prompt, renderer.stop_ids, 20) for prompt in prompts]


SMALL = {"vocab_size": 300, "hidden_size": 64, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("lfm2", {**HEADS, "block_ff_dim": 64, "layer_types": ["conv", "full_attention"]}),
        ("qwen3_5_text", {**HEADS, "head_dim": 16, "linear_num_value_heads": 16, "layer_types": ["linear_attention", "full_attention"]}),
        ("mamba", {"state_size": 4}),
        ("recurrent_gemma", {**HEADS, "lru_width": 64, "intermediate_size": 96, "block_types": ["recurrent", "attention"]}),
    ],
)
def test_replies_of_models_that_keep_states_are_those_of_transformers(kind: str, settings: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig

    from kit.model import built, import_unsloth

    import_unsloth()
    torch.manual_seed(0)
    model = built(AutoConfig.for_model(kind, **SMALL, **settings)).eval()
    for weight in model.parameters():  # else every reply is one token again and again
        weight.data *= 4 if weight.ndim == 2 else 1
    prompts = [list(range(20, 20 + n)) for n in (30, 17, 3)]
    made = [reply.ids for reply in generate(model, prompts, stop=[2], pad=0, max_new_tokens=8)]
    assert made == [plain(model, prompt, [2], 8) for prompt in prompts]
    assert len({token for reply in made for token in reply}) > 3


def test_likelihoods_do_not_depend_on_the_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer, _ = load_base(config("--method", "base"))
    exams = [Exam(list(range(10, 10 + n)), list(range(20, 20 + m)), "whole") for n, m in ((3, 9), (30, 1), (8, 8), (1, 30))]
    together = token_log_probs(model, exams, tokenizer.pad_token_id)
    monkeypatch.setattr(generation, "READ", 40)
    apart = token_log_probs(model, exams, tokenizer.pad_token_id)
    assert [len(row) for row in together] == [len(e.reference_ids) for e in exams]
    for a, b in zip(together, apart, strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_out_of_memory_halves_the_batches_and_goes_on(ready: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    whole = ready("--method", "base", "--limit", "12", "--max-new-tokens", "8", "--name", "whole")
    evaluate(whole)
    real, sizes = evaluation.answers, []

    def short_of_memory(*args: Any) -> Any:
        sizes.append(len(args[4]))
        if len(args[4]) > 3:
            raise torch.OutOfMemoryError("no room")
        return real(*args)

    monkeypatch.setattr(evaluation, "answers", short_of_memory)
    halved = ready("--method", "base", "--limit", "12", "--max-new-tokens", "8", "--name", "halved")
    evaluate(halved)
    assert sizes[:3] == [12, 6, 3]
    assert "out of memory while generating 12 replies at once: going on with batches of" in capsys.readouterr().out
    kept = [{r["id"]: (r["prediction"], r["reply_tokens"]) for r in read_jsonl(c.run_dir / "predictions.jsonl")} for c in (whole, halved)]
    assert len(kept[0]) == 12
    assert kept[0] == kept[1]
    budgets = [read_json(c.run_dir / "eval.json")["generation"]["batch_tokens"] for c in (whole, halved)]
    assert budgets[0] == 65_536
    assert budgets[1] < budgets[0] / 4


def test_a_single_reply_without_room_is_a_clear_error(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(evaluation, "answers", never)
    with pytest.raises(UserError, match="out of memory while generating a single reply; lower --max-new-tokens"):
        evaluate(ready("--method", "base", "--limit", "4"))
