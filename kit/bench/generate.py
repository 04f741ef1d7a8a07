"""Replies one by one, in random batches, and as the kit makes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from kit.bench.harness import interleave, summary
from kit.config import RunConfig


def generate(config: RunConfig, rounds: int, prompts: int = 128) -> dict[str, Any]:
    """Replies to test prompts: one by one and in random batches by transformers, and sorted with ended rows leaving, as the kit does."""
    import random

    import torch

    from kit import dataset, generation
    from kit.model import load_trained
    from kit.prompts import Renderer

    model, tokenizer, _ = load_trained(config)
    renderer = Renderer(tokenizer, config.format, config.max_length)
    exams = renderer.exams(dataset.rows(config, "test")[:prompts])
    options: dict[str, Any] = {"stop": renderer.stop_ids, "pad": tokenizer.pad_token_id, "max_new_tokens": config.max_new_tokens}

    def plain(rows: Sequence[int]) -> None:
        ids, mask = generation.padded([exams[i].prompt_ids for i in rows], options["pad"], model.device)
        with torch.inference_mode():
            model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=options["max_new_tokens"], do_sample=False,
                           eos_token_id=options["stop"], pad_token_id=options["pad"])  # fmt: skip

    def kit(rows: Sequence[int]) -> None:
        generation.generate(model, [exams[i].prompt_ids for i in rows], **options)

    shuffled, ordered = random.Random(0).sample(range(len(exams)), len(exams)), generation.longest_first(exams)

    def over(order: Sequence[int], size: int, work: Callable[[Sequence[int]], None]) -> Callable[[], None]:
        def all_batches() -> None:
            for rows in generation.batches(order, size):
                work(rows)

        return all_batches

    size = config.eval_batch_size
    variants = {"one by one": over(shuffled, 1, plain), "random batches": over(shuffled, size, plain), "kit": over(ordered, size, kit)}
    times, peaks = interleave(variants, rounds)
    return summary("generate", times, peaks, [("one by one", "kit"), ("random batches", "kit")])
