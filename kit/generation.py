"""Prompts -> greedy replies, and reference replies -> their likelihood: batched, left-padded, longest first."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from kit.prompts import Exam

# Logits held at once: 2^28 numbers are 1 GiB in float32, about 1,000 tokens of Gemma's 262,144-word vocabulary.
LOGITS = 2**28
# Ended rows leave the batch once this share of it is left: copying the cache costs more than a few idle rows.
LEAVE = 0.75


class Reply(NamedTuple):
    """A generated reply: its token ids without the terminator, and whether it ended by itself."""

    ids: list[int]
    finished: bool


def longest_first(exams: Sequence[Exam]) -> list[int]:
    """Indices by falling length of prompt and reference, so that memory runs out at the first batch or never."""
    return sorted(range(len(exams)), key=lambda i: -(len(exams[i].prompt_ids) + len(exams[i].reference_ids)))


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
    from transformers import DynamicCache

    ids, mask = padded(prompts, pad, model.device)
    stops = torch.tensor(list(stop), device=ids.device)
    rows, alive = list(range(len(prompts))), torch.ones(len(prompts), dtype=torch.bool, device=ids.device)
    replies: list[list[int]] = [[] for _ in prompts]
    cache, positions = DynamicCache(config=model.config.get_text_config()), (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.inference_mode():
        for step in range(max_new_tokens):
            made = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
            chosen = made.logits[:, -1].argmax(-1)
            for row, token, live in zip(rows, chosen.tolist(), alive.tolist(), strict=True):
                if live:
                    replies[row].append(token)
            alive &= ~torch.isin(chosen, stops)
            left = int(alive.sum())
            if left == 0 or step + 1 == max_new_tokens:
                break
            ids, mask, positions = chosen[:, None], torch.nn.functional.pad(mask, (0, 1), value=1), positions[:, -1:] + 1
            if left <= LEAVE * len(rows):
                keep = alive.nonzero().squeeze(-1)
                cache.batch_select_indices(keep)
                ids, mask, positions, alive = ids[keep], mask[keep], positions[keep], alive[keep]
                rows = [rows[i] for i in keep.tolist()]
    return [_reply(reply, set(stop)) for reply in replies]


def _reply(ids: list[int], stop: set[int]) -> Reply:
    end = next((i for i, token in enumerate(ids) if token in stop), None)
    return Reply(ids if end is None else ids[:end], end is not None)


def likelihoods(model: Any, exams: Sequence[Exam], pad: int) -> list[float]:
    """The negative log-likelihood in nats of each reference reply given its prompt, summed over the reply's tokens."""
    return [-sum(row) for row in token_log_probs(model, exams, pad)]


def token_log_probs(model: Any, exams: Sequence[Exam], pad: int) -> list[list[float]]:
    """The log-probability in nats of each token of each reference reply, computed in float32 from the logits."""
    out: list[list[float]] = []
    vocabulary = model.config.get_text_config().vocab_size
    start = 0
    while start < len(exams):
        # As many rows as keep the logits [rows, longest reply + 1, vocabulary] within LOGITS numbers; at least one.
        end = start + 1
        while end < len(exams) and (end + 1 - start) * (1 + max(len(e.reference_ids) for e in exams[start : end + 1])) * vocabulary <= LOGITS:
            end += 1
        out += _log_probs(model, exams[start:end], pad)
        start = end
    return out


def _log_probs(model: Any, exams: Sequence[Exam], pad: int) -> list[list[float]]:
    import torch

    ids, mask = padded([[*e.prompt_ids, *e.reference_ids] for e in exams], pad, model.device)
    longest = max(len(e.reference_ids) for e in exams)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    out = []
    with torch.inference_mode():
        # Left padding puts every reply at the end: only its logits are computed.
        logits = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=longest + 1).logits
        for row, exam in enumerate(exams):
            target = torch.tensor(exam.reference_ids, device=logits.device)
            out.append((-torch.nn.functional.cross_entropy(logits[row, -len(target) - 1 : -1].float(), target, reduction="none")).tolist())
    return out


def batches(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(order), size):
        yield order[start : start + size]
