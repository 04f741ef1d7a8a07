"""Did it train? Checks before and after every run; a failed one keeps the run off the ranking, with its reason."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from kit.errors import UserError
from kit.files import read_json, write_json
from kit.generation import token_log_probs
from kit.prompts import IGNORE, Exam, Example, Renderer

# Largest mean difference in nats a token between two ways of computing the same log-probability; 2^-8 and 2^-11 are the 16-bit types' rounding.
BOUNDS = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.08}
LOOKED_AT, PROBED, COMPARED, SHORTEST = 256, 4, 32, 16
# Optimiser steps that may be skipped for gradients that are not finite: a share of all, or a few.
SKIPPED, FEW = 0.1, 3


class Gate(NamedTuple):
    """passed is None where the run is too short to judge."""

    passed: bool | None
    detail: str


def record(checks: Mapping[str, Gate]) -> dict[str, dict[str, Any]]:
    return {name: gate._asdict() for name, gate in checks.items()}


def failed(checks: Mapping[str, Any]) -> list[str]:
    """`name: detail` of each recorded gate that did not pass."""
    return [f"{name.replace('_', ' ')}: {gate['detail']}" for name, gate in checks.items() if gate["passed"] is False]


def supervision(renderer: Renderer, rows: Sequence[dict[str, Any]], examples: Sequence[Example]) -> dict[str, Gate]:
    """Decodes what carries a loss: it must be the assistant's words and the terminator after them, and nothing else."""
    seen = list(zip(rows, examples, strict=True))[:LOOKED_AT]
    wrong = [row["id"] for row, example in seen if not _is_assistants(renderer, row, example)]
    cut = sum("reply_cut" in e.fit for _, e in seen)
    ended = sum(bool(s := spans(e)) and all(span[-1] == renderer.terminator for span in s) for _, e in seen)
    detail = f"{len(seen) - len(wrong)} of {len(seen)} decoded rows" + (f"; not: {', '.join(wrong[:3])}" if wrong else "")
    return {
        "supervised_text": Gate(not wrong, f"only assistant text and terminators carry a loss in {detail}"),
        "terminator": Gate(ended > 0 and ended >= len(seen) - cut, f"every reply's terminator carries a loss in {ended} of {len(seen)} rows ({cut} cut)"),
    }


def spans(example: Example) -> list[list[int]]:
    """The runs of supervised tokens."""
    return [list(run) for supervised, run in groupby(example.labels, lambda label: label != IGNORE) if supervised]


def _is_assistants(renderer: Renderer, row: dict[str, Any], example: Example) -> bool:
    replies = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
    decode = renderer.tokenizer.decode
    found = ["".join(decode(span).split()) for span in spans(example)]
    wanted = ["".join((text + decode([renderer.terminator])).split()) for text in replies[: len(found)]]
    if found and "reply_cut" in example.fit:  # the last may end early, in the middle of a character too
        found[-1], wanted[-1] = "", ""
    return bool(found) and found == wanted


class Before(NamedTuple):
    """The model before training: sum and norm of each trainable tensor, enough to tell that it changed, and the loss of some training rows."""

    sums: dict[str, tuple[float, float]]
    loss: float


def before(model: Any, examples: Sequence[Example], pad: int) -> Before:
    return Before(fingerprint(model), loss(model, examples, pad))


def fingerprint(model: Any) -> dict[str, tuple[float, float]]:
    """Sum and norm of each trainable tensor, added up in float64 without a copy of it."""
    import torch

    wide = {"dtype": torch.float64}
    return {
        n: (float(p.detach().sum(**wide)), float(torch.linalg.vector_norm(p.detach(), **wide)))
        for n, p in model.named_parameters() if p.requires_grad
    }  # fmt: skip


def loss(model: Any, examples: Sequence[Example], pad: int) -> float:
    """Mean loss in nats of the last reply's tokens over the first rows: the same rows each time, so that the rows' own difficulty cancels."""
    was_training = model.training
    model.eval()
    values = [v for row in probe(model, _rows(examples[:COMPARED]), pad) for v in row]
    model.train(was_training)
    return -sum(values) / len(values)


