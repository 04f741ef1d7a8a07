"""The kit's data stage beside what a plain script does: `datasets`, a chat template that marks the assistant's tokens, and nothing else."""

from __future__ import annotations

import dataclasses
import tempfile
from typing import Any

from kit.bench.harness import interleave, summary
from kit.config import RunConfig
from kit.conversations import INPUT
from kit.dataset import prepare
from kit.errors import UserError
from kit.hub import load_tokenizer
from kit.prompts import Renderer
from kit.sources import Stream

# The built-in tokenizer's and Gemma's turns, with the tags by which transformers finds the assistant's tokens.
TEMPLATE = (
    "{{ bos_token }}{% set system = messages[0]['content'] + '\n\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for turn in (messages[1:] if system else messages) %}"
    "{% if turn['role'] == 'user' %}{{ '<start_of_turn>user\n' + (system if loop.first else '') + turn['content'] | trim + '<end_of_turn>\n' }}"
    "{% else %}{{ '<start_of_turn>model\n' }}{% generation %}{{ turn['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}"
    "{% endif %}{% endfor %}"
)


def data(config: RunConfig, rounds: int) -> dict[str, Any]:
    """All rows of the sources' files -> tokens and mask, by a plain script and by the kit; then the kit's whole stage.

    The stage also finds duplicates and near duplicates, splits, looks for leaks and accounts for every row; it tokenises the rows drawn.
    `rows` and `supervised` say what each made.
    """
    if missing := [s for s in config.source if Stream(s).path is None]:
        raise UserError(f"the data bench reads files, not the hub: give --source NAME=FILE instead of {', '.join(missing)}")
    made: dict[str, dict[str, int]] = {}

    def stage() -> None:
        with tempfile.TemporaryDirectory() as folder:
            manifest = prepare(dataclasses.replace(config, data_dir=folder))
            made["kit stage"] = {"rows": sum(s["kept"] for s in manifest["sources"].values())}

    variants = {"plain": lambda: made.update(plain=plain(config)), "kit": lambda: made.update(kit=kit(config)), "kit stage": stage}
    times, peaks = interleave(variants, rounds)
    found = summary("data", times, peaks, [("kit", "plain"), ("kit stage", "plain")])
    for name, counted in made.items():
        found["variants"][name] |= counted
    return found


def kit(config: RunConfig) -> dict[str, int]:
    """Rows read, checked and rendered by the kit."""
    rows = [row for spec in config.source for _, row in Stream(spec).rows()]
    examples = Renderer(load_tokenizer(config.model, config.revision), config.format, config.max_length).examples(rows)
    return {"rows": len(examples), "supervised": sum(e.supervised for e in examples)}


def plain(config: RunConfig) -> dict[str, int]:
    """The same through `datasets`, with nothing cached from the round before."""
    from datasets import concatenate_datasets, disable_caching, disable_progress_bars, load_dataset

    disable_caching()
    disable_progress_bars()
    tokenizer: Any = load_tokenizer(config.model, config.revision)

    def tokenised(batch: dict[str, list[Any]]) -> dict[str, Any]:
        made = tokenizer.apply_chat_template(batch["messages"], chat_template=TEMPLATE, return_dict=True, return_assistant_tokens_mask=True,
                                             truncation=True, max_length=config.max_length)  # fmt: skip
        return {"input_ids": made["input_ids"], "assistant_masks": made["assistant_masks"]}

    with tempfile.TemporaryDirectory() as folder:
        parts = []
        for spec in config.source:
            part = load_dataset("json", data_files=str(Stream(spec).path), split="train", cache_dir=folder)
            part = part.map(to_messages, remove_columns=part.column_names).filter(usable)
            parts.append(part.map(tokenised, batched=True, remove_columns=["messages"]))
        rows = concatenate_datasets(parts)
        return {"rows": len(rows), "supervised": sum(map(sum, rows["assistant_masks"]))}


def to_messages(row: dict[str, Any]) -> dict[str, Any]:
    """A raw row's turns, as most scripts make them."""
    if "messages" in row:
        return {"messages": [{"role": m["role"], "content": m["content"]} for m in row["messages"]]}
    prompt = row["instruction"] + (f"{INPUT}{row['input']}" if row["input"] else "")
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": row["output"]}]}


def usable(row: dict[str, Any]) -> bool:
    """Whether the turns, after a system turn, alternate, end with the assistant and say something."""
    turns = row["messages"][row["messages"][0]["role"] == "system" :] if row["messages"] else []
    alternate = all(m["role"] == ("user", "assistant")[i % 2] and m["content"].strip() for i, m in enumerate(turns))
    return bool(turns) and len(turns) % 2 == 0 and alternate
