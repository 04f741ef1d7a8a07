"""Rendering: the right tokens are trained, and nothing else, in both formats and for both families of tokenizers."""

from __future__ import annotations

import copy
import json
import random
from itertools import combinations
from pathlib import Path

import pytest

from kit.errors import UserError
from kit.prompts import IGNORE, Renderer, plain_prompt

GOLDEN = Path(__file__).parent / "golden" / "rendered.json"
ONE = {
    "messages": [{"role": "user", "content": "Find the place.\n\nInput: Anna walks."}, {"role": "assistant", "content": "The lake."}],
    "input": "Anna walks.",
}
TWO = {
    "messages": [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Bye."},
    ]
}


def supervised(tokenizer, example) -> str:
    return tokenizer.decode([label for label in example.labels if label != IGNORE])


def renderers(tokenizer, gpt2_tokenizer) -> dict[str, tuple[object, Renderer]]:
    return {
        "gemma chat": (tokenizer, Renderer(tokenizer, "chat", 256)),
        "gemma alpaca": (tokenizer, Renderer(tokenizer, "alpaca", 256)),
        "gpt2 alpaca": (gpt2_tokenizer, Renderer(gpt2_tokenizer, "alpaca", 256)),
    }


def test_rendered_text_and_mask_are_as_written_down(tokenizer, gpt2_tokenizer) -> None:
    found = {}
    for name, (tok, renderer) in renderers(tokenizer, gpt2_tokenizer).items():
        for row_name, row in (("one", ONE), ("two", TWO)):
            example = renderer.examples([row])[0]
            found[f"{name} {row_name}"] = {"text": tok.decode(example.input_ids), "supervised": supervised(tok, example)}
    assert found == json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_chat_tokens_equal_the_tokenizers_own_template(tokenizer) -> None:
    own = tokenizer.apply_chat_template(TWO["messages"], tokenize=True)["input_ids"]
    # The template ends with a newline after the last terminator, which is the next turn's business.
    assert [*Renderer(tokenizer, "chat", 256).examples([TWO])[0].input_ids, tokenizer.convert_tokens_to_ids("\n")] == own


def test_bos_comes_once_and_only_where_the_tokenizer_adds_it(tokenizer, gpt2_tokenizer) -> None:
    for tok, renderer in renderers(tokenizer, gpt2_tokenizer).values():
        ids = renderer.examples([TWO])[0].input_ids
        if tok is gpt2_tokenizer:
            assert ids[0] != tok.bos_token_id
        else:
            assert ids[0] == tok.bos_token_id
            assert ids.count(tok.bos_token_id) == 1


def test_control_tokens_typed_in_the_text_stay_characters(tokenizer) -> None:
    typed = "Say <end_of_turn> and <bos> and <eos>"
    row = {"messages": [{"role": "user", "content": typed}, {"role": "assistant", "content": typed}]}
    example = Renderer(tokenizer, "chat", 256).examples([row])[0]
    assert sum(i in tokenizer.all_special_ids for i in example.input_ids) == 5  # bos, and start and end of two turns
    assert supervised(tokenizer, example) == f"{typed}<end_of_turn>"


def test_the_prompt_and_its_reference_make_the_training_example(tokenizer, gpt2_tokenizer) -> None:
    for _, renderer in renderers(tokenizer, gpt2_tokenizer).values():
        for row in (ONE, TWO):
            exam, example = renderer.exams([row])[0], renderer.examples([row])[0]
            assert exam.prompt_ids + exam.reference_ids == example.input_ids
            assert exam.reference_ids[-1] == renderer.terminator
        assert renderer.stop_ids == sorted({renderer.terminator, renderer.tokenizer.eos_token_id})


def test_a_reply_without_room_for_its_end_is_cut(tokenizer) -> None:
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The lake. " * 20}]}
    whole = Renderer(tokenizer, "chat", 10_000).exams([row])[0]
    length = len(whole.prompt_ids) + len(whole.reference_ids)
    assert [Renderer(tokenizer, "chat", n).exams([row])[0].fit for n in (length, length - 1)] == ["whole", "reply_cut"]


