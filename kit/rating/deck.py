"""The blind deck: every distinct reply of the runs of an experiment, shuffled, with hidden repeats."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from kit.errors import UserError
from kit.files import read_jsonl

REPEATED = 0.1  # share of the replies that are shown a second time


@dataclass(frozen=True)
class Item:
    """A distinct reply to a test row and the runs that gave it; `repeats` is the id of its first showing when this is the second."""

    id: str
    row: str
    prompt: str
    reply: str
    reference: str
    runs: tuple[str, ...]
    repeats: str | None


def digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def items(folder: Path) -> dict[str, Item]:
    """Every distinct reply of the evaluated runs in runs/NAME, and its repeat, by item id. Ids hang on row, prompt and reply alone."""
    runs: dict[tuple[str, str, str], list[str]] = {}
    references: dict[tuple[str, str, str], str] = {}
    for path in sorted(folder.glob("*/predictions.jsonl")):
        for number, row in enumerate(read_jsonl(path) if path.with_name("eval.json").exists() else (), 1):
            if missing := [k for k in ("id", "prompt", "prediction", "reference") if not isinstance(row.get(k), str)]:
                raise UserError(f"{path}, row {number}: it has no {', '.join(missing)}; restore the file, or remove it and evaluate anew")
            key = (row["id"], row["prompt"], row["prediction"])
            runs.setdefault(key, []).append(path.parent.name)
            references[key] = row["reference"]
    out = {}
    for key, names in runs.items():
        first = digest(*key)
        for name, repeats in ((first, None), (digest(*key, "again"), first)):
            out[name] = Item(name, *key, references[key], tuple(names), repeats)
    return out


def evaluated(folder: Path) -> dict[str, Item]:
    """`items`, of which there must be some."""
    if not (known := items(folder)):
        raise UserError(f"no evaluated run in {folder}; make some with: make all METHOD=qlora NAME={folder.name}")
    return known


def deck(known: Mapping[str, Item], rater: str, *, limit: int, seed: int) -> list[Item]:
    """About `limit` replies in the rater's own order, and later in it the hidden repeats of a tenth of them.

    All raters get the same test rows, each with the replies of every run, so that runs are compared on equal rows. Orders are those of hashes, so
    that a larger limit adds rows to those drawn before. At least one row is drawn.
    """
    rows: dict[tuple[str, str], list[Item]] = {}
    for item in known.values():
        if item.repeats is None:
            rows.setdefault((item.row, item.prompt), []).append(item)
    systems = {run for item in known.values() for run in item.runs}
    whole = [replies for replies in rows.values() if {run for item in replies for run in item.runs} == systems]
    if not whole:
        raise UserError(f"{', '.join(sorted(systems))} share no test row; evaluate them on the same data")
    drawn: list[Item] = []
    for replies in sorted(whole, key=lambda r: digest(seed, r[0].row)):
        if drawn and len(drawn) + len(replies) > limit:
            break
        drawn += replies
    order = sorted(drawn, key=lambda i: digest(seed, rater, i.id))
    half = len(order) // 2
    again = {i.repeats: i for i in known.values() if i.repeats}
    repeats = sorted(range(half), key=lambda n: digest(seed, rater, order[n].id, "again"))[: round(len(order) * REPEATED)]
    placed = [*enumerate(order), *((n + half + 0.5, again[order[n].id]) for n in repeats)]
    return [item for _, item in sorted(placed, key=lambda pair: pair[0])]
