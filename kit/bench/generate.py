"""Replies one by one, in random batches, and as the kit makes them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from kit import dataset, generation
from kit.bench.harness import ALONE, interleave, summary
from kit.config import RunConfig
from kit.model import load_trained
from kit.prompts import Renderer

RANDOM, COMPARED = 64, 64
GPU_SHARE = 16  # on a GPU one prompt in so many is answered one by one, and the time counts for all: hours otherwise


def generate(config: RunConfig, rounds: int, prompts: int = 512) -> dict[str, Any]:
    """Replies to test prompts, one by one and in random batches by the model's `generate` (on a GPU Unsloth's), and in the kit's; how many of these differ.

    In float32 none may; in 16 bits some do, since what is rounded depends on the batch.
    """
    import torch

    model, tokenizer, chosen = load_trained(config)
    renderer = Renderer(tokenizer, config.format, config.max_length)
    exams = renderer.exams(dataset.rows(config, "test")[:prompts])
    stop, pad, n = generation.ends(model.generation_config, renderer), tokenizer.pad_token_id, config.max_new_tokens
    plan = generation.longest_first(exams)

    def plain(rows: Sequence[int]) -> list[generation.Reply]:
        ids, mask = generation.padded([exams[i].prompt_ids for i in rows], pad, model.device)
        with torch.inference_mode():
            made = model.generate(input_ids=ids, attention_mask=mask, max_length=None, max_new_tokens=n, do_sample=False, eos_token_id=stop, pad_token_id=pad)
        return [generation.until_stop(reply, stop) for reply in made[:, ids.shape[1] :].tolist()]

    def kit(rows: Sequence[int]) -> list[generation.Reply]:
        return generation.generate(model, [exams[i].prompt_ids for i in rows], stop=stop, pad=pad, max_new_tokens=n)

    def over(batches: Sequence[Sequence[int]], work: Callable[[Sequence[int]], list[generation.Reply]]) -> dict[int, generation.Reply]:
        return {i: reply for rows in batches for i, reply in zip(rows, work(rows), strict=True)}

    share = GPU_SHARE if model.device.type == "cuda" else 1
    shuffled = random.Random(0).sample(range(len(exams)), len(exams))
    planned = [plan[part] for part in generation.cut([len(exams[i].prompt_ids) + n for i in plan], config.eval_tokens)]
    variants = {
        "one by one": partial(over, [[i] for i in shuffled[::share]], plain),
        f"random batches of {RANDOM}": partial(over, [shuffled[i : i + RANDOM] for i in range(0, len(shuffled), RANDOM)], plain),
        "kit": partial(over, planned, kit),
    }  # fmt: skip
    times, peaks = interleave(variants, rounds)
    if "one by one" in times:  # not in a process that measures the memory of another variant
        times["one by one"] = [seconds * share for seconds in times["one by one"]]
    found = summary("generate", times, peaks, [(name, "kit") for name in variants if name != "kit"])
    if ALONE:
        return found
    replies, alone = variants["kit"](), shuffled[:COMPARED]
    differing = sum(replies[i].ids != plain([i])[0].ids for i in alone)
    return found | {
        "prompts": len(exams),
        "one_by_one": len(shuffled[::share]),
        "precision": chosen.name,
        "replies_that_differ": {"of": len(alone), "differ": differing},
    }