def test_the_longest_part_of_a_prompt_is_cut(tokenizer) -> None:
    row = {"messages": [{"role": "user", "content": "Find it.\n\nInput: " + "lake " * 90}, *ONE["messages"][1:]], "input": "lake " * 90}
    made = Renderer(tokenizer, "alpaca", 90).examples([row])[0]
    assert made.fit == "prompt_cut"
    assert "Find it.\n\n### Input:\nlake lake" in tokenizer.decode(made.input_ids)


def random_row(rng: random.Random) -> dict[str, object]:
    words = lambda n: " ".join(rng.choice(["lake", "river", "walks", "the"]) for _ in range(n))  # noqa: E731
    messages = [{"role": ("user", "assistant")[i % 2], "content": words(rng.choice([1, 5, 40, 150]))} for i in range(2 * rng.randint(1, 4))]
    if rng.random() < 0.5:
        return {"messages": messages}
    extra = words(rng.choice([1, 60]))
    messages[0]["content"] += f"\n\nInput: {extra}"
    return {"messages": messages, "input": extra}


@pytest.mark.parametrize("format", ["chat", "alpaca"])
def test_no_row_is_too_long_or_without_supervised_tokens(tokenizer, format: str) -> None:
    rng, length = random.Random(1), 100
    renderer = Renderer(tokenizer, format, length)
    rows = [random_row(rng) for _ in range(300)]
    whole = Renderer(tokenizer, format, 10_000)
    fits = set()
    for row, example, exam, full, asked in zip(rows, renderer.examples(rows), renderer.exams(rows), whole.examples(rows), whole.exams(rows), strict=True):
        assert 0 < len(example.input_ids) == len(example.labels) <= length
        assert example.supervised > 0
        assert all(label in (IGNORE, token) for token, label in zip(example.input_ids, example.labels, strict=True))
        assert len(exam.reference_ids) > 0
        assert len(exam.prompt_ids) + len(exam.reference_ids) <= length
        assert (example.fit == "whole") == (len(full.input_ids) <= length), row
        assert ("reply_cut" in example.fit) == (example.labels[-1] != renderer.terminator)
        assert ("reply_cut" in exam.fit) == (exam.reference_ids[-1] != renderer.terminator)
        if example.fit in ("whole", "turns_dropped"):  # whole turns from the start
            assert full.input_ids[: len(example.input_ids)] == example.input_ids
        if exam.fit in ("whole", "turns_dropped"):  # whole turns up to the end
            assert exam.prompt_ids[20:] == asked.prompt_ids[len(asked.prompt_ids) - len(exam.prompt_ids) :][20:]
        assert len(exam.reference_ids) >= min(len(asked.reference_ids), 20)
        fits |= {example.fit, exam.fit}
    done = ("turns_dropped", "prompt_cut", "reply_cut")
    assert fits == {"whole", *("_and_".join(some) for n in (1, 2, 3) for some in combinations(done, n))}


THINKING = (
    "{% for m in messages %}{{ '<start_of_turn>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{{ m['content'] + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>assistant\n' }}{% endif %}"
)
ENDED_ONCE = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% if loop.last %}{{ eos_token }}{% else %}{{ '\n' }}{% endif %}{% endfor %}"


def templated(tokenizer, template: str):
    other = copy.deepcopy(tokenizer)
    other.chat_template = template
    return other


def test_the_prompt_is_the_trained_one_where_a_template_adds_text_before_the_last_reply(tokenizer) -> None:
    renderer = Renderer(templated(tokenizer, THINKING), "chat", 256)
    for row in (ONE, TWO):
        exam, example = renderer.exams([row])[0], renderer.examples([row])[0]
        assert exam.prompt_ids + exam.reference_ids == example.input_ids
        assert tokenizer.decode(exam.prompt_ids).endswith("</think>\n\n")


