"""Local data files -> records: JSON, JSONL, Parquet and CSV, each also gzip'd. Every failure names the file and the place in it."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import IO, Any, cast

from kit.errors import UserError, first_line

Record = dict[str, Any]
# The names that the field's datasets give to a list of turns, and to a turn's role.
TURNS = ("messages", "conversations", "conversation", "utterances", "turns")
ROLE = ("role", "from", "speaker")
# Between the columns of a CSV file: Excel writes semicolons where the comma stands in numbers.
DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
# A row and its number from 1; the record is None where only other rows were wanted and it could be skipped unread.
Numbered = Iterator[tuple[int, Record | None]]


def suffix(path: Path) -> str:
    """The format's suffix in small letters, `.gz` left out: data.JSONL.gz -> .jsonl"""
    return (Path(path.stem).suffix if path.suffix == ".gz" else path.suffix).lower()


def records(path: Path, wanted: Container[int] | None = None, told: set[str] | None = None) -> Numbered:
    """The rows of a file in order; with `wanted`, rows of other numbers may come as None, which costs JSONL no parsing.

    What was found out about the file, for the user to be told, goes into `told` before the first row.
    """
    reader = READERS.get(suffix(path))
    if reader is None:
        raise UserError(f"{path}: unknown format; known: {', '.join(READERS)}, each also with .gz")
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
            yield from reader(cast(IO[bytes], file), path, wanted, set() if told is None else told)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise UserError(f"{path}: damaged or cut off gzip file ({error})") from None


def _object(text: bytes, path: Path, line: int) -> Record:
    try:
        row = json.loads(text)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line {line}, byte {error.start + 1}: not valid UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}, line {line}: not valid JSON ({error})") from None
    if not isinstance(row, dict):
        raise UserError(f"{path}, line {line}: expected a JSON object, found {type(row).__name__}")
    return row


def _jsonl(file: IO[bytes], path: Path, wanted: Container[int] | None, _told: set[str]) -> Numbered:
    number = 0
    # Bytes split on "\n" alone: text modes would also split on U+2028 and its like.
    for line, text in enumerate(file, 1):
        if text.strip():
            number += 1
            yield number, _object(text, path, line) if wanted is None or number in wanted else None


def _json(file: IO[bytes], path: Path, _wanted: Container[int] | None, told: set[str]) -> Numbered:
    text = file.read()
    try:
        rows = json.loads(text)
    except UnicodeDecodeError as error:
        line, start = text.count(b"\n", 0, error.start) + 1, text.rfind(b"\n", 0, error.start)
        raise UserError(f"{path}, line {line}, byte {error.start - start}: not valid UTF-8") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); one object a line goes into a .jsonl file") from None
    if isinstance(rows, dict) and (key := _wrapped(rows)):
        told.add(f"the list under {key}")
        rows = rows[key]
    if not are_objects(rows):
        raise UserError(f"{path}: expected a JSON list of objects, found {type(rows).__name__}")
    yield from enumerate(rows, 1)


# What the list is usually called.
WRAPPERS = {"data", "rows", "examples", "instances", "items", "records", "train"}


def _wrapped(whole: Record) -> str | None:
    """The key of the one list of objects that a JSON object holds beside what describes it; what a single row holds beside its turns is none."""
    if not WRAPPERS & whole.keys():
        return None
    lists = [key for key, value in whole.items() if value and are_objects(value) and not are_turns(value)]
    return lists[0] if len(lists) == 1 else None


def are_objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(row, dict) for row in value)


def _csv(file: IO[bytes], path: Path, _wanted: Container[int] | None, told: set[str]) -> Numbered:
    csv.field_size_limit(2**31 - 1)
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    number = 0
    try:
        lines, delimiter = _first_lines(text)
        if delimiter != ",":
            told.add(f"columns separated by {DELIMITERS[delimiter]}")
        reader = csv.DictReader(itertools.chain(lines, text), strict=True, delimiter=delimiter)
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                raise UserError(f"{path}, line {reader.line_num}: expected {len(reader.fieldnames or [])} columns")
            yield number, {k: _cell(plain(k), v) for k, v in row.items()}
    except UnicodeDecodeError as error:
        own = "utf-16" if error.object.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "cp1252"
        raise UserError(
            f"{path}, after row {number}, byte {error.start + 1} of the block: not valid UTF-8; save it as CSV in UTF-8, or: "
            f"iconv -f {own} -t utf-8 OLD.csv > NEW.csv"
        ) from None
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.reader.line_num}: not valid CSV ({error})") from None  # DictReader's own is that of the row before
    finally:
        text.detach()  # the caller closes the file


def _first_lines(text: io.TextIOWrapper) -> tuple[list[str], str]:
    """The lines of the header, whose names may be quoted over several, with the line after them; and what separates the columns: of the header's
    characters outside quotes the one there is most of, but the comma unless the next line has as many columns of another.
    """
    header = text.readline()
    while header.count('"') % 2 and (more := text.readline()):
        header += more
    after = text.readline()
    found = max(DELIMITERS, key=re.sub('"[^"]*"', "", header).count)
    columns = [len(next(csv.reader(lines.splitlines(keepends=True), delimiter=found), [])) for lines in (header, after)]
    fits = columns[0] == columns[1] or after.count('"') % 2 == 1  # a cell that goes on in the next line cannot be counted
    return [*header.splitlines(keepends=True), after], found if fits else ","


def plain(column: str) -> str:
    """A column's name as it is looked for: spreadsheets, and some datasets of the hub, have `Question`."""
    return column.strip().lower()


def _cell(column: str, text: str) -> Any:
    """A cell of turns holds them as JSON, also where they are a question or an answer; what is no list of turns stays text."""
    if column not in TURNS and not text.startswith("[{"):
        return text
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if column in TURNS or are_turns(found) else text


def are_turns(value: Any) -> bool:
    """Whether this is a list of turns, each with a role."""
    return isinstance(value, list) and bool(value) and all(isinstance(t, dict) and any(k in t for k in ROLE) for t in value)


def _parquet(file: IO[bytes], path: Path, _wanted: Container[int] | None, _told: set[str]) -> Numbered:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1000):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: damaged or cut off Parquet file after row {number} ({first_line(error)})") from None


READERS: dict[str, Callable[[IO[bytes], Path, Container[int] | None, set[str]], Numbered]] = {
    ".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet,
}  # fmt: skip
