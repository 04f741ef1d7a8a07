"""Loaded models, in this process: lora and dora train, batches answer as single prompts do, likelihoods are right."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from conftest import config

from kit import generation
from kit.assets.make import TEMPLATE
from kit.config import RunConfig
from kit.device import Gpu
from kit.errors import UserError
from kit.generation import generate, likelihoods
from kit.hub import loadable
from kit.model import as_stored, attach, built, import_unsloth, load_base, precision, restore
from kit.preflight import adapter_size, count
from kit.prompts import Renderer
from kit.sources import Stream

Make = Callable[..., RunConfig]


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Renderer, list[Any]]:
    """The untuned model, its renderer and 24 test rows of mixed length."""
    model, tokenizer, _ = load_base(config("--method", "base"))
    import_unsloth().FastModel.for_inference(model)
    renderer = Renderer(tokenizer, "chat", 256)
    return model, renderer, renderer.exams([row for name in ("ultrachat", "alpaca") for _, row in list(Stream(f"{name}=builtin").rows())[:12]])


def test_a_model_folder_that_is_not_there_is_called_that(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such model folder: .*/gone"):
        loadable(str(tmp_path / "gone"))


def test_a_batch_answers_as_single_prompts_do(loaded: tuple[Any, Renderer, list[Any]]) -> None:
    model, renderer, exams = loaded
    options = {"stop": renderer.stop_ids, "pad": 0, "max_new_tokens": 24}
    prompts = [e.prompt_ids for e in exams]
    assert len({len(p) for p in prompts}) > 5
    assert generate(model, prompts, **options) == [generate(model, [p], **options)[0] for p in prompts]


def test_replies_end_at_the_terminator_or_count_as_unfinished(loaded: tuple[Any, Renderer, list[Any]]) -> None:
    model, renderer, exams = loaded
    short = generate(model, [exams[0].prompt_ids], stop=renderer.stop_ids, pad=0, max_new_tokens=2)[0]
    long = generate(model, [exams[0].prompt_ids], stop=renderer.stop_ids, pad=0, max_new_tokens=64)[0]
    assert (len(short.ids), short.finished) == (2, False)
    assert long.finished
    assert not set(long.ids) & set(renderer.stop_ids)


def test_likelihoods_equal_the_models_own_loss(loaded: tuple[Any, Renderer, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    model, _, exams = loaded
    expected = []
    for e in exams:
        ids = torch.tensor([[*e.prompt_ids, *e.reference_ids]])
        labels = torch.tensor([[-100] * len(e.prompt_ids) + list(e.reference_ids)])
        with torch.inference_mode():
            expected.append(float(model(input_ids=ids, labels=labels).loss) * len(e.reference_ids))
    assert likelihoods(model, exams, 0) == pytest.approx(expected, rel=1e-4)
    # Also when the logits of all rows do not fit at once.
    monkeypatch.setattr(generation, "LOGITS", 200 * model.config.vocab_size)
    assert likelihoods(model, exams, 0) == pytest.approx(expected, rel=1e-4)


def test_flex_attention_measures_nothing(loaded: tuple[Any, Renderer, list[Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is compiled for shapes, and each batch that is measured has another one."""
    model, renderer, exams = loaded
    wanted = likelihoods(model, exams[:3], 0), generate(model, [e.prompt_ids for e in exams[:3]], stop=renderer.stop_ids, pad=0, max_new_tokens=4)
    used, forward = set(), type(model).forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        used.add(model.config._attn_implementation)
        return forward(*args, **kwargs)

    monkeypatch.setattr(type(model), "forward", watched)
    monkeypatch.setattr(model.config, "_attn_implementation_internal", "flex_attention")
    found = likelihoods(model, exams[:3], 0), generate(model, [e.prompt_ids for e in exams[:3]], stop=renderer.stop_ids, pad=0, max_new_tokens=4)
    assert used == {"sdpa"}
    assert found == wanted
    with pytest.raises(ValueError, match="of the block"), generation.measuring(model):
        raise ValueError("of the block")
    assert model.config._attn_implementation == "flex_attention"


