"""Prompts -> greedy replies, and reference replies -> their likelihood: batched, left-padded, longest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from kit.prompts import Exam, Renderer

# Logits held at once: 2^28 numbers are 1 GiB in float32, about 1,000 tokens of Gemma's 262,144-word vocabulary.
LOGITS = 2**28
# Ended rows leave the batch once this share of it is left: copying the cache costs more than a few idle rows.
LEAVE = 0.75
# Prompt tokens read at once, padding counted: what stays in a CPU's cache; on a GPU what keeps it busy.
READ, GPU_READ = 2**11, 2**14


class Reply(NamedTuple):
    """A generated reply: its token ids without the terminator, and whether it ended by itself."""

    ids: list[int]
    finished: bool


def longest_first(exams: Sequence[Exam]) -> list[int]:
    """Indices by falling length of the prompt (and reference), so that memory runs out at the first batch or never, and batches have little padding."""
    return sorted(range(len(exams)), key=lambda i: (-len(exams[i].prompt_ids), -len(exams[i].reference_ids)))


def take(lengths: Sequence[int], tokens: int) -> int:
    """How many of the sequences, from the first on, make a batch of at most so many tokens, padding counted; at least one."""
    longest, n = 0, 0
    for length in lengths:
        longest = max(longest, length)
        if n and (n + 1) * longest > tokens:
            break
        n += 1
    return n


def cut(lengths: Sequence[int], tokens: int) -> Iterator[slice]:
    """Consecutive batches of at most so many tokens."""
    start = 0
    while start < len(lengths):
        end = start + take(lengths[start:], tokens)
        yield slice(start, end)
        start = end


def padded(sequences: Sequence[Sequence[int]], pad: int, device: Any) -> tuple[Any, Any]:
    """Left-padded ids and attention mask, int64 [batch, longest]."""
    import torch

    width = max(map(len, sequences))
    ids = torch.tensor([[pad] * (width - len(s)) + list(s) for s in sequences], device=device)
    mask = torch.tensor([[0] * (width - len(s)) + [1] * len(s) for s in sequences], device=device)
    return ids, mask


def generate(model: Any, prompts: Sequence[Sequence[int]], *, stop: Sequence[int], pad: int, max_new_tokens: int) -> list[Reply]:
    """Greedy replies to one batch of prompts. Rows leave the batch when they have ended, so that long replies do not wait for short ones."""
    import torch

    if keeps_states(model):
        return _by_transformers(model, prompts, stop, pad, max_new_tokens)
    stops = torch.tensor(list(stop), device=model.device)
    replies: list[list[int]] = [[] for _ in prompts]
    rows, alive = list(range(len(prompts))), torch.ones(len(prompts), dtype=torch.bool, device=model.device)
    with measuring(model):
        cache, mask, chosen = _read(model, prompts, pad, max_new_tokens)
        positions = mask[:, : cache.longest].sum(-1, keepdim=True)
        for step in range(1, max_new_tokens + 1):
            for row, token, live in zip(rows, chosen.tolist(), alive.tolist(), strict=True):
                if live:
                    replies[row].append(token)
            alive &= ~torch.isin(chosen, stops)
            left = int(alive.sum())
            if left == 0 or step == max_new_tokens:
                break
            if left <= LEAVE * len(rows):
                keep = alive.nonzero().squeeze(-1)
                cache.batch_select_indices(keep)
                mask, positions, chosen, alive = mask[keep], positions[keep], chosen[keep], alive[keep]
                rows = [rows[i] for i in keep.tolist()]
            made = model(input_ids=chosen[:, None], attention_mask=mask[:, : cache.longest + step], position_ids=positions,
                         past_key_values=cache, use_cache=True, logits_to_keep=1)  # fmt: skip
            chosen, positions = made.logits[:, -1].argmax(-1), positions + 1
    return [until_stop(reply, stop) for reply in replies]


def keeps_states(model: Any) -> bool:
    """Whether what a layer keeps of a text is not keys and values alone, but a state: Mamba's and its hybrids', or LFM2's convolutions."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    return model._is_stateful or any(type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) for layer in DynamicCache(config=model.config).layers)


def _by_transformers(model: Any, prompts: Sequence[Sequence[int]], stop: Sequence[int], pad: int, max_new_tokens: int) -> list[Reply]:
    """As `generate`, whose cache has no room for states."""
    ids, mask = padded(prompts, pad, model.device)
    settings = {"do_sample": False, "max_length": None, "max_new_tokens": max_new_tokens, "eos_token_id": list(stop), "pad_token_id": pad}
    with measuring(model):
        made = model.generate(input_ids=ids, attention_mask=mask, **settings)
    return [until_stop(row, stop) for row in made[:, ids.shape[1] :].tolist()]


