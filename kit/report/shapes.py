"""What the report needs to find in the runs' files: whatever else is there, a damaged file is told by name and never stops the report."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType
from typing import Any

from kit.config import fields
from kit.errors import UserError
from kit.metrics import METRICS


class Maybe:
    """A shape, or null, or not there."""

    def __init__(self, shape: Any) -> None:
        self.shape = shape


NUMBER = (int, float)
OPTIONAL = (int, float, NoneType)
CONFIG = {f.name: Maybe([str] if f.repeat else NUMBER if f.kind in NUMBER else f.kind) for f in fields().values()}
SCORE = {"value": OPTIONAL, "low": Maybe(NUMBER), "high": Maybe(NUMBER), "n": Maybe(NUMBER), "signature": Maybe(str)}
SCORES = {m: Maybe(SCORE) for m in METRICS}
PROVENANCE = {"data": Maybe(str), "gpu": Maybe(str), "cpu": Maybe(str), "git": Maybe(str), "versions": Maybe({...: (str, NoneType)})}
GATES = {...: {"passed": (bool, NoneType), "detail": str}}
PART = {"method": str, "rank": NUMBER, "steps": NUMBER, "train_wall_s": OPTIONAL, "valid_perplexity": OPTIONAL}
KNOWN = {"provenance": Maybe(PROVENANCE), "precision": Maybe({"name": str, "reason": str}), "gates": Maybe(GATES)}
EVALUATION = KNOWN | {
    "all": SCORES,
    "per_source": {...: SCORES},
    "generation": Maybe({"empty": NUMBER, "unfinished": NUMBER, "mean_reply_tokens": NUMBER, "wall_s": Maybe(NUMBER), "peak_memory_gib": Maybe(NUMBER)}),
    "leaks": Maybe({"flagged": NUMBER, "ids": Maybe([str]), "without": Maybe(SCORES)}),
    "forgetting": Maybe({"text": str, "sha256": str, "tokens": NUMBER, "perplexity": SCORE, "kl": Maybe(SCORE), "overlap": Maybe(NUMBER)}),
    "predictions_sha256": Maybe(str),
    "score_tokens": Maybe(str),
}
TRAINING = KNOWN | {
    "status": str,
    "reason": Maybe(str),
    **{k: Maybe(NUMBER) for k in ("train_wall_s", "peak_memory_gib", "tokens_per_s", "trainable_params", "adapter_mib", "tokens_supervised", "rows_left_out")},
    "phases": Maybe({...: {"wall_s": NUMBER}}),
    "energy": Maybe({"wh": NUMBER, "cost": OPTIONAL, "price_per_kwh": OPTIONAL}),
    "optimizer_state_mib": Maybe(NUMBER),
    "tokens_total": Maybe(NUMBER),
    "parts": Maybe([PART]),
    "tried": Maybe([{"kind": str, "weights": {...: NUMBER}, "valid_perplexity": OPTIONAL}]),
}
SAMPLES = {"samples": [{"prompt": str, "prediction": str}]}
TASKS = {"tasks": {...: {...: {"value": OPTIONAL, "stderr": Maybe(NUMBER)}}}, "limit": Maybe(NUMBER)}
SOURCE = {"origin": str, "revision": Maybe(str), "dropped": {...: NUMBER}, **dict.fromkeys(("rows_in", "kept", "train", "test"), NUMBER)}
MANIFEST = {
    "sources": {...: SOURCE},
    "duplicates": {"exact": NUMBER, "near": NUMBER, "groups": NUMBER, "similarity": NUMBER},
    "leaks": {k: {"test_rows": NUMBER} for k in ("same_prompt", "same_opening")},
    "truncated": {...: {...: NUMBER}},
    "inputs": {"max_length": NUMBER},
    "files": Maybe({...: {"sha256": str}}),
}
SWEEP = {"method": str, "budget": {"rows": NUMBER}, "curve": [{"learning_rate": NUMBER, "valid_perplexity": OPTIONAL}], "best": NUMBER}
STATS = {"max_length": NUMBER, "splits": {...: {"tokens_by_source": {...: {f"p{q}": NUMBER for q in (5, 25, 50, 75, 95)}}}}}


def check(value: Any, shape: Any, name: str) -> None:
    """Raises UserError that names the first place where a value is not of the shape.

    A shape is a type (or several), [shape of each item], {key: shape}, {...: shape of every value} or Maybe(shape). More keys are no fault.
    """
    if isinstance(shape, Maybe):
        if value is not None:
            check(value, shape.shape, name)
    elif isinstance(shape, Mapping):
        if not isinstance(value, Mapping):
            raise UserError(f"{name} is not an object")
        for key in value if ... in shape else shape:
            check(value.get(key), shape.get(key, shape.get(...)), f"{name}, {key}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise UserError(f"{name} is not a list")
        for i, item in enumerate(value):
            check(item, shape[0], f"{name}, item {i}")
    elif not isinstance(value, shape) or (isinstance(value, bool) and shape in (NUMBER, OPTIONAL)):
        raise UserError(f"{name} is {'missing' if value is None else repr(value)[:40]}")