def training(model: Any, *, start: Before, end: float, fed: Mapping[str, bool], log: Sequence[Mapping[str, Any]], peak_rate: float) -> dict[str, Gate]:
    """Gradients arrived, weights moved and stayed finite, the learning rate was what was asked for, and the loss of the same rows fell."""
    after = fingerprint(model)
    moved = [n for n, now in after.items() if now != start.sums[n]]
    finite = all(math.isfinite(x) for pair in after.values() for x in pair)
    starved = [n for n, got in fed.items() if not got]
    rates = [r["learning_rate"] for r in log]
    skipped = sum(r["grad_norm"] is None for r in log)

    def judged(passed: bool) -> bool | None:
        """Under a warm-up the first step changes nothing, and an adapter's A has a gradient only once B has moved: in the third."""
        return passed or (None if len(log) < 3 else False)

    return {
        "gradients": Gate(judged(not starved) if fed else None, f"{len(fed) - len(starved)} of {len(fed)} trainable tensors had a gradient"
                          + (f"; not: {', '.join(starved[:3])}" if starved else "")),
        # A run that changed nothing was none, however short.
        "moved": Gate(judged(len(moved) == len(after)) if moved else False, f"{len(moved)} of {len(after)} trainable tensors changed"),
        "learning_rate": Gate(0.5 * peak_rate <= max(rates) <= 1.001 * peak_rate if len(log) >= SHORTEST else None,
                              f"peak {max(rates, default=0):.2e} of {peak_rate:.2e} asked for"
                              + (f"; judged from {SHORTEST} steps on" if len(log) < SHORTEST else "")),
        "loss_fell": Gate(judged(end < start.loss), f"the same training rows ({COMPARED} or all): {start.loss:.3f} -> {end:.3f} nats a token"),
        # A loss scaler that finds its scale skips a few steps; more are a training that did not happen.
        "finite": Gate(finite and skipped <= max(SKIPPED * len(log), FEW),
                       f"weights {'finite' if finite else 'hold NaN or Inf'}; {skipped} of {len(log)} gradient norms were not finite"),
    }  # fmt: skip


def probe(model: Any, rows: Sequence[tuple[list[int], list[int]]], pad: int) -> list[list[float]]:
    """Log-probabilities of the rows' last spans given what precedes them."""
    return token_log_probs(model, [Exam(prompt, reply, "whole") for prompt, reply in rows], pad)


def write_probe(model: Any, examples: Sequence[Example], pad: int, folder: Path) -> None:
    """What the trained model answers before it is saved, for the reloaded one to be held against."""
    from kit.model import import_unsloth

    import_unsloth().FastModel.for_inference(model)
    rows = _rows(examples[:PROBED])
    found = probe(model, rows, pad)
    if not all(math.isfinite(x) for row in found for x in row):
        raise UserError("training diverged: the trained model's probabilities are no numbers; lower --learning-rate or raise --warmup-ratio")
    write_json(folder / "probe.json", {"rows": rows, "log_probs": found})


def _rows(examples: Sequence[Example]) -> list[tuple[list[int], list[int]]]:
    """(what precedes the last reply, the last reply) of each example."""
    return [(e.input_ids[: -len(span)], span) for e in examples for span in spans(e)[-1:]]


def reloaded(model: Any, folder: Path, pad: int, precision: str) -> dict[str, Gate]:
    """The saved and reloaded model against the one that was trained, and one prompt at a time against a batch."""
    path = folder / "probe.json"
    if not path.exists():
        return {}
    stored = read_json(path, "rows", "log_probs")
    rows = [(prompt, reply) for prompt, reply in stored["rows"]]
    together = probe(model, rows, pad)
    single = [probe(model, [row], pad)[0] for row in rows]
    return {
        "reloaded": close(together, stored["log_probs"], precision, "saved and reloaded"),
        "batched": close(single, together, precision, "1 row and 4 rows"),
    }


def close(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]], precision: str, what: str) -> Gate:
    """Whether two ways of computing the same log-probabilities agree within the precision's bound."""
    differences = [abs(x - y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True)]
    mean, bound = sum(differences) / len(differences), BOUNDS[precision]
    return Gate(mean <= bound, f"{what} differ by {mean:.1e} nats a token on average, {max(differences):.1e} at most (bound {bound:g} in {precision})")