def _read(model: Any, prompts: Sequence[Sequence[int]], pad: int, max_new_tokens: int) -> tuple[Any, Any, Any]:
    """(cache, attention mask [rows, longest + max_new_tokens], first tokens [rows]) of the prompts, read a few at a time."""
    import torch
    from transformers import DynamicCache

    from kit.kvcache import RoomyCache

    lengths = [len(p) for p in prompts]
    cache = RoomyCache(len(prompts), max(lengths), max_new_tokens)
    mask = torch.ones(len(prompts), cache.longest + max_new_tokens, dtype=torch.long, device=model.device)
    chosen = []
    for part in cut(lengths, read_at_once(model)):
        ids, seen = padded(prompts[part], pad, model.device)
        read = DynamicCache()
        made = model(input_ids=ids, attention_mask=seen, position_ids=position_ids(seen), past_key_values=read, use_cache=True, logits_to_keep=1)
        chosen.append(made.logits[:, -1].argmax(-1))
        cache.put(read, part.start)
        mask[part, : cache.longest] = torch.nn.functional.pad(seen, (cache.longest - seen.shape[1], 0))
        del made, read  # before the next part, whose cache needs the room
    return cache, mask, torch.cat(chosen)


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """No gradients, the precision of the training, and an attention that takes any shape as it is.

    Flex attention, Unsloth's choice for Gemma 3 on newer GPUs, is compiled for shapes, which change from one batch of prompts to the next.
    """
    import torch

    found = model.config._attn_implementation
    try:
        if found == "flex_attention":
            model.config._attn_implementation = any_shape(model)
        with torch.inference_mode(), autocast(model):
            yield
    finally:
        model.config._attn_implementation = found


def any_shape(model: Any) -> str:
    """The attention in place of flex attention. To be set in this way: transformers' setter refuses Unsloth's compiled classes."""
    return "sdpa" if model._supports_sdpa else "eager"


def autocast(model: Any) -> Any:
    """The mixed precision of the model's training, which Unsloth's own `generate` uses too; none for a model in float32.

    In the mode that keeps Gemma 3's residuals in float32, on GPUs without bfloat16, Unsloth's norms give float16 whatever the weights are.
    """
    import torch

    forced = getattr(model, "_unsloth_forced_float32", False)
    kind = torch.float16 if forced else model.get_input_embeddings().weight.dtype
    return torch.autocast(model.device.type, kind, enabled=kind != torch.float32)


def read_at_once(model: Any) -> int:
    return GPU_READ if model.device.type == "cuda" else READ


def position_ids(mask: Any) -> Any:
    """Position ids of left-padded rows."""
    return (mask.cumsum(-1) - 1).clamp(min=0)


def ends(settings: Any, renderer: Renderer) -> list[int]:
    """Where a reply ends: at the format's terminator, the tokenizer's end of text, or what the model's generation settings name beside them."""
    return sorted({*renderer.stop_ids, *named_ends(settings)})


def named_ends(settings: Any) -> list[int]:
    """The ends of a reply that generation settings name: none, one or several."""
    own = settings.eos_token_id
    return own if isinstance(own, list) else [own] if own is not None else []


def until_stop(ids: list[int], stop: Sequence[int]) -> Reply:
    """The reply up to its first terminator."""
    end = next((i for i, token in enumerate(ids) if token in stop), None)
    return Reply(ids if end is None else ids[:end], end is not None)


def likelihoods(model: Any, exams: Sequence[Exam], pad: int) -> list[float]:
    """The negative log-likelihood in nats of each reference reply given its prompt, summed over the reply's tokens."""
    return [-sum(row) for row in token_log_probs(model, exams, pad)]


def token_log_probs(model: Any, exams: Sequence[Exam], pad: int) -> list[list[float]]:
    """The log-probability in nats of each token of each reference reply, computed in float32 from the logits."""
    out: list[list[float]] = [[] for _ in exams]
    order = sorted(range(len(exams)), key=lambda i: -len(exams[i].prompt_ids) - len(exams[i].reference_ids))
    whole = [len(exams[i].prompt_ids) + len(exams[i].reference_ids) for i in order]
    scored = [len(exams[i].reference_ids) + 1 for i in order]
    logits = LOGITS // model.config.get_text_config().vocab_size
    start = 0
    while start < len(order):
        rows = order[start : start + min(take(whole[start:], read_at_once(model)), take(scored[start:], logits))]
        for i, found in zip(rows, _log_probs(model, [exams[i] for i in rows], pad), strict=True):
            out[i] = found
        start += len(rows)
    return out


def _log_probs(model: Any, exams: Sequence[Exam], pad: int) -> list[list[float]]:
    import torch

    ids, mask = padded([[*e.prompt_ids, *e.reference_ids] for e in exams], pad, model.device)
    longest = max(len(e.reference_ids) for e in exams)
    out = []
    with measuring(model):
        # Left padding puts every reply at the end: only its logits are computed.
        logits = model(input_ids=ids, attention_mask=mask, position_ids=position_ids(mask), use_cache=False, logits_to_keep=longest + 1).logits
        for row, exam in enumerate(exams):
            target = torch.tensor(exam.reference_ids, device=logits.device)
            out.append((-torch.nn.functional.cross_entropy(logits[row, -len(target) - 1 : -1].float(), target, reduction="none")).tolist())
    return out
