"""Raw rows -> conversations: every shape, every reason."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from kit.errors import UserError
from kit.sources import SOURCES, Dropped, WrongShape, conversation, from_alpaca, from_messages, read


def turns(*pairs: str) -> list[tuple[str, str]]:
    return [tuple(p.split(":", 1)) for p in pairs]  # type: ignore[misc]


def talk(*pairs: str) -> str:
    return " ".join(f"{m['role'][0]}:{m['content']}" for m in conversation(turns(*pairs), Counter()))


def test_alpaca_with_and_without_input() -> None:
    row = from_alpaca({"instruction": " Add. ", "input": "1, 2", "output": "3"}, Counter())
    assert row == {"messages": [{"role": "user", "content": "Add.\n\nInput: 1, 2"}, {"role": "assistant", "content": "3"}], "input": "1, 2"}
    assert from_alpaca({"instruction": "Add.", "input": "", "output": "3"}, Counter())["messages"][0]["content"] == "Add."


def test_roles_are_normalised_and_system_goes_into_the_next_user_turn() -> None:
    assert talk("human:a", "gpt:b", "User:c", "model:d") == "u:a a:b u:c a:d"
    assert talk("system:S", "user:a", "assistant:b") == "u:S\n\na a:b"
    assert talk("system:", "user:a", "assistant:b") == "u:a a:b"


def test_repairs_are_counted() -> None:
    repairs: Counter[str] = Counter()
    made = conversation(turns("assistant:x", "user:a", "user:b", "assistant:c", "user:d"), repairs)
    assert [m["content"] for m in made] == ["a\n\nb", "c"]
    assert repairs == {"leading_assistant": 1, "merged_turns": 1, "trailing_user": 1}


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        (["user:a", "assistant:"], "empty_reply"),
        (["user:", "assistant:b"], "empty_prompt"),
        (["user:a"], "no_exchange"),
        (["assistant:a"], "no_exchange"),
        (["user:a", "tool:b", "assistant:c"], "unknown_role"),
    ],
)
def test_unusable_rows_have_a_reason(pairs: list[str], reason: str) -> None:
    with pytest.raises(Dropped, match=f"^{reason}$"):
        conversation(turns(*pairs), Counter())


def test_lone_surrogates_are_dropped_and_line_separators_kept() -> None:
    with pytest.raises(Dropped, match="invalid_unicode"):
        from_alpaca({"instruction": "a\ud800", "output": "b"}, Counter())
    assert from_alpaca({"instruction": "a\u2028b", "output": "c"}, Counter())["messages"][0]["content"] == "a\u2028b"


@pytest.mark.parametrize("row", [{"messages": "hi"}, {"text": "hi"}, {"messages": [{"content": "x"}]}, {"messages": [{"role": "user", "content": 3}]}])
def test_another_shape_is_an_error(row: dict[str, object]) -> None:
    with pytest.raises(WrongShape):
        from_messages(row, Counter())


def test_every_row_is_accounted_for(tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    empty = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, [good, empty, good])) + "\n\n")
    reading = read(f"tulu={path}")
    assert (reading.rows_in, len(reading.rows), dict(reading.dropped)) == (3, 2, {"empty_reply": 1})


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"instruction": "x", "output": "y"}\n{"instr', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"a": "\xff"}\n', "a.jsonl, line 1: not valid JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: expected a JSON object, found list"),
        ("a.json", b'{"a": 1}', "a.json: expected a JSON list of objects, found dict"),
        ("a.json", b"[1, 2", "a.json: not valid JSON"),
        ("a.json", b"", "a.json: the file is empty"),
        ("a.json", b'[{"prompt": "x"}]', "a.json, row 1: expected keys instruction, input and output, found prompt"),
    ],
)
def test_bad_files_are_named_with_their_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        read(f"alpaca={tmp_path / name}")


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    for origin, message in ((tmp_path, "is a directory"), (tmp_path / "no.json", "no such file"), ("no-such-thing", "no such file")):
        with pytest.raises(UserError, match=message):
            read(f"alpaca={origin}")


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_the_built_in_samples_are_whole(name: str) -> None:
    reading = read(f"{name}=builtin")
    assert reading.rows_in == len(reading.rows) == 900