@pytest.mark.parametrize(("method", "computed"), [("lora", "float16"), ("full", "float32")])
def test_a_precision_that_unsloth_does_not_compute_in_is_not_recorded(method: str, computed: str, ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a T4, where Unsloth takes Gemma 3 to float16 whatever is asked for; whole weights stay in float32."""
    unsloth = import_unsloth()
    load = unsloth.FastModel.from_pretrained

    def forced(*args: Any, **kwargs: Any) -> Any:
        found = load(*args, **kwargs)
        found[0]._unsloth_forced_float32 = True
        return found

    monkeypatch.setattr(unsloth.FastModel, "from_pretrained", forced)
    chosen = load_base(ready("--method", method, "--precision", "float32"), training=True)[2]
    assert chosen.name == computed
    assert ("float32 was asked for, but Unsloth computes this family in float16" in chosen.reason) == (method == "lora")


def test_bfloat16_on_a_gpu_without_it_is_refused(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsloth would compute in float16, and the record say bfloat16."""
    asked = tiny("--method", "lora", "--precision", "bfloat16")
    for capability in ((9, 0), (7, 5)):
        monkeypatch.setattr("kit.model.cuda_gpu", lambda capability=capability: (Gpu("a GPU", capability), ""))
        with pytest.raises(UserError, match="a GPU has no bfloat16") if capability < (8, 0) else nullcontext():
            assert precision(asked, training=True).name == "bfloat16"


def test_unknown_target_modules_are_listed_before_training(ready: Make) -> None:
    config = ready("--method", "lora", "--target-modules", "q_prj", "--target-modules", "nothing")
    model, _, _ = load_base(config)
    with pytest.raises(UserError) as error:
        attach(model, config)
    assert error.value.problems[0] == "unknown target module 'q_prj'; did you mean 'q_proj'?"
    assert len(error.value.problems) == 2


def test_layers_that_peft_refuses_are_named(ready: Make) -> None:
    from transformers import MambaConfig

    import_unsloth()
    model = built(MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=1))
    with pytest.raises(UserError, match=r"PEFT adapts other --target-modules of builtin: .*'out_proj' is incompatible with Mamba"):
        attach(model, ready("--method", "lora", "--target-modules", "in_proj", "--target-modules", "out_proj"))


def test_qlora_is_really_in_four_bits(ready: Make) -> None:
    model, _, _ = load_base(ready("--method", "qlora"))
    kinds = [type(m).__name__ for m in model.modules()]
    assert kinds.count("Linear4bit") == 6 * 7


