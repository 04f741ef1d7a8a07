"""runs/NAME/ratings/RATER.jsonl, one rater's scores: a line for every reply rated, skipped (no scores) or undone. No line is ever rewritten, and a
kill harms none.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

from kit.errors import UserError
from kit.files import lock
from kit.rating.deck import Item, digest, items

Row = dict[str, Any]
QUESTIONS = {
    "fluency": "is it grammatical, and does it read naturally?",
    "coherence": "does it hang together and keep to the subject?",
    "correctness": "does it do what the prompt asks, and is what it says right?",
    "overall": "how good is the reply, all in all?",
}
CRITERIA, OVERALL = tuple(QUESTIONS)[:3], tuple(QUESTIONS)[3:]
SCALE = "012345"


@dataclass(frozen=True)
class Rating:
    """One rater's scores of one reply. `item` is the reply's first showing; without `runs` the reply is no run's any more: stale."""

    rater: str
    item: str
    row: str
    runs: tuple[str, ...]
    scores: Mapping[str, int]
    repeat: bool


def standing(path: Path) -> dict[str, Row]:
    """The ledger's rows that no later line replaced or undid, by item id, oldest first; a last line without its end is not there."""
    kept: dict[str, Row] = {}
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            row = json.loads(line)
            before = kept.pop(row["undo"] if "undo" in row else row["item"], None)
            if "undo" in row and before is None:
                raise ValueError("it undoes what is not there")
            if "undo" not in row:
                if not all(c in QUESTIONS and v in range(len(SCALE)) for c, v in row["scores"].items()):
                    raise ValueError("a score is not one of 0 to 5")
                kept[row["item"]] = {k: row[k] for k in ("item", "id", "scores", "repeat")}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: not a rating ({error}); remove the line") from None
    return kept


@dataclass
class Ledger:
    """A rater's ledger, open for appending; `standing` is the function's of this name, kept up to date."""

    rater: str
    criteria: Sequence[str]
    standing: dict[str, Row]
    file: BinaryIO

    def _write(self, row: Row) -> None:
        self.file.write(json.dumps(row | {"time": datetime.now(UTC).isoformat(timespec="seconds")}).encode() + b"\n")
        self.file.flush()
        os.fsync(self.file.fileno())

    def add(self, item: Item, scores: Mapping[str, int]) -> None:
        row = {"item": item.id, "id": item.row, "runs": item.runs, "reply": digest(item.reply), "scores": scores, "repeat": item.repeats is not None}
        self._write(row)
        self.standing.pop(item.id, None)
        self.standing[item.id] = row

    def undo(self, item: Item) -> None:
        self._write({"undo": item.id})
        del self.standing[item.id]


@contextmanager
def open_ledger(folder: Path, rater: str, criteria: Sequence[str]) -> Iterator[Ledger]:
    """The rater's ledger in runs/NAME/ratings, without the line that a kill cut off; one holder at a time, one set of criteria for good."""
    if not re.fullmatch(r"[\w-]{1,60}", rater):
        raise UserError(f"{rater!r} cannot name a rater: use letters, digits, '-' and '_'")
    path = folder / "ratings" / f"{rater}.jsonl"
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as file:
        try:
            lock(file)
        except BlockingIOError:
            raise UserError(f"{rater} is rating in another terminal") from None
        rows = standing(path)
        if used := {c for row in rows.values() for c in row["scores"]} - set(criteria):
            raise UserError(f"{path} holds scores for {', '.join(sorted(used))}, not for {', '.join(criteria)}; choose another --rater")
        file.truncate(path.read_bytes().rfind(b"\n") + 1)
        yield Ledger(rater, criteria, rows, file)


def read_ratings(folder: Path) -> list[Rating]:
    """All raters' ratings in runs/NAME/ratings, each given to every run whose reply it is now."""
    paths = sorted((folder / "ratings").glob("*.jsonl"))
    known = items(folder) if paths else {}
    out = []
    for path in paths:
        for row in standing(path).values():
            item = known.get(row["item"])
            if row["scores"]:
                first = item.repeats or item.id if item else row["item"]
                out.append(Rating(path.stem, first, row["id"], item.runs if item else (), row["scores"], row["repeat"]))
    return out
