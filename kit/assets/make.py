"""python -m kit.assets.make: rebuilds the built-in sample data, tokenizer and base model, all from one seed (about 20 minutes on 2 cores).

The model is a Gemma-3-architecture network, pretrained on plain documents about the composed world, on half of the skills in
question-and-answer form, and on chats whose replies stay near the topic without doing what was asked. It speaks, but it does not
follow instructions: that is left to fine-tuning.
"""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

from kit.assets import compose
from kit.console import console

HERE = Path(__file__).parent
SEED, ROWS = 20261122, 900
VOCABULARY, CONTEXT = 2048, 128
SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
# Gemma's format, written anew: system text folded into the first user turn, contents trimmed, roles alternate.
TEMPLATE = """\
{{ bos_token }}{% set first = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}\
{% set turns = messages[1:] if messages[0]['role'] == 'system' else messages %}{% for turn in turns %}\
{% if (turn['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate user, assistant.') }}{% endif %}\
{{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\\n' }}\
{{ (first if loop.first else '') + turn['content'] | trim + '<end_of_turn>\\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""


def write_data(folder: Path) -> None:
    """The sample data in the three datasets' raw shapes."""
    folder.mkdir(parents=True, exist_ok=True)

    def generator(name: str, number: int) -> random.Random:
        return random.Random(f"{SEED} {name} {number}")

    alpaca = compose.distinct(lambda i: dict(compose.alpaca_row(generator("alpaca", i))), ROWS)
    (folder / "alpaca_sample.json").write_text(json.dumps(alpaca, indent=0) + "\n", encoding="utf-8")
    tulu = compose.distinct(lambda i: compose.tulu_row(generator("tulu", i), i), ROWS)
    ultrachat = compose.distinct(lambda i: compose.ultrachat_row(generator("ultrachat", i), i), ROWS)
    for name, rows in {"tulu": tulu, "ultrachat": ultrachat}.items():
        (folder / f"{name}_sample.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


def corpus(n: int, tokenizer: Any = None) -> list[str]:
    """n pretraining texts: two thirds plain documents, one third chats (only with a tokenizer, whose template renders them)."""
    rng = random.Random(f"{SEED} corpus")
    texts = []
    for _ in range(n):
        if tokenizer is None or rng.random() < 0.65:
            texts.append(compose.document(rng))
            continue
        turns = [turn for _ in range(rng.choice([1, 1, 2, 3])) for turn in compose.chatter(rng)]
        roles = ["user", "assistant"] * len(turns)
        texts.append(tokenizer.apply_chat_template([{"role": r, "content": t} for r, t in zip(roles, turns, strict=False)], tokenize=False))
    return texts


def make_tokenizer(folder: Path) -> Any:
    """A byte-fallback BPE in Gemma's manner: spaces become U+2581, no pre-tokenisation at newlines, bos added by the tokenizer."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Punctuation("isolated")]
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    fallback = [f"<0x{i:02X}>" for i in range(256)]
    printable = [chr(i) for i in range(33, 127)] + ["\n", "▁"]
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=SPECIAL + fallback, initial_alphabet=printable, show_progress=False)
    requests = [compose.joined(skill(random.Random(f"{i}")))[j] for i in range(300) for skill in compose.SKILLS.values() for j in (0, 1)]
    tokenizer.train_from_iterator(corpus(20000) + requests, trainer)
    # The byte tokens must be ordinary vocabulary: only real control tokens are special.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", 2)])
    names = dict(zip(("pad_token", "eos_token", "bos_token", "unk_token"), SPECIAL, strict=False))
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=SPECIAL[4:], model_max_length=4096, clean_up_tokenization_spaces=False, **names
    )
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    return fast


def blocks(tokenizer: Any, n: int) -> Any:
    """Packed training blocks: int64 [blocks, CONTEXT + 1]."""
    import torch

    ids: list[int] = []
    for text in corpus(n, tokenizer):
        chat = text.startswith("<bos>")
        ids += tokenizer(text, add_special_tokens=not chat)["input_ids"] + [tokenizer.eos_token_id]
    count = (len(ids) - 1) // CONTEXT
    return torch.stack([torch.tensor(ids[i * CONTEXT : (i + 1) * CONTEXT + 1]) for i in range(count)])


def make_model(tokenizer: Any, folder: Path, *, texts: int = 100000) -> None:
    """The Gemma-3-architecture model, pretrained on documents and chats."""
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    torch.manual_seed(SEED)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=48,
        query_pre_attn_scalar=48,
        sliding_window=512,
        max_position_embeddings=4096,
        pad_token_id=0,
        eos_token_id=[1, 5],
        bos_token_id=2,
        attn_implementation="sdpa",
    )
    model = Gemma3ForCausalLM(config)
    model.generation_config.eos_token_id = [1, 5]
    pretrain(model, blocks(tokenizer, texts), folder)


def pretrain(model: Any, data: Any, folder: Path, *, batch: int = 32, peak: float = 2e-3) -> None:
    """One epoch over int64 [blocks, CONTEXT + 1] with AdamW and a cosine schedule; saves bfloat16 safetensors."""
    import torch

    data = data[torch.randperm(len(data))]
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1)
    steps = len(data) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, peak, total_steps=steps, pct_start=0.05)
    started = time.perf_counter()
    for step in range(steps):
        rows = data[step * batch : (step + 1) * batch]
        loss = torch.nn.functional.cross_entropy(model(rows[:, :-1]).logits.flatten(0, 1).float(), rows[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == steps - 1:
            console.print(f"step {step}/{steps}  loss {loss.item():.3f}  {time.perf_counter() - started:.0f} s")
    model.generation_config.do_sample = False
    model.to(torch.bfloat16).save_pretrained(folder)


def make_gptneo(folder: Path, *, texts: int = 24000) -> None:
    """A GPT-Neo-architecture model and its GPT-2-like tokenizer: bos = eos, no pad token, no chat template; pretrained on plain documents."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import GPTNeoConfig, GPTNeoForCausalLM, PreTrainedTokenizerFast

    documents = corpus(texts)
    made = Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end, alphabet = "<|endoftext|>", pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(documents[:8000], trainers.BpeTrainer(vocab_size=1024, special_tokens=[end], initial_alphabet=alphabet, show_progress=False))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, bos_token=end, eos_token=end, unk_token=end, model_max_length=2048)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(SEED)
    config = GPTNeoConfig(
        vocab_size=len(tokenizer), hidden_size=128, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]], window_size=128,
        max_position_embeddings=1024, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    ids = [i for text in tokenizer(documents)["input_ids"] for i in [*text, 0]]
    pretrain(GPTNeoForCausalLM(config), torch.tensor(ids[: len(ids) // (CONTEXT + 1) * (CONTEXT + 1)]).view(-1, CONTEXT + 1), folder)


def main() -> None:
    write_data(HERE / "data")
    tokenizer = make_tokenizer(HERE / "model")
    make_model(tokenizer, HERE / "model")
    make_gptneo(HERE / "gptneo")


if __name__ == "__main__":
    main()