def test_a_model_that_nf4_cannot_hold_is_an_error_not_a_silent_16_bit_run(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unsloth_zoo.cpu.loader.cpu_bnb_4bit_supported", lambda: False)
    with pytest.raises(UserError, match="could not be loaded in 4-bit"):
        load_base(ready("--method", "qlora"))


def test_the_model_that_is_named_is_the_one_loaded(ready: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unsloth would take another repository for 4 bits, whose quantisation leaves layers out, and drop the revision."""
    asked = {}
    monkeypatch.setattr(import_unsloth().FastModel, "from_pretrained", lambda **settings: asked.update(settings) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        load_base(ready("--method", "qlora"))
    assert (asked["use_exact_model_name"], asked["load_in_4bit"]) == (True, True)


def test_a_padding_token_of_unsloths_own_leaves_model_and_tokenizer_as_stored(ready: Make) -> None:
    config = ready("--model", "builtin-gptneo", "--format", "alpaca", "--method", "base", "--max-length", "128")
    model, tokenizer, _ = load_base(config)
    rows = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(rows + 1)
    tokenizer.pad_token = None
    as_stored(model, tokenizer, rows)
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == model.config.vocab_size == rows
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == model.config.pad_token_id
    assert len(tokenizer) == rows


def test_saved_weights_keep_their_digits_whatever_they_are_loaded_through(ready: Make, tmp_path: Path) -> None:
    import torch

    model = load_base(ready("--method", "base"))[0]
    weight = model.get_input_embeddings().weight
    weight.mul_(1.001)
    model.save_pretrained(tmp_path)
    saved = weight.detach().clone()
    weight.copy_(saved.bfloat16())
    assert not torch.equal(weight, saved)
    restore(model, tmp_path)
    assert torch.equal(weight, saved)


def test_weights_that_are_saved_under_other_names_hinder_no_loading(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file
    from transformers import GPTNeoXConfig

    import_unsloth()
    model = built(GPTNeoXConfig(vocab_size=64, hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32))
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() - model.state_dict().keys() == {"embed_out.weight"}
    weight = model.get_input_embeddings().weight
    saved = weight.detach().clone()
    weight.data += 1
    restore(model, tmp_path)
    assert torch.equal(weight, saved)


def test_every_method_starts_from_the_same_adapter(ready: Make) -> None:
    import torch

    first = []
    for method in ("qlora", "lora", "dora"):
        config = ready("--method", method)
        model = attach(load_base(config)[0], config)
        first.append({n: p.detach() for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n})
    assert len(first[0]) == 2 * 6 * 7
    for other in first[1:]:
        assert other.keys() == first[0].keys()
        assert all(torch.equal(other[n], first[0][n]) for n in other)


def masks(rows: list[dict[str, Any]], renderer: Renderer) -> tuple[list[list[int]], list[list[int]]]:
    """The kit's ids and labels, each with the newline that the template puts after the last terminator (no loss there)."""
    newline = renderer.tokenizer.convert_tokens_to_ids("\n")
    made = renderer.examples(rows)
    return [[*e.input_ids, newline] for e in made], [[*e.labels, -100] for e in made]


@pytest.mark.parametrize("method", ["dora", "full", "galore"])
def test_of_a_model_that_also_sees_only_what_text_goes_through_is_trained(method: str) -> None:
    import_unsloth()
    import torch
    from transformers import Gemma3Config

    text = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
            "vocab_size": 640, "pad_token_id": 0}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    model = built(Gemma3Config(text_config=text, vision_config=vision)).requires_grad_(False)
    assert any("vision_tower" in n and n.endswith("q_proj") for n, _ in model.named_modules())
    wanted = config("--method", method, "--rank", "4")
    adapted, counted = adapter_size(wanted, model), count(wanted, model)
    made = attach(model, wanted)
    trained = {n: p for n, p in made.named_parameters() if p.requires_grad}
    assert trained
    assert not [n for n in trained if "language_model" not in n and "lm_head" not in n]
    if method == "dora":
        assert sum(p.numel() for p in trained.values()) == adapted
    else:
        rest = {id(p) for n, p in made.named_parameters() if "language_model" in n}
        embeddings = {id(made.get_input_embeddings().weight)} if method == "galore" else set()
        assert {id(p) for p in trained.values()} == rest - embeddings
        assert counted.trained > 4 * sum(p.numel() for p in trained.values())
    assert torch.isfinite(made(input_ids=torch.ones(1, 4, dtype=torch.long)).logits).all()


def test_the_mask_against_unsloths_train_on_responses_only(loaded: tuple[Any, Renderer, list[Any]]) -> None:
    """Equal but for one token a turn: Unsloth searches for the next user header and so also trains the newline before it."""
    from unsloth.chat_templates import train_on_responses_only

    _, renderer, _ = loaded
    rows = [row for _, row in list(Stream("ultrachat=builtin").rows())[:40]]
    ids, labels = masks(rows, renderer)
    find = train_on_responses_only(
        None, instruction_part="<start_of_turn>user\n", response_part="<start_of_turn>model\n", tokenizer=renderer.tokenizer, return_function=True
    )
    newline = renderer.tokenizer.convert_tokens_to_ids("\n")
    for row_ids, ours, theirs in zip(ids, labels, find({"input_ids": ids})["labels"], strict=True):
        differing = [i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
        assert all(row_ids[i] == newline and row_ids[i - 1] == renderer.terminator and ours[i] == -100 for i in differing)
        assert len(differing) <= row_ids.count(renderer.terminator)


def test_the_mask_against_trls_assistant_mask(loaded: tuple[Any, Renderer, list[Any]]) -> None:
    """Equal where the template marks reply and terminator as generated, as TRL's assistant_only_loss asks of it."""
    _, renderer, _ = loaded
    rows = [row for _, row in list(Stream("tulu=builtin").rows())[:40]]
    marked = TEMPLATE.replace(
        "{{ (first if loop.first else '') + turn['content'] | trim + '<end_of_turn>\\n' }}",
        "{% if turn['role'] == 'assistant' %}{% generation %}{{ turn['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\\n' }}"
        "{% else %}{{ (first if loop.first else '') + turn['content'] | trim + '<end_of_turn>\\n' }}{% endif %}",
    )
    assert "generation" in marked
    for row, ids, labels in zip(rows, *masks(rows, renderer), strict=True):
        theirs = renderer.tokenizer.apply_chat_template(
            row["messages"], chat_template=marked, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert theirs["input_ids"] == ids
        assert [int(label != -100) for label in labels] == theirs["assistant_masks"]