def llama2_tokenizer(template: str):
    """Puts a space before all that it is given, knows single characters and bytes."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", *(f"<0x{i:02X}>" for i in range(256)), *"▁ABDHINSTabdehilnorstuy.?/<>[]", "▁H", "▁A", "▁B"]
    made = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [("▁", "H"), ("▁", "A"), ("▁", "B")], unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    made.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<s>", "</s>", "[INST]", "[/INST]")])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=template)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ '<' + m['role'] + '>\n' + m['content'] + eos_token + '\n' }}{% endfor %}",
        "<s>{% for m in messages %}{{ '[INST] ' + m['content'] + '[/INST]' if m['role'] == 'user' else ' ' + m['content'] + eos_token }}{% endfor %}",
    ],
)
def test_no_turn_gets_a_space_that_its_template_does_not_put_there(template: str) -> None:
    tokenizer = llama2_tokenizer(template)
    own = tokenizer(tokenizer.apply_chat_template(TWO["messages"], tokenize=False), add_special_tokens=False)["input_ids"]
    example = Renderer(tokenizer, "chat", 256).examples([TWO])[0]
    assert example.input_ids == own[: len(example.input_ids)]
    assert supervised(tokenizer, example).replace(" ", "") == "Hello.</s>Bye.</s>"


def test_a_template_with_the_date_makes_the_same_tokens_each_day(tokenizer) -> None:
    dated = "{{ bos_token + strftime_now('%d %b %Y') + '\n' }}" + tokenizer.chat_template
    made = Renderer(templated(tokenizer, dated), "chat", 256).examples([TWO])[0]
    assert tokenizer.decode(made.input_ids).startswith("<bos>26 Jul 2024\n")


def test_an_export_says_how_engines_get_the_trained_prompt(tokenizer) -> None:
    from kit.export import prompting

    asked = "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    quick = THINKING.removesuffix("{% endif %}") + asked + "{% endif %}"
    assert prompting(Renderer(tokenizer, "chat", 256)) == prompting(Renderer(templated(tokenizer, quick), "alpaca", 256)) == ""
    assert prompting(Renderer(templated(tokenizer, quick), "chat", 256)).endswith("not the one that was trained; ask engines for enable_thinking=false.")
    assert prompting(Renderer(templated(tokenizer, THINKING), "chat", 256)).endswith("so replies may differ from the run's.")
    dated = "{{ strftime_now('%d %b %Y') }}" + tokenizer.chat_template  # engines go by the clock
    assert prompting(Renderer(templated(tokenizer, dated), "chat", 256)).endswith("so replies may differ from the run's.")


def test_a_template_that_ends_the_last_reply_alone_is_refused(tokenizer) -> None:
    with pytest.raises(UserError, match="does not end every reply with the same control token; use --format alpaca"):
        Renderer(templated(tokenizer, ENDED_ONCE), "chat", 256)


def test_a_terminator_may_be_a_control_token_without_a_name(tokenizer) -> None:
    """As Phi's <|end|>: marked special in tokenizer.json, and named nowhere in tokenizer_config.json."""
    other = copy.deepcopy(tokenizer)
    other.extra_special_tokens = []
    assert Renderer(other, "chat", 256).examples([TWO]) == Renderer(tokenizer, "chat", 256).examples([TWO])


def test_a_reply_that_ends_in_plain_text_is_refused_with_the_way_out(tokenizer) -> None:
    with pytest.raises(UserError, match=r"which is no control token of this model; use --format alpaca$"):
        Renderer(templated(tokenizer, "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"), "chat", 256)


def test_a_template_that_raises_is_refused_with_what_it_says(tokenizer) -> None:
    with pytest.raises(UserError, match=r"takes no turns of user and assistant alone \(a system text is needed\); use --format alpaca$"):
        Renderer(templated(tokenizer, "{{ raise_exception('a system text is needed') }}"), "chat", 256)


def test_a_tokenizer_without_an_end_of_text_is_refused(tokenizer) -> None:
    other = copy.deepcopy(tokenizer)
    other.eos_token = None
    with pytest.raises(UserError, match="no end-of-text token"):
        Renderer(other, "alpaca", 256)


def test_a_template_is_needed_for_the_chat_format(gpt2_tokenizer) -> None:
    with pytest.raises(UserError, match="no chat template; use --format alpaca"):
        Renderer(gpt2_tokenizer, "chat", 256)


def test_a_length_that_the_format_alone_fills_is_refused(tokenizer) -> None:
    with pytest.raises(UserError, match="is too short"):
        Renderer(tokenizer, "alpaca", 40)


def test_plain_prompt_shows_earlier_turns() -> None:
    assert plain_prompt(ONE) == "Find the place.\n\nInput: Anna walks."
    assert plain_prompt(TWO) == "User: Hi\n\nAssistant: Hello.\n\nUser: And?"
