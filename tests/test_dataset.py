"""The data folder: every row accounted for, the same bytes from the same inputs, and nothing lost when a build fails."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from kit import dataset
from kit.config import RunConfig
from kit.errors import UserError
from kit.files import read_json, read_jsonl
from kit.hub import load_tokenizer
from kit.prompts import Renderer

Make = Callable[..., RunConfig]


def write_rows(path: Path, n: int, seed: int = 0) -> Path:
    rng = random.Random(seed)
    path.write_text(json.dumps([{"instruction": f"Question {i}", "input": "", "output": f"Answer {rng.random()}"} for i in range(n)]))
    return path


def ids(config: RunConfig, split: str) -> list[str]:
    return [r["id"] for r in read_jsonl(config.data_path / f"{split}.jsonl")]


def test_manifest_accounts_for_every_row(tiny: Make, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    rows = json.loads(write_rows(path, 30).read_text())
    path.write_text(json.dumps([*rows, rows[0], {"instruction": "x", "output": ""}]))
    config = tiny("--source", f"alpaca={path}", "--train-per-source", "20", "--test-per-source", "10")
    source = dataset.prepare(config)["sources"]["alpaca"]
    assert source["rows_in"] == 32 == source["kept"] + sum(source["dropped"].values())
    assert source["dropped"] == {"duplicate": 1, "empty_reply": 1}
    assert (source["train"], source["test"]) == (20, 10)
    assert not set(ids(config, "train")) & set(ids(config, "test"))
    manifest = read_json(config.data_path / "manifest.json")
    assert sum(manifest["truncated"]["train"].values()) == manifest["files"]["train.jsonl"]["rows"] == 20


def test_same_inputs_give_the_same_bytes_and_the_second_call_builds_nothing(tiny: Make, capsys: pytest.CaptureFixture[str]) -> None:
    small = ("--train-per-source", "20", "--test-per-source", "5", "--valid", "0")
    first, second = (
        tiny("--name", "a", *small),
        tiny("--name", "b", "--source", "ultrachat=builtin", "--source", "tulu=builtin", "--source", "alpaca=builtin", *small),
    )
    for config in (first, second):
        dataset.prepare(config)
    for name in ("train.jsonl", "test.jsonl", "manifest.json"):
        assert (first.data_path / name).read_bytes() == (second.data_path / name).read_bytes()
    capsys.readouterr()
    dataset.prepare(first)
    assert capsys.readouterr().out == ""


def test_growing_a_split_keeps_the_rows_already_drawn(tiny: Make, tmp_path: Path) -> None:
    source = ("--source", f"alpaca={write_rows(tmp_path / 'a.json', 100)}")
    small = tiny("--name", "s", *source, "--train-per-source", "20", "--test-per-source", "10")
    large = tiny("--name", "l", *source, "--train-per-source", "60", "--test-per-source", "30")
    for config in (small, large):
        dataset.prepare(config)
    for split in ("train", "test"):
        assert ids(large, split)[: len(ids(small, split))] == ids(small, split)
    other = tiny("--name", "o", *source, "--train-per-source", "20", "--test-per-source", "10", "--data-seed", "1")
    dataset.prepare(other)
    assert set(ids(other, "test")) != set(ids(small, "test"))


def test_the_order_of_a_file_changes_no_draw(tiny: Make, tmp_path: Path) -> None:
    rows = [{"instruction": f"Task {i // 3}", "output": f"Answer {i}"} for i in range(150)]
    drawn = []
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
        config = tiny("--name", name, "--source", f"x={tmp_path / name}.json", "--train-per-source", "30", "--test-per-source", "10", "--valid", "10")
        dataset.prepare(config)
        drawn.append([ids(config, split) for split in dataset.SPLITS])
        rows.reverse()
    assert drawn[0] == drawn[1]
    for split in ("valid", "test"):  # one row of each group
        assert len({r["messages"][0]["content"] for r in dataset.rows(config, split)}) == 10


def test_every_beginning_of_a_split_is_balanced(tiny: Make) -> None:
    config = tiny("--train-per-source", "10", "--test-per-source", "5", "--limit", "6")
    assert sorted(r["source"] for r in dataset.rows(config, "train")) == ["alpaca"] * 2 + ["tulu"] * 2 + ["ultrachat"] * 2
    assert len(dataset.rows(config, "test")) == 6


def test_other_inputs_are_an_error_and_overwrite_replaces(tiny: Make) -> None:
    config, other = tiny("--train-per-source", "10", "--test-per-source", "5"), tiny("--train-per-source", "12", "--test-per-source", "5")
    dataset.prepare(config)
    with pytest.raises(UserError, match=r"other inputs \(train_per_source\); give the flags that it was built with .*, choose another --name"):
        dataset.prepare(other)
    with pytest.raises(UserError, match=r"other inputs \(revision, data_seed, max_length\)"):
        dataset.prepare(tiny("--train-per-source", "10", "--test-per-source", "5", "--data-seed", "1", "--max-length", "128", "--revision", "other"))
    assert dataset.prepare(other, overwrite=True)["sources"]["tulu"]["train"] == 12
    assert [p.name for p in Path(config.data_dir).iterdir()] == ["tiny"]


def test_a_changed_source_file_is_noticed(tiny: Make, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.json", 30)
    config = tiny("--source", f"alpaca={path}", "--train-per-source", "10", "--test-per-source", "5")
    dataset.prepare(config)
    write_rows(path, 30, seed=1)
    with pytest.raises(UserError, match=r"other inputs \(source\)"):
        dataset.prepare(config)


def test_an_edited_split_is_noticed(tiny: Make) -> None:
    config = tiny("--train-per-source", "10", "--test-per-source", "5")
    dataset.prepare(config)
    with (config.data_path / "test.jsonl").open("a") as file:
        file.write("{}\n")
    (config.data_path / "train.jsonl").unlink()
    for split in ("test", "train"):
        with pytest.raises(UserError, match="is missing or was changed since it was built"):
            dataset.rows(config, split)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"instruction": "a", "output": ""}], r"no usable rows in .* \(dropped: 1 empty reply\)"),
        ([], r"no usable rows in .* \(dropped: —\)"),
        ([{"instruction": "a", "output": "b"}], r"1 usable rows in .* are too few for 10 train \+ 5 test .* it takes more rows"),
        (
            [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b"}, {"instruction": "a", "output": ""}],
            r"1 usable rows in .* \(dropped: 1 duplicate, 1 empty reply\) are too few",
        ),
    ],
)
def test_a_failed_build_leaves_what_was_there(tiny: Make, tmp_path: Path, rows: list[dict[str, str]], message: str) -> None:
    good = tiny("--train-per-source", "10", "--test-per-source", "5")
    dataset.prepare(good)
    before = (good.data_path / "manifest.json").read_bytes()
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    bad = tiny("--source", f"alpaca={tmp_path / 'bad.json'}", "--train-per-source", "10", "--test-per-source", "5")
    with pytest.raises(UserError, match=message):
        dataset.prepare(bad, overwrite=True)
    assert (good.data_path / "manifest.json").read_bytes() == before


def test_the_counts_that_are_offered_do(tiny: Make, tmp_path: Path) -> None:
    source = ("--source", f"alpaca={write_rows(tmp_path / 'a.json', 30)}")
    with pytest.raises(UserError, match="such as") as refused:
        dataset.prepare(tiny(*source, "--train-per-source", "500", "--test-per-source", "200"))
    said, _, for_make = str(refused.value).partition("such as ")[2].partition(" (with make: ")
    offered = said.split()
    assert offered == ["--train-per-source", "20", "--test-per-source", "8"]
    assert for_make == f'ARGS="{said}")'
    dataset.prepare(tiny(*source, *offered))


def test_a_source_named_twice_is_an_error(tiny: Make, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.json", 30)
    with pytest.raises(UserError, match="named twice"):
        dataset.prepare(tiny("--source", f"alpaca={path}", "--source", "alpaca=builtin"))


def test_a_validation_split_is_taken_from_train_and_leaves_test_alone(tiny: Make) -> None:
    small = ("--train-per-source", "20", "--test-per-source", "10")
    without, with_valid = tiny("--name", "a", *small), tiny("--name", "b", *small, "--valid-per-source", "7")
    more = tiny("--name", "c", "--train-per-source", "20", "--test-per-source", "20", "--valid-per-source", "7")
    for config in (without, with_valid, more):
        dataset.prepare(config)
    assert ids(without, "test") == ids(with_valid, "test")
    parts = [set(ids(with_valid, split)) for split in dataset.SPLITS]
    assert [len(p) for p in parts] == [60, 21, 30]
    assert len(set.union(*parts)) == 111
    assert len(set(ids(without, "train")) & parts[0]) >= 60 - 21
    assert len(set(ids(more, "valid")) & parts[1]) >= 15  # a larger test takes few rows of valid


def sentence(rng: random.Random, n: int = 40) -> list[str]:
    return [rng.choice("river lake mountain heron walks sees the a by near old new boat house tree".split()) for _ in range(n)]


def test_rows_alike_never_straddle_train_and_test(tiny: Make, tmp_path: Path) -> None:
    """60 rows in 20 families: an original, the original with one word changed, and its prompt with another reply; over two sources."""
    rng = random.Random(5)
    first, second = [], []
    for family in range(20):
        prompt, reply = f"Task {family}: " + " ".join(sentence(rng)), sentence(rng)
        changed = [*reply[:-1], "different"]
        first += [{"instruction": prompt, "output": " ".join(reply)}, {"instruction": prompt.upper(), "output": " ".join(sentence(rng, 90))}]
        second.append({"instruction": prompt, "output": " ".join(changed)})
    for name, rows in (("one", first), ("two", second)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    config = tiny("--source", f"one={tmp_path / 'one.json'}", "--source", f"two={tmp_path / 'two.json'}", "--train-per-source", "8", "--test-per-source", "5")
    manifest = dataset.prepare(config)
    family = lambda row: int(row["messages"][0]["content"].split(":")[0].split()[1])  # noqa: E731
    train, test = (list(read_jsonl(config.data_path / f"{s}.jsonl")) for s in ("train", "test"))
    assert not {family(r) for r in train} & {family(r) for r in test}
    assert len({(r["source"], family(r)) for r in test}) == len(test) == 10
    assert len({(r["source"], family(r)) for r in train}) < len(train)
    assert manifest["duplicates"] == {"exact": 0, "near": 60, "groups": 20, "largest_group": 3, "similarity": 0.8}
    assert manifest["leaks"]["same_prompt"]["test_rows"] == 0


def test_rows_that_only_resemble_each_other_are_not_grouped(tiny: Make, tmp_path: Path) -> None:
    rng = random.Random(6)
    rows = [{"instruction": " ".join(sentence(rng)), "output": " ".join(sentence(rng))} for _ in range(200)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    manifest = dataset.prepare(tiny("--source", f"mine={tmp_path / 'a.json'}", "--train-per-source", "100", "--test-per-source", "100"))
    assert manifest["duplicates"]["near"] == 0


def test_too_few_rows_once_groups_stay_together(tiny: Make, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{"instruction": "the same prompt", "output": f"reply {i}"} for i in range(20)]))
    with pytest.raises(UserError, match=r"20 usable rows in .* \(1 that differ; 20 are near duplicates of each other\) are too few .*; it takes more rows"):
        dataset.prepare(tiny("--source", f"mine={tmp_path / 'a.json'}", "--train-per-source", "5", "--test-per-source", "5"))


def test_reading_many_rows_is_not_silent(tiny: Make, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset, "SAID_EVERY", 400)
    dataset.prepare(tiny())
    assert [line for line in capsys.readouterr().out.splitlines() if "rows read" in line] == [
        f"source {name}: {n} rows read" for name in ("alpaca", "tulu", "ultrachat") for n in (400, 800)
    ]


def test_what_remains_is_in_the_manifest(tiny: Make, tmp_path: Path) -> None:
    rng = random.Random(7)
    turns = [["Hello there", " ".join(sentence(rng)), " ".join(sentence(rng)), " ".join(sentence(rng))] for _ in range(20)]
    rows = [{"messages": [{"role": ("user", "assistant")[i % 2], "content": t} for i, t in enumerate(talk)]} for talk in turns]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    left = dataset.prepare(tiny("--source", f"talk={tmp_path / 't.jsonl'}", "--train-per-source", "10", "--test-per-source", "10"))["leaks"]
    assert (left["same_prompt"]["test_rows"], left["same_opening"]["test_rows"]) == (0, 10)
    assert len(left["same_opening"]["examples"]) == 3
    assert left["same_opening"]["train_rows"] == [0] * 10


def test_statistics_describe_every_split(tiny: Make) -> None:
    config = tiny("--train-per-source", "20", "--test-per-source", "10")
    manifest = dataset.prepare(config)
    stats = read_json(config.data_path / "dataset_stats.json")
    train = stats["splits"]["train"]
    assert train["rows"] == sum(train["fit"].values()) == sum(train["exchanges"].values()) == sum(train["scripts"].values()) == 60
    assert train["tokens"] == manifest["lengths"]["train"]
    assert set(train["tokens_by_source"]) == {"alpaca", "tulu", "ultrachat"}
    assert train["scripts"] == {"LATIN": 60}
    exams = Renderer(load_tokenizer("builtin"), config.format, config.max_length).exams(dataset.rows(config, "test"))
    assert stats["splits"]["test"]["tokens"]["p100"] == max(len(e.prompt_ids) + len(e.reference_ids) for e in exams)
    assert stats["splits"]["test"]["supervised_tokens"]["p100"] == max(len(e.reference_ids) for e in exams)


def test_a_row_of_a_megabyte_and_odd_characters_go_through(tiny: Make, tmp_path: Path) -> None:
    rows = [
        {"instruction": f"{i} \u2028\u0000 <end_of_turn> <bos> \U0001f642", "output": f"answer {i} " + "word " * (200_000 if i == 3 else 2)} for i in range(12)
    ]
    (tmp_path / "a.json").write_text(json.dumps([*rows, {"instruction": "\ud800", "output": "x"}]))
    config = tiny("--source", f"mine={tmp_path / 'a.json'}", "--train-per-source", "6", "--test-per-source", "6")
    manifest = dataset.prepare(config)
    assert manifest["sources"]["mine"]["dropped"] == {"invalid_unicode": 1}
    found = {r["messages"][0]["content"] for s in ("train", "test") for r in read_jsonl(config.data_path / f"{s}.jsonl")}
    assert found == {r["instruction"] for r in rows}


def test_large_groups_are_drawn_no_more_often_than_single_rows(tiny: Make, tmp_path: Path) -> None:
    """400 single rows and 40 groups of 10: of 110 test rows a tenth is of groups, and train has its share."""
    rng = random.Random(8)
    rows = [{"instruction": " ".join(sentence(rng)), "output": " ".join(sentence(rng))} for _ in range(400)]
    rows += [{"instruction": f"Shared task {g}", "output": " ".join(sentence(rng))} for g in range(40) for _ in range(10)]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    config = tiny("--source", f"mine={tmp_path / 'a.json'}", "--train-per-source", "400", "--test-per-source", "110")
    dataset.prepare(config)
    shared = lambda split: [r["messages"][0]["content"] for r in dataset.rows(config, split) if "Shared" in r["messages"][0]["content"]]  # noqa: E731
    assert 3 <= len(shared("test")) == len(set(shared("test"))) <= 20
    assert 120 <= len(shared("train")) <= 280


def test_a_text_that_most_rows_share_makes_none_alike(tiny: Make, tmp_path: Path) -> None:
    rng = random.Random(9)
    system = " ".join(sentence(rng, 250))
    talks = [[system, " ".join(sentence(rng, 12)), " ".join(sentence(rng, 10))] for _ in range(100)]
    rows = [{"messages": [{"role": r, "content": t} for r, t in zip(("system", "user", "assistant"), talk, strict=True)]} for talk in talks]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    manifest = dataset.prepare(tiny("--source", f"talk={tmp_path / 't.jsonl'}", "--train-per-source", "60", "--test-per-source", "40"))
    assert manifest["duplicates"]["near"] == 0


def test_the_limit_on_test_rows_leaves_validation_rows(tiny: Make) -> None:
    config = tiny("--train-per-source", "10", "--test-per-source", "5", "--valid-per-source", "4", "--limit-test", "3")
    assert [len(dataset.rows(config, split)) for split in dataset.SPLITS] == [30, 12, 3]
