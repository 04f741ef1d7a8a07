"""What a report consists of, free of any format: `kit.report.content` makes the blocks, Markdown, HTML and Typst render the same ones.

All strings are plain text: a renderer escapes them, whatever they hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from kit.console import printable

BEST = "★ shown to be better than all that it can fairly be compared with, the base model included"


@dataclass(frozen=True)
class Heading:
    text: str
    level: int = 2


@dataclass(frozen=True)
class Paragraph:
    """`kind`: plain, headline (the answer in a sentence) or note (what a reader must know before comparing)."""

    text: str
    kind: str = "plain"


@dataclass(frozen=True)
class Bullets:
    """`small`: in smaller type, to be looked up and not read through."""

    items: Sequence[str]
    small: bool = False


@dataclass(frozen=True)
class Cell:
    """A table cell; `value` is what it sorts by (None goes last), `best` says that the verdicts support marking it."""

    text: str
    value: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """The first `texts` columns are text, the others numbers. `wide` tables have more columns than a portrait page holds."""

    heads: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    caption: str = ""
    texts: int = 1
    wide: bool = False


@dataclass(frozen=True)
class Figure:
    """figures/NAME.png and figures/NAME.svg; `caption` says in words what is to be seen."""

    name: str
    caption: str


@dataclass(frozen=True)
class Sample:
    """One prompt with every run's reply, as (run, reply) pairs; `reference` is None for a fixed prompt."""

    title: str
    prompt: str
    reference: str | None
    replies: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class Samples:
    """Shown side by side, with a chooser where the format has one."""

    samples: Sequence[Sample]


@dataclass(frozen=True)
class Code:
    text: str


Block = Heading | Paragraph | Bullets | Table | Figure | Samples | Code


def plain(value: Any) -> Any:
    """A block as dictionaries and lists for a template; `block` names its kind. Control characters and the like are spelled out in every text; a number
    that JSON does not know is None."""
    if isinstance(value, str):
        return printable(value)
    if is_dataclass(value):
        return {"block": type(value).__name__.lower(), **{f.name: plain(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value
