"""Raw rows -> conversations: every shape, every reason."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from kit.conversations import Dropped, WrongShape, conversation, from_instruction, from_turns, shape_of
from kit.errors import UserError
from kit.files import write_jsonl
from kit.sources import SOURCES, Stream


def turns(*pairs: str) -> list[tuple[str, str]]:
    return [tuple(p.split(":", 1)) for p in pairs]  # type: ignore[misc]


def talk(*pairs: str) -> str:
    return " ".join(f"{m['role'][0]}:{m['content']}" for m in conversation(turns(*pairs), Counter()))


def test_columns_of_csv_are_those_of_its_rows(tmp_path: Path) -> None:
    """Names may hold semicolons and go over several lines."""
    from kit.readers import records

    for text in ('id,"q (a; b;\n c)",answer\n1,x,y\n', "q (a;b;c),answer,id\nx,y,1\n"):
        (tmp_path / "a.csv").write_text(text)
        told: set[str] = set()
        [(_, row)] = records(tmp_path / "a.csv", told=told)
        assert (len(row or {}), told) == (3, set())
    (tmp_path / "a.csv").write_text('frage;antwort\n"mehrere\nZeilen";ja\n')
    assert [row for _, row in records(tmp_path / "a.csv")] == [{"frage": "mehrere\nZeilen", "antwort": "ja"}]


@pytest.mark.parametrize(
    "row", [{"instruction": "a", "output": "b", "tools": [{"name": "x"}]}, {"conversations": [{"from": "human", "value": "a"}], "tools": [{"name": "x"}]}]
)
def test_a_single_row_with_a_list_beside_it_wraps_nothing(tmp_path: Path, row: dict[str, Any]) -> None:
    from kit.readers import records

    (tmp_path / "a.json").write_text(json.dumps(row))
    with pytest.raises(UserError, match="expected a JSON list of objects, found dict"):
        list(records(tmp_path / "a.json"))


def test_alpaca_with_and_without_input() -> None:
    row = from_instruction({"instruction": " Add. ", "input": "1, 2", "output": "3"}, Counter())
    assert row == {"messages": [{"role": "user", "content": "Add.\n\nInput: 1, 2"}, {"role": "assistant", "content": "3"}], "input": "1, 2"}
    assert from_instruction({"instruction": "Add.", "input": "", "output": "3"}, Counter())["messages"][0]["content"] == "Add."


def test_roles_are_normalised_and_system_goes_into_the_next_user_turn() -> None:
    assert talk("human:a", "gpt:b", "User:c", "model:d") == "u:a a:b u:c a:d"
    assert talk("system:S", "user:a", "assistant:b") == "u:S\n\na a:b"
    assert talk("system:", "user:a", "assistant:b") == "u:a a:b"
    assert talk("user:a", "system:S", "assistant:b") == "u:a\n\nS a:b"
    assert talk("user:a", "system:S", "user:c", "assistant:b", "system:T", "assistant:d", "user:e", "assistant:f") == "u:a\n\nS\n\nc a:b\n\nd u:T\n\ne a:f"


def test_repairs_are_counted() -> None:
    repairs: Counter[str] = Counter()
    made = conversation(turns("assistant:x", "user:a", "user:b", "assistant:c", "user:d"), repairs)
    assert [m["content"] for m in made] == ["a\n\nb", "c"]
    assert repairs == {"leading_assistant": 1, "merged_turns": 1, "trailing_user": 1}
    conversation(turns("user:a", "assistant:b", "system:S"), repairs)
    assert repairs["trailing_system"] == 1


@pytest.mark.parametrize(
    ("pairs", "reason"),
    [
        (["user:a", "assistant:"], "empty_reply"),
        (["user:", "assistant:b"], "empty_prompt"),
        (["user:a"], "no_reply"),
        (["assistant:a"], "no_exchange"),
        (["user:a", "tool:b", "assistant:c"], "tool_turns"),
        (["user:a", "judge:b"], "unknown_role"),
    ],
)
def test_unusable_rows_have_a_reason(pairs: list[str], reason: str) -> None:
    with pytest.raises(Dropped, match=f"^{reason}$"):
        conversation(turns(*pairs), Counter())


def test_lone_surrogates_are_dropped_and_line_separators_kept() -> None:
    with pytest.raises(Dropped, match="invalid_unicode"):
        from_instruction({"instruction": "a\ud800", "output": "b"}, Counter())
    assert from_instruction({"instruction": "a\u2028b", "output": "c"}, Counter())["messages"][0]["content"] == "a\u2028b"


@pytest.mark.parametrize("row", [{"messages": "hi"}, {"text": "hi"}, {"messages": [{"content": "x"}]}, {"messages": ["x"]}])
def test_another_shape_is_an_error(row: dict[str, object]) -> None:
    with pytest.raises(WrongShape):
        from_turns(row, Counter())


def test_every_row_is_accounted_for(tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    empty = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " "}]}
    path = tmp_path / "t.jsonl"
    path.write_text("\n".join(map(json.dumps, [good, empty, good])) + "\n\n")
    stream = Stream(f"tulu={path}")
    assert [number for number, _ in stream.rows()] == [1, 3]
    assert (stream.rows_in, dict(stream.dropped)) == (3, {"empty_reply": 1})
    # The second pass gives the wanted rows and counts nothing.
    assert [number for number, _ in stream.rows(wanted={3})] == [3]
    assert stream.rows_in == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"instruction": "x", "output": "y"}\n{"instr', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{}\n{"a": "\xff"}\n', "a.jsonl, row 1: expected a list of turns under one of messages, "),
        ("a.jsonl", b'{"a": "\xff"}\n', "a.jsonl, line 1, byte 8: not valid UTF-8"),
        ("a.json", b'[\n{"a": "\xff"}]', "a.json, line 2, byte 8: not valid UTF-8"),
        ("a.jsonl", b"[1]\n", "a.jsonl, line 1: expected a JSON object, found list"),
        ("a.json", b'{"a": 1}', "a.json: expected a JSON list of objects, found dict"),
        ("a.json", b'{"messages": [{"role": "user", "content": "x"}]}', "a.json: expected a JSON list of objects, found dict"),
        ("a.json", b'{"a": [{"instruction": "x"}], "b": [{"instruction": "x"}]}', "a.json: expected a JSON list of objects, found dict"),
        ("a.json", b"[1, 2", "a.json: not valid JSON"),
        ("a.csv", b"instruction;output\nx;\xff\n", "a.csv, after row 0, byte 22 of the block: not valid UTF-8"),
        ("a.csv", b"\xff\n", "a.csv, after row 0, byte 1 of the block: not valid UTF-8; save it as CSV in UTF-8, or: iconv -f cp1252"),
        ("a.csv", "a\tb\n".encode("utf-16"), "a.csv, after row 0, byte 1 of the block: not valid UTF-8; save it as CSV in UTF-8, or: iconv -f utf-16"),
        ("a.csv", b'question,answer\n"a",b\n"a "b" c",d\n', "a.csv, line 3: not valid CSV"),
        ("a.json", b"", "a.json: the file is empty"),
        ("a.jsonl", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "a.jsonl, line 1: not valid JSON (maximum recursion"),
        ("a.json", b'[{"prompt": "x"}]', "and an answer (output, completion, response, answer), found prompt"),
    ],
)
def test_bad_files_are_named_with_their_place(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(message)):
        list(Stream(f"alpaca={tmp_path / name}").rows())


def test_a_missing_file_and_a_folder_are_errors(tmp_path: Path) -> None:
    for origin, message in ((tmp_path, "is a directory"), (tmp_path / "no.json", "no such file"), ("no-such-thing", "no such file")):
        with pytest.raises(UserError, match=message):
            Stream(f"alpaca={origin}")


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_the_built_in_samples_are_whole(name: str) -> None:
    stream = Stream(f"{name}=builtin")
    assert len(list(stream.rows())) == stream.rows_in == 900
    assert not stream.dropped


# The same two rows in every format; each row is [file name, how to write it].
ROWS = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "c\u2028d", "input": "x", "output": "e"}]


def write(path: Path) -> Path:
    import pandas

    kind = {".jsonl": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}[Path(path.name.removesuffix(".gz")).suffix]
    plain = path.with_name(f"plain.{kind}")
    if kind == "jsonl":
        plain.write_text("\n".join(json.dumps(r, ensure_ascii=False) for r in ROWS), encoding="utf-8")
    elif kind == "json":
        plain.write_text(json.dumps(ROWS))
    elif kind == "csv":
        pandas.DataFrame(ROWS).to_csv(plain, index=False)
    else:
        pandas.DataFrame(ROWS).to_parquet(plain)
    path.write_bytes(gzip.compress(plain.read_bytes()) if path.suffix == ".gz" else plain.read_bytes())
    return path


FORMATS = [f"{kind}{gz}" for kind in ("d.jsonl", "d.json", "d.csv", "d.parquet") for gz in ("", ".gz")]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    stream = Stream(f"mine={write(tmp_path / name)}")
    assert [[m["content"] for m in row["messages"]] for _, row in stream.rows()] == [["a", "b"], ["c\u2028d\n\nInput: x", "e"]]
    assert stream.shape == "instruction"


@pytest.mark.parametrize(
    ("name", "content", "told_by"),
    [
        ("d.csv", "question;answer\na, b;c\n", "question, answer; columns separated by semicolons"),
        ("d.csv", '\ufeff"question"\t"answer"\n"a, b"\tc\n', "question, answer; columns separated by tabs"),
        ("d.csv", 'question,"answer"\n"a, b",c\n', "question, answer"),
        ("d.csv", 'question,answer,"what; how; when; why"\n"a, b",c,d\n', "question, answer"),
        ("d.TSV", ' Question \tAnswer\n"a, b"\tc\n', "question, answer; columns separated by tabs"),
        ("d.JSONL", '{"Question": "a, b", "ANSWER": "c"}', "question, answer"),
        ("d.jsonl", '{"question": "a, b", "answer": "c", "Answer": "d"}', "question, answer"),
        ("d.json", '{"version": "1", "data": [{"question": "a, b", "answer": "c"}], "tags": ["x"]}', "question, answer; the list under data"),
    ],
)
def test_other_ways_to_write_a_file_are_read_and_said(tmp_path: Path, name: str, content: str, told_by: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    stream = Stream(f"mine={tmp_path / name}")
    for wanted in (None, {1}):
        assert [[m["content"] for m in row["messages"]] for _, row in stream.rows(wanted)] == [["a, b", "c"]]
    assert stream.told_by == told_by


@pytest.mark.parametrize("row", [{"frage": "a", "antwort": "b"}, {"Question": "a", "Best Answer": "b"}])
def test_columns_of_other_names_are_to_be_renamed(tmp_path: Path, row: dict[str, str]) -> None:
    write_jsonl(tmp_path / "d.jsonl", [row])
    with pytest.raises(UserError, match=rf"found {', '.join(sorted(map(str.lower, row)))}; rename the columns to instruction and output"):
        list(Stream(f"mine={tmp_path / 'd.jsonl'}").rows())


@pytest.mark.parametrize("name", ["d.jsonl.gz", "d.csv.gz", "d.parquet", "d.json.gz"])
def test_cut_off_files_are_named(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name)
    path.write_bytes(path.read_bytes()[:-12])
    with pytest.raises(UserError, match=f"{name}: damaged or cut off"):
        list(Stream(f"mine={path}").rows())


def test_a_csv_cell_can_hold_turns_and_a_torn_row_is_named(tmp_path: Path) -> None:
    turns = json.dumps([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]).replace('"', '""')
    (tmp_path / "m.csv").write_text(f'id,messages\n1,"{turns}"\n')
    assert len(list(Stream(f"mine={tmp_path / 'm.csv'}").rows())) == 1
    (tmp_path / "m.csv").write_text('instruction,output\nNames?,"[{""text"": ""Anna""}, {""text"": ""Bob""}]"\n')
    [(_, row)] = Stream(f"mine={tmp_path / 'm.csv'}").rows()
    assert row["messages"][1]["content"] == '[{"text": "Anna"}, {"text": "Bob"}]'
    (tmp_path / "m.csv").write_text("instruction,output\na\n")
    with pytest.raises(UserError, match=r"m.csv, line 2: expected 2 columns"):
        list(Stream(f"mine={tmp_path / 'm.csv'}").rows())


def test_a_parquet_file_with_values_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    texts = pyarrow.array([b"\xff\xfe"]).cast(pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"instruction": texts, "output": ["y"]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p.parquet: damaged or cut off Parquet file after row 0 \(.*utf-8"):
        list(Stream(f"mine={tmp_path / 'p.parquet'}").rows())


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
        {"utterances": [{"speaker": "user", "text": "a"}, {"speaker": "assistant", "text": "b"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "model", "content": ["b"]}]},
    ],
)
def test_every_way_to_write_turns(row: dict[str, object]) -> None:
    assert [m["content"] for m in from_turns(row, Counter())["messages"]] == ["a", "b"]


def test_reasoning_parts_are_left_out_and_counted_and_tool_calls_are_not_trained() -> None:
    repairs: Counter[str] = Counter()
    user = {"role": "user", "content": [{"type": "text", "value": "a"}]}
    reply = [{"type": "reasoning", "value": "hm"}, {"type": "thinking", "value": "hm"}, {"type": "text", "value": "b"}]
    row = from_turns({"messages": [user, {"role": "assistant", "content": reply}]}, repairs)
    assert [m["content"] for m in row["messages"]] == ["a", "b"]
    assert repairs == {"reasoning_left_out": 2}
    with pytest.raises(Dropped, match="tool_turns"):
        from_turns({"messages": [user, {"role": "assistant", "content": [{"type": "tool_call", "value": {}}]}]}, repairs)


def test_turns_that_are_not_text_have_reasons() -> None:
    user = {"role": "user", "content": "a"}
    image = {"role": "user", "content": [{"type": "image", "url": "x"}]}
    call = {"role": "assistant", "content": None, "tool_calls": [{}]}
    for messages, reason in (([image], "not_text"), ([user, call], "tool_turns"), ([{"role": "user", "content": 3}], "not_text")):
        with pytest.raises(Dropped, match=reason):
            from_turns({"messages": messages}, Counter())


def test_a_placeholder_for_no_input_is_no_input() -> None:
    repairs: Counter[str] = Counter()
    assert "input" not in from_instruction({"instruction": "a", "input": "Noinput", "output": "b"}, repairs)
    assert repairs == {"noinput": 1}


def test_a_file_that_mixes_shapes_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "mixed.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n{"messages": []}\n')
    with pytest.raises(UserError, match=r"row 2: expected a question \(.*\) and an answer \(.*\), found messages"):
        list(Stream(f"mine={path}").rows())


def test_a_source_of_ones_own_is_a_file_or_a_dataset_on_the_hub() -> None:
    with pytest.raises(UserError, match=r"unknown source 'mine'.*NAME=FILE or NAME=OWNER/DATASET"):
        Stream("mine")
    for origin, part in (("some/data", ["train"]), ("some/data:test", ["test"]), ("some/data:main:test", ["main", "test"])):
        stream = Stream(f"mine={origin}")
        assert (stream.origin, stream.part, stream.fingerprint()) == ("some/data", part, f"mine={origin}")
    assert Stream("ultrachat").part == ["train_sft"]
    # A part that is taken anyway is no other source, and a known name with other data says nothing of their shape or split.
    assert Stream("mine=some/data:train").fingerprint() == Stream("mine=some/data").fingerprint()
    assert (Stream("ultrachat=some/data").part, Stream("ultrachat=some/data").shape) == (["train"], None)
    for origin in ("some/data:train[:50%]", "some/data:", "some/data/more", "some/data:a:b:c", "some/data.jsonl", "./some/data", "some"):
        with pytest.raises(UserError, match=re.escape(f"source mine: no such file: {origin}")):
            Stream(f"mine={origin}")


@pytest.mark.parametrize(
    ("row", "told_by"),
    [
        ({"completion": "a", "prompt": "q"}, "prompt, completion"),
        ({"question": "q", "answer": "a", "id": 1}, "question, answer"),
        ({"query": "q", "response": "a", "type": "x"}, "query, response"),
        ({"instruction": "q", "context": "", "response": "a", "category": "x"}, "instruction, context, response"),
        ({"instruction": "q", "output": "a", "prompt": "Below", "response": "no"}, "instruction, output (not from prompt, response)"),
        ({"instruction": "", "prompt": "q", "output": None, "response": "a"}, "prompt, response (not from instruction, output)"),
        ({"prompt": "q", "response": "a", "turns": 3, "conversation": None}, "prompt, response"),
        ({"prompt": [{"role": "user", "content": "q"}], "completion": [{"role": "assistant", "content": "a"}]}, "prompt, completion"),
        ({"prompt": "no", "answer": "no", "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "messages"),
    ],
)
def test_questions_and_answers_by_any_of_their_names(row: dict[str, object], told_by: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [row])
    stream = Stream(f"mine={path}")
    assert [r["messages"] for _, r in stream.rows()] == [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]]
    assert stream.told_by == told_by
    known = Stream(f"alpaca={path}")
    assert (len(list(known.rows())), known.told_by) == (1, told_by)  # a file may have the name of a known source, and another shape


def test_what_is_no_text_in_a_question_or_an_answer() -> None:
    repairs: Counter[str] = Counter()

    def made(**row: object) -> list[str]:
        return [m["content"] for m in from_instruction({"question": "q", **row}, repairs)["messages"]]

    assert made(answer=0) == ["q", "0"]
    assert made(answer=4.5, context=12) == ["q\n\nInput: 12", "4.5"]
    assert made(answer="a", context=["one ", "two"]) == ["q\n\nInput: one\n\ntwo", "a"]
    assert repairs == {"passages_joined": 1}
    assert made(answer="a", context=[]) == ["q", "a"]
    assert made(answer="a", input="", context="c") == ["q\n\nInput: c", "a"]
    for row in ({"answer": ["a", "b"]}, {"answer": True}, {"answer": {"text": "a"}}, {"answer": "a", "context": ["one", 2]}):
        with pytest.raises(Dropped, match="not_text"):
            made(**row)
    turns = [{"role": r, "content": c} for r, c in (("system", "S"), ("user", "u"), ("assistant", "begun"))]
    row = {"prompt": turns, "completion": "a", "system": "S", "input": "n"}
    # One system text, and what the question is about stays out of the reply.
    assert [m["content"] for m in from_instruction(row, repairs)["messages"]] == ["S\n\nu\n\nInput: n", "begun\n\na"]


def test_turns_in_the_cells_of_a_csv_are_turns(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    cells = [json.dumps([{"role": role, "content": text}]).replace('"', '""') for role, text in (("user", "q"), ("assistant", "a"))]
    path.write_text(f'prompt,completion\n"{cells[0]}","{cells[1]}"\nas JSON,"[{{""x"": 1}}]"\n')
    found = [[m["content"] for m in row["messages"]] for _, row in Stream(f"mine={path}").rows()]
    assert found == [["q", "a"], ["as JSON", '[{"x": 1}]']]


def test_what_a_question_is_about_goes_with_it() -> None:
    row = {"question": "q", "context": "c", "answer": "a"}
    assert from_instruction(row, Counter()) == {"messages": [{"role": "user", "content": "q\n\nInput: c"}, {"role": "assistant", "content": "a"}], "input": "c"}
    turns = [{"role": r, "content": c} for r, c in (("system", "s"), ("user", "u"), ("assistant", "v"), ("user", "q"))]
    made = from_instruction({"prompt": turns, "completion": "a"}, Counter())
    assert [m["content"] for m in made["messages"]] == ["s\n\nu", "v", "q", "a"]
    made = from_instruction({"prompt": turns, "completion": "a", "context": "c"}, Counter())
    assert [m["content"] for m in made["messages"]] == ["s\n\nu", "v", "q\n\nInput: c", "a"]
    assert "input" not in made  # its heading belongs to the first question
    for empty in ("", None, [], [{"role": "user", "content": " "}]):
        with pytest.raises(Dropped, match="empty_prompt"):
            from_instruction({"prompt": empty, "completion": "a"}, Counter())
    with pytest.raises(WrongShape, match=r"a question \(instruction, .*\) and an answer \(.*\), found chosen, prompt, rejected"):
        shape_of({"prompt": "q", "chosen": "a", "rejected": "b"})


def test_a_system_text_and_a_history_beside_the_turns_are_used() -> None:
    repairs: Counter[str] = Counter()
    shared = {"system": "Be brief", "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}
    assert from_turns(shared, repairs)["messages"] == [{"role": "user", "content": "Be brief\n\nq"}, {"role": "assistant", "content": "a"}]
    told = {"system": "no", "messages": [{"role": "system", "content": "yes"}, *({"role": r, "content": "x"} for r in ("user", "assistant"))]}
    assert from_turns(told, repairs)["messages"][0]["content"] == "yes\n\nx"
    row = {"system_prompt": "S", "instruction": "i", "input": "n", "output": "o", "history": [["q", "a"]]}
    made = from_instruction(row, repairs)
    assert [m["content"] for m in made["messages"]] == ["S\n\nq", "a", "i\n\nInput: n", "o"]
    assert "input" not in made  # its heading belongs to the first question
    assert from_instruction({"instruction": "i", "output": "o", "history": [], "system": ""}, repairs)["messages"][0]["content"] == "i"
    assert repairs == {"system_text_beside_the_turns": 2, "history_before_the_instruction": 1}
