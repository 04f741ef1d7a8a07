"""SOURCES: where instruction data comes from, and how each raw shape becomes a conversation. A new source is one entry here.

A conversation is a list of {"role": "user" | "assistant", "content": str} that starts with the user, alternates and ends with the
assistant. Rows that cannot become one are dropped under a named reason; repairs are counted too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from kit.errors import UserError, unknown
from kit.files import read_json, read_jsonl, sha256

BUILTIN = Path(__file__).parent / "assets" / "data"
ROLES = {
    "user": "user", "human": "user", "prompter": "user", "assistant": "assistant", "gpt": "assistant", "model": "assistant",
    "bot": "assistant", "system": "system",
}  # fmt: skip
INPUT = "\n\nInput: "


class Dropped(Exception):
    """A row that cannot become a conversation; the message is the reason that the manifest counts it under."""


class WrongShape(Exception):
    """A row that is not in the source's shape at all: the file is the wrong one."""


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise WrongShape(f"{what} as text, found {type(value).__name__}")
    if any("\ud800" <= c <= "\udfff" for c in value):
        raise Dropped("invalid_unicode")
    return value.strip()


def conversation(turns: list[tuple[str, str]], repairs: Counter[str]) -> list[dict[str, str]]:
    """Normalises (role, text) turns: system text goes into the next user turn, same-role turns merge, the ends are trimmed."""
    messages: list[dict[str, str]] = []
    system: list[str] = []
    for raw, text in turns:
        role = ROLES.get(raw.lower())
        if role is None:
            raise Dropped("unknown_role")
        if role == "system":
            system += [text] if text else []
        elif not text:
            raise Dropped("empty_reply" if role == "assistant" else "empty_prompt")
        elif not messages and role == "assistant":
            repairs["leading_assistant"] += 1
        elif messages and messages[-1]["role"] == role:
            messages[-1]["content"] += f"\n\n{text}"
            repairs["merged_turns"] += 1
        else:
            parts = [*system, text] if role == "user" else [text]
            system = [] if role == "user" else system
            messages.append({"role": role, "content": "\n\n".join(parts)})
    if messages and messages[-1]["role"] == "user":
        messages.pop()
        repairs["trailing_user"] += 1
    if not messages:
        raise Dropped("no_exchange")
    return messages


def from_alpaca(row: dict[str, Any], repairs: Counter[str]) -> dict[str, Any]:
    """{instruction, input, output}: the input, when there is one, follows the instruction as "\\n\\nInput: ..."."""
    if not {"instruction", "output"} <= row.keys():
        raise WrongShape(f"keys instruction, input and output, found {', '.join(sorted(row))}")
    instruction, extra, output = (_text(row.get(k, "" if k == "input" else None), repr(k)) for k in ("instruction", "input", "output"))
    prompt = f"{instruction}{INPUT}{extra}" if extra else instruction
    messages = conversation([("user", prompt), ("assistant", output)], repairs)
    # Kept apart so that the Alpaca format can show it under its own heading.
    return {"messages": messages, "input": extra} if extra else {"messages": messages}


def from_messages(row: dict[str, Any], repairs: Counter[str]) -> dict[str, Any]:
    """{messages: [{role, content}]}, as in Tulu v2 and UltraChat."""
    turns = row.get("messages")
    if not isinstance(turns, list) or not all(isinstance(t, dict) and isinstance(t.get("role"), str) for t in turns):
        found = f"keys {', '.join(sorted(row))}" if turns is None else type(turns).__name__
        raise WrongShape(f"key messages, a list of {{role, content}}, found {found}")
    return {"messages": conversation([(t["role"], _text(t.get("content"), "'content'")) for t in turns], repairs)}


@dataclass(frozen=True)
class Source:
    """A data set: its home on the hub, the split that is drawn from, its built-in sample, and its mapping."""

    hub: str
    split: str
    sample: str
    convert: Callable[[dict[str, Any], Counter[str]], dict[str, Any]]


SOURCES: dict[str, Source] = {
    "alpaca": Source("tatsu-lab/alpaca", "train", "alpaca.json", from_alpaca),
    "tulu": Source("allenai/tulu-v2-sft-mixture", "train", "tulu.jsonl", from_messages),
    "ultrachat": Source("HuggingFaceH4/ultrachat_200k", "train_sft", "ultrachat.jsonl", from_messages),
}


@dataclass
class Reading:
    """What one source gave: its conversations, and the account of every row."""

    origin: str
    revision: str | None = None
    rows_in: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)


def parse(spec: str) -> tuple[str, str]:
    """NAME or NAME=ORIGIN -> (name, origin); the origin defaults to the source's home on the hub."""
    name, _, origin = spec.partition("=")
    if name not in SOURCES:
        raise UserError(unknown("source", name, SOURCES))
    return name, origin or SOURCES[name].hub


def local_path(name: str, origin: str) -> Path | None:
    """The file that an origin means, or None for a hub dataset; a path that is not there is a UserError."""
    path = BUILTIN / SOURCES[name].sample if origin == "builtin" else Path(origin).expanduser()
    if path.is_dir():
        raise UserError(f"source {name}: {path} is a directory; give one .json or .jsonl file")
    if path.is_file():
        return path
    if path.suffix in (".json", ".jsonl") or origin.startswith(("/", ".", "~")) or origin.count("/") != 1:
        raise UserError(f"source {name}: no such file: {origin}")
    return None


def fingerprint(spec: str) -> str:
    """What identifies a source's content: the file's SHA-256, or the dataset's name on the hub."""
    name, origin = parse(spec)
    path = local_path(name, origin)
    return f"{name}={origin}" if path is None else f"{name}=sha256:{sha256(path)}"


def _records(path: Path) -> Iterator[dict[str, Any]]:
    if path.stat().st_size == 0:
        raise UserError(f"{path}: the file is empty")
    if path.suffix == ".jsonl":
        yield from read_jsonl(path)
        return
    try:
        rows = read_json(path)
    except UserError:
        raise UserError(f"{path}: not valid JSON; one object a line goes into a .jsonl file") from None
    if not isinstance(rows, list) or not all(isinstance(r, dict) for r in rows):
        raise UserError(f"{path}: expected a JSON list of objects, found {type(rows).__name__}")
    yield from rows


def _hub_records(source: Source, origin: str, revision: str) -> Iterator[dict[str, Any]]:
    from datasets import load_dataset

    from kit.hub import hub_errors

    with hub_errors(f"dataset {origin}"):
        yield from load_dataset(origin, split=source.split, revision=revision)


def read(spec: str) -> Reading:
    """All conversations of one source, with rows_in = kept + dropped."""
    name, origin = parse(spec)
    path = local_path(name, origin)
    reading = Reading(origin)
    if path is None:
        from kit.hub import commit_of

        reading.revision = commit_of(origin)
        records = _hub_records(SOURCES[name], origin, reading.revision)
    else:
        records = _records(path)
    for number, record in enumerate(records, 1):
        reading.rows_in += 1
        try:
            reading.rows.append(SOURCES[name].convert(record, reading.repaired))
        except Dropped as reason:
            reading.dropped[str(reason)] += 1
        except WrongShape as found:
            raise UserError(f"source {name}: {path or origin}, row {number}: expected {found}") from None
    return reading
