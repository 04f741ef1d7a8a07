"""SOURCES: where instruction data comes from, and the rows of a file or of a dataset on the hub as conversations. A new hub dataset is one entry here."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass
from pathlib import Path

from kit.conversations import SHAPES, Dropped, WrongShape, shape_of
from kit.errors import UserError, unknown
from kit.files import sha256
from kit.readers import READERS, Record, plain, records, suffix

BUILTIN = Path(__file__).parent / "assets" / "data"
HUB = re.compile(r"[\w.-]+/[\w.-]+(:[^:/[]+){0,2}")  # a dataset's name on the hub, and which part of it


@dataclass(frozen=True)
class Source:
    """A known data set: its home on the hub, the split that is drawn from, its built-in sample, and its shape."""

    hub: str
    split: str
    sample: str
    shape: str


SOURCES: dict[str, Source] = {
    "alpaca": Source("tatsu-lab/alpaca", "train", "alpaca_sample.json", "instruction"),
    "tulu": Source("allenai/tulu-v2-sft-mixture", "train", "tulu_sample.jsonl", "turns"),
    "ultrachat": Source("HuggingFaceH4/ultrachat_200k", "train_sft", "ultrachat_sample.jsonl", "turns"),
}


class Stream:
    """One source read row by row, as often as needed: `rows()` counts, `rows(wanted)` gives only the numbers that are wanted.

    After a counting pass rows_in = conversations + sum(dropped). A hub's dataset is OWNER/DATASET, OWNER/DATASET:SPLIT or OWNER/DATASET:SUBSET:SPLIT.
    """

    def __init__(self, spec: str) -> None:
        self.name, _, origin = spec.partition("=")
        known = SOURCES.get(self.name)
        if known is None and not origin:
            said = unknown("source", self.name, SOURCES)
            raise UserError(said if said.endswith("?") else f"{said}; a source of your own is NAME=FILE or NAME=OWNER/DATASET")
        where = origin or (known.hub if known else "")
        self.path = _local(self.name, where)
        self.origin, *part = [where] if self.path else where.split(":")
        its_own = known if known and origin in ("", "builtin", known.hub) else None
        usual = [its_own.split if its_own else "train"]
        self.part = part or usual  # [split], or [subset, split]
        self.asked = self.origin if self.part == usual else ":".join([self.origin, *self.part])
        self.shape, self.told_by = (its_own.shape if its_own else None), ""  # else the first row tells
        self._told: set[str] = set()  # of how the file was read
        self.revision: str | None = None
        self.rows_in = 0
        self.dropped: Counter[str] = Counter()
        self.repaired: Counter[str] = Counter()

    def fingerprint(self) -> str:
        """What identifies the content: the file's SHA-256, or the dataset's name on the hub."""
        return f"{self.name}={self.asked}" if self.path is None else f"{self.name}=sha256:{sha256(self.path)}"

    def _records(self, wanted: Container[int] | None) -> Iterator[tuple[int, Record | None]]:
        if self.path is not None:
            return records(self.path, wanted, self._told)
        from kit.hub import commit_of, dataset_rows

        self.revision = self.revision or commit_of(self.origin)
        return enumerate(dataset_rows(self.origin, self.part, self.revision), 1)

    def rows(self, wanted: Container[int] | None = None) -> Iterator[tuple[int, Record]]:
        """(row number, conversation) of every usable row, or of the wanted rows."""
        counting = wanted is None
        for number, record in self._records(wanted):
            self.rows_in += counting
            if record is None or (wanted is not None and number not in wanted):
                continue
            names = {plain(column): value for column, value in record.items()}
            record = names if len(names) == len(record) else record  # where two would be one they are left as they are
            try:
                if self.shape is None:
                    self.shape, by = shape_of(record)
                    self.told_by = "; ".join([by, *sorted(self._told)])
                repaired: Counter[str] = Counter()
                row = SHAPES[self.shape](record, repaired)
            except Dropped as reason:
                if counting:
                    self.dropped[str(reason)] += 1
                continue
            except WrongShape as found:
                raise UserError(f"source {self.name}: {self.path or self.origin}, row {number}: expected {found}") from None
            if counting:
                self.repaired += repaired
            yield number, row


def _local(name: str, origin: str) -> Path | None:
    """The file that an origin means, or None for a hub dataset; a path that is not there is a UserError."""
    if origin == "builtin" and name in SOURCES:
        return BUILTIN / SOURCES[name].sample
    path = Path(origin).expanduser()
    if path.is_dir():
        raise UserError(f"source {name}: {path} is a directory; give one file ({', '.join(READERS)}, each also with .gz)")
    if path.is_file():
        return path
    if suffix(path) in READERS or origin.startswith(("/", ".", "~")) or not HUB.fullmatch(origin):
        meant_a_file = path.is_absolute() or suffix(path) in READERS
        hub = "; a dataset of the hub is OWNER/DATASET, OWNER/DATASET:SPLIT or OWNER/DATASET:SUBSET:SPLIT"
        raise UserError(f"source {name}: no such file: {origin}{'' if meant_a_file else hub}")
    return None
